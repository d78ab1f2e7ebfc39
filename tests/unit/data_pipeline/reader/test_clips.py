from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from data_pipeline.dtypes import STORED_TYPES
from data_pipeline.errors import DataError
from data_pipeline.reader.clips import ClipReader
from data_pipeline.reader.streamed import StreamedClips
from data_pipeline.reader.torch_dataset import ClipDataset
from data_pipeline.schema import DataConfig
from data_pipeline.shard import shard
from data_pipeline.shard.walk import open_regular, walk
from tests.feature_folders import write_features
from tests.small_dataset import write_dataset


def test_clips_come_back_as_stored_and_padded(reader: ClipReader, dataset: Path) -> None:
    assert (reader.num_clips, reader.frames, reader.tokens, reader.encoder_dim) == (14, 5, 6, 16)
    assert (reader.action_dim, reader.state_dim, reader.extrinsics_dim) == (2, 3, 2)
    rows = np.arange(reader.num_clips)[::-1].copy()
    batch = reader.read(rows, rows + 100)
    assert batch.positions.tolist() == (rows + 100).tolist()
    assert batch.weights.tolist() == [1.0] * 14
    assert batch.features.dtype == torch.float16
    stored = _members(dataset)
    for at, (key, length) in enumerate(zip(batch.keys, batch.lengths.tolist(), strict=True)):
        assert batch.partitions[at] == key.split("-")[0]
        expected = {name: stored[f"{key}.{name}.npy"] for name in ("features", "actions", "states", "extrinsics")}
        assert length == len(expected["features"])
        for name, values in expected.items():
            batched = getattr(batch, name)[at]
            np.testing.assert_array_equal(batched[: len(values)].numpy(), values)
            assert not batched[len(values) :].any()


def _members(dataset: Path) -> dict[str, np.ndarray]:
    import io

    found = {}
    for path in sorted((dataset / "shards").iterdir()):
        descriptor = open_regular(path)
        content = path.read_bytes()
        for member in walk(descriptor):
            if member.name.endswith(".npy"):
                found[member.name] = np.load(io.BytesIO(content[member.offset : member.offset + member.size]))
    return found


def test_a_clip_is_a_view_of_the_shard_that_outlives_the_reader(dataset: Path) -> None:
    reader = ClipReader(DataConfig(path=str(dataset)), split="train", seed=0)
    first, again = reader.clip(3), reader.clip(3)
    assert first.features.data_ptr() == again.features.data_ptr()
    expected = first.decoded()
    first.features[0, 0, 0] = 7
    reader.close()
    fresh = reader.clip(3)
    assert torch.equal(fresh.decoded(), expected)
    assert first.features[0, 0, 0] == 7


@pytest.mark.parametrize("dtype", sorted(STORED_TYPES))
def test_every_stored_type_is_decoded(tmp_path: Path, dtype: str) -> None:
    write_dataset(tmp_path, dtype=dtype)  # pyright: ignore[reportArgumentType]
    write_dataset(tmp_path / "exact", dtype="float32")
    reader = ClipReader(DataConfig(path=str(tmp_path)), split="train", seed=0)
    exact = ClipReader(DataConfig(path=str(tmp_path / "exact")), split="train", seed=0)
    rows = np.arange(3)
    stored, wanted = reader.read(rows), exact.read(rows).features
    assert stored.features.dtype == STORED_TYPES[dtype].torch
    decoded = stored.to("cpu")
    assert decoded.features.dtype == torch.float32
    assert decoded.features_scale is None
    error = (decoded.features - wanted).norm() / wanted.norm()
    assert error <= {"float32": 0, "float16": 4e-4, "bfloat16": 3e-3, "int8": 9e-3}.get(dtype, 0.06)
    for row in rows.tolist():
        assert torch.equal(reader.clip(row).decoded(), decoded.features[row])


