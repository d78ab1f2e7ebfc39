from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.batch import ClipBatch
from data_pipeline.errors import DataError
from data_pipeline.reader import ClipReader, GlobalBatches, StepBatches
from data_pipeline.schema import DataConfig
from data_pipeline.shard import shard


def _steps(reader: ClipReader, count: int, **sizes: int) -> list[StepBatches]:
    batches = GlobalBatches(reader, seed=reader.seed, **sizes)
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


def _real(batches: list[ClipBatch]) -> list[tuple[int, str]]:
    return [
        (int(position), key)
        for batch in batches
        for position, key, weight in zip(batch.positions, batch.keys, batch.weights, strict=True)
        if weight
    ]


@pytest.fixture(scope="module")
def reader(dataset: Path) -> ClipReader:
    return ClipReader(dataset, DataConfig(), split="train", seed=5)


def test_clips_come_back_as_stored_and_padded(reader: ClipReader, features: Path) -> None:
    assert (reader.num_clips, reader.frames, reader.tokens, reader.encoder_dim) == (14, 5, 6, 16)
    assert (reader.action_dim, reader.state_dim) == (2, 3)
    rows = np.arange(reader.num_clips)[::-1].copy()
    batch = reader.read(rows, rows + 100)
    assert batch.positions.tolist() == (rows + 100).tolist()
    assert batch.weights.tolist() == [1.0] * 14
    assert batch.states is not None
    for at, (key, length) in enumerate(zip(batch.keys, batch.lengths.tolist(), strict=True)):
        stored = np.load(features / key.split("-")[0] / f"{key}.npz")
        assert length == len(stored["features"])
        assert batch.partitions[at] == key.split("-")[0]
        np.testing.assert_array_equal(batch.features[at, :length], stored["features"].astype(np.float32))
        np.testing.assert_array_equal(batch.actions[at, : length - 1], stored["actions"])
        np.testing.assert_array_equal(batch.states[at, :length], stored["states"])
        assert not batch.features[at, length:].any()
        assert not batch.actions[at, length - 1 :].any()


@settings(deadline=None, max_examples=15)
@given(world=st.integers(1, 8), micro=st.integers(1, 6), extra=st.integers(0, 9), start=st.integers(0, 5))
def test_every_world_size_sees_the_same_clips_in_each_step(
    reader: ClipReader, world: int, micro: int, extra: int, start: int
) -> None:
    total = 8 + extra
    (whole,) = _steps(reader, 1, global_batch=total, rank=0, world_size=1, micro_batch=total, start_step=start)
    parts = [
        _steps(reader, 1, global_batch=total, rank=rank, world_size=world, micro_batch=micro, start_step=start)[0]
        for rank in range(world)
    ]
    assert {len(part.micro) for part in parts} == {len(parts[0].micro)}
    assert all(part.num_clips == total for part in parts)
    for first, end in ((0, None), (1, None), (4, 5), (2, 4)):
        expected = sum(len(range(length)[first:end]) for length in whole.micro[0].lengths.tolist())
        assert {part.num_frames(first, end) for part in parts} == {expected}
        assert sum(batch.num_frames(first, end) for part in parts for batch in part.micro) == expected
    assert [pair for part in parts for pair in _real(part.micro)] == _real(whole.micro)
    joined = torch.cat([batch.features[batch.weights > 0] for part in parts for batch in part.micro])
    assert torch.equal(joined, whole.micro[0].features)


def test_order_does_not_depend_on_shards(reader: ClipReader, features: Path, tmp_path: Path) -> None:
    shard(features, tmp_path / "other", clips_per_shard=5, seed=9)
    other = ClipReader(tmp_path / "other", DataConfig(), split="train", seed=5)
    assert other.keys != reader.keys
    assert other.fingerprint() == reader.fingerprint()
    sizes = {"global_batch": 4, "rank": 0, "world_size": 1, "micro_batch": 4}
    mine, theirs = _steps(reader, 8, **sizes), _steps(other, 8, **sizes)
    assert [_real(step.micro) for step in mine] == [_real(step.micro) for step in theirs]


def test_resuming_continues_the_stream(reader: ClipReader) -> None:
    sizes = {"global_batch": 6, "rank": 0, "world_size": 1, "micro_batch": 3}
    whole = [_real(step.micro) for step in _steps(reader, 6, **sizes)]
    assert whole[2:] == [_real(step.micro) for step in _steps(reader, 4, **sizes, start_step=2)]
    first_epoch = [key for step in whole for _, key in step][:14]
    assert sorted(first_epoch) == sorted(reader.keys)