def test_view_and_frames_restrict_what_is_read(dataset: Path) -> None:
    whole = ClipReader(DataConfig(path=str(dataset)), split="heldout", seed=0)
    part = ClipReader(DataConfig(path=str(dataset), view=("ice",), frames=3), split="heldout", seed=0)
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
    reader = ClipReader(DataConfig(path=str(dataset), frames=frames), split="heldout", seed=0)
    rows = np.array(data.draw(st.lists(st.integers(0, reader.num_clips - 1), min_size=1, max_size=5)))
    alone, bytes_read = reader.read_actions(rows), reader.stats().bytes_read
    assert torch.equal(alone, reader.read(rows).actions)
    assert bytes_read < (reader.stats().bytes_read - bytes_read) / 2
    reader.close()


def test_order_and_fingerprint_do_not_depend_on_shards(tmp_path: Path, dataset: Path, reader: ClipReader) -> None:
    sizes = {"clips": 7, "heldout": 7, "lengths": (4, 5, 5), "state_dim": 3, "extrinsics_dim": 2}
    write_dataset(tmp_path, clips_per_shard=3, **sizes)
    other = ClipReader(DataConfig(path=str(tmp_path)), split="train", seed=5)
    assert other.fingerprint() == reader.fingerprint()
    assert other.manifest.shards != reader.manifest.shards


def test_alignment_is_applied_when_clips_are_read(tmp_path: Path) -> None:
    write_dataset(tmp_path, action_alignment="difference")
    reader = ClipReader(DataConfig(path=str(tmp_path)), split="train", seed=0)
    poses = _members(tmp_path)[f"{reader.keys[0]}.actions.npy"]
    np.testing.assert_allclose(reader.clip(0).actions.numpy(), poses[1:] - poses[:-1], rtol=1e-6)
    first = ClipReader(DataConfig(path=str(tmp_path), action_alignment="first"), split="train", seed=0)
    np.testing.assert_array_equal(first.clip(0).actions.numpy(), poses[:-1])
    assert first.fingerprint() != reader.fingerprint()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_reads_the_same_clips(dataset: Path, reader: ClipReader, workers: int) -> None:
    clips = ClipDataset(DataConfig(path=str(dataset)), split="train", seed=5)
    context = "spawn" if workers else None
    loader = DataLoader(
        clips, batch_size=4, collate_fn=clips.collate, num_workers=workers, multiprocessing_context=context
    )
    batches = list(loader)
    assert [key for batch in batches for key in batch.keys] == reader.keys
    for batch in batches:
        rows = np.array([reader.keys.index(key) for key in batch.keys])
        assert torch.equal(batch.features, reader.read(rows).features)
    assert len(pickle.dumps(clips)) < 4000
    with pytest.raises(IndexError, match="row 14 of 14"):
        clips[14]


@pytest.mark.parametrize("dtype", sorted(STORED_TYPES))
def test_tars_without_an_index_can_be_streamed_and_refuse_to_resume(tmp_path: Path, dtype: str) -> None:
    features = write_features(tmp_path / "features", per_split=3, states=True)
    stored = "float16" if dtype.startswith("float8") else dtype
    shard(features, tmp_path / "data", dtype=stored, clips_per_shard=3)  # pyright: ignore[reportArgumentType]
    reader = ClipReader(DataConfig(path=str(tmp_path / "data")), split="train", seed=0)
    clips = StreamedClips(sorted((tmp_path / "data" / "shards").glob("train-*.tar")))
    found = list(clips)
    assert [clip.key for clip in found] == reader.keys
    for row, clip in enumerate(found):
        indexed = reader.clip(row)
        assert torch.equal(clip.decoded(), indexed.decoded())
        for name in ("actions", "states", "extrinsics"):
            mine, theirs = getattr(clip, name), getattr(indexed, name)
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs)
        assert clip.partition == indexed.partition
    with pytest.raises(DataError, match=r"no place to resume from.*hopescale data index"):
        clips.state_dict()


@pytest.mark.parametrize("name", ["pipe:cat a.tar", "http://127.0.0.1/a.tar", "missing.tar"])
def test_streaming_opens_local_files_alone(name: str) -> None:
    with pytest.raises(DataError, match="not a local file"):
        StreamedClips([name])


def test_a_stream_says_what_a_clip_lacks(dataset: Path) -> None:
    members = {"features": "feats.npy", "actions": "actions.npy"}
    with pytest.raises(DataError, match=r"has no member feats\.npy, only .*features\.npy"):
        next(iter(StreamedClips([dataset / "shards" / "train-000000.tar"], members=members)))