def test_view_and_frames_restrict_what_is_read(dataset: Path) -> None:
    whole = ClipReader(dataset, DataConfig(), split="heldout", seed=0)
    part = ClipReader(dataset, DataConfig(view=("ice",), frames=3), split="heldout", seed=0)
    assert part.num_clips == 7
    assert set(part.partitions) == {"ice"}
    assert set(part.lengths.tolist()) == {3}
    batch = part.read(np.array([2]))
    assert batch.features.shape == (1, 3, 6, 16)
    assert batch.actions.shape == (1, 2, 2)
    assert torch.equal(batch.features[0], whole.read(np.array([whole.keys.index(part.keys[2])])).features[0, :3])
    assert part.fingerprint() != whole.fingerprint()


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_actions_can_be_read_alone(dataset: Path, data: st.DataObject) -> None:
    frames = data.draw(st.sampled_from([None, 2, 3]))
    reader = ClipReader(dataset, DataConfig(frames=frames), split="heldout", seed=0)
    rows = np.array(data.draw(st.lists(st.integers(0, reader.num_clips - 1), min_size=1, max_size=5)))
    alone, bytes_read = reader.read_actions(rows), reader.stats().bytes_read
    assert torch.equal(alone, reader.read(rows).actions)
    assert bytes_read < (reader.stats().bytes_read - bytes_read) / 2
    reader.close()


@pytest.mark.parametrize("field", ["features", "actions", "states"])
def test_a_flipped_bit_is_found_and_named(dataset: Path, tmp_path: Path, field: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    row = 3
    name = np.load(copy / "index" / "shard.npy")[row]
    offset = int(np.load(copy / "index" / f"{field}_offset.npy")[row])
    path = sorted((copy / "shards").iterdir(), key=lambda path: (path.name.startswith("heldout"), path.name))[name]
    content = bytearray(path.read_bytes())
    content[offset + 5] ^= 4
    path.write_bytes(content)
    reader = ClipReader(copy, DataConfig(), split="train", seed=0)
    with pytest.raises(DataError) as caught:
        reader.read(np.arange(reader.num_clips))
    text = str(caught.value)
    assert reader.keys[row] in text
    assert path.name in text
    assert f"offset {offset}" in text
    assert field in text
    assert "crc32" in text
    assert "expected" in text
    assert reader.stats().checksum_errors == 1

    batches = GlobalBatches(reader, global_batch=14, seed=0, rank=0, world_size=1, micro_batch=14)
    with pytest.raises(DataError, match="crc32"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)
    batches.close()


def test_stats_add_up(dataset: Path) -> None:
    reader = ClipReader(dataset, DataConfig(), split="train", seed=0)
    reader.read(np.arange(4))
    stats = reader.stats()
    expected = sum(
        int(np.load(dataset / "index" / f"{f}_nbytes.npy")[:4].sum()) for f in ("features", "actions", "states")
    )
    assert stats.clips_read == 4
    assert stats.bytes_read == expected
    assert stats.read_seconds > 0
    _steps(reader, 2, global_batch=2, rank=0, world_size=1, micro_batch=2)
    assert reader.stats().wait_seconds > 0
    reader.close()
    assert torch.equal(reader.read(np.arange(2)).features, reader.read(np.arange(2)).features)


def test_a_second_seed_or_too_small_a_batch_is_refused(reader: ClipReader) -> None:
    with pytest.raises(ValueError, match="seed"):
        GlobalBatches(reader, global_batch=4, seed=6, rank=0, world_size=1, micro_batch=1)
    with pytest.raises(ValueError, match="without a clip"):
        GlobalBatches(reader, global_batch=2, seed=5, rank=0, world_size=3, micro_batch=1)


def test_batch_moves_but_for_what_the_host_decides_by(reader: ClipReader) -> None:
    batch = reader.read(np.array([0]))
    moved = batch.to("meta")
    assert moved.features.device.type == moved.actions.device.type == "meta"
    assert moved.lengths.device.type == moved.weights.device.type == moved.positions.device.type == "cpu"
    assert moved.keys == batch.keys
    assert replace(batch, states=None).to("cpu").states is None


def test_features_without_states_give_none(features_writer: Callable[..., Path], tmp_path: Path) -> None:
    shard(features_writer(tmp_path / "features", per_split=1), tmp_path / "out")
    reader = ClipReader(tmp_path / "out", DataConfig(), split="train", seed=0)
    assert reader.state_dim == 0
    assert reader.read(np.array([0])).states is None
