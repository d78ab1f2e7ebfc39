from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.batch import StepBatches
from data_pipeline.errors import DataError
from data_pipeline.reader import shard_reads
from data_pipeline.reader.batches import GlobalBatches
from data_pipeline.reader.clips import ClipReader
from data_pipeline.schema import DataConfig
from tests.small_dataset import write_dataset

FIELDS = ["actions", "extrinsics", "features", "states"]


@pytest.fixture
def copied(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def _open(folder: Path, **config: Any) -> ClipReader:
    return ClipReader(DataConfig.model_validate({"path": str(folder), **config}), split="train", seed=5)


def _flip(folder: Path, key: str, field: str, bit: int = 11) -> tuple[str, int]:
    """Flip a bit of a field's values; returns the shard's name and the field's offset."""
    row = (folder / "keys.txt").read_text().splitlines().index(key)
    offset, nbytes = (int(np.load(folder / "index" / f"{field}_{part}.npy")[row]) for part in ("offset", "nbytes"))
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    name = shards[int(np.load(folder / "index" / "shard.npy")[row])]["name"]
    with (folder / "shards" / name).open("r+b") as file:
        file.seek(offset + (bit // 8) % nbytes)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1 << bit % 8]))
    return name, offset


def _steps(reader: ClipReader, count: int, *, world: int = 1, log: Path | None = None) -> list[list[StepBatches]]:
    """Steps of each rank."""
    ranks = [
        GlobalBatches(reader, global_batch=7, rank=rank, world_size=world, micro_batch=4, bad_clips=log)
        for rank in range(world)
    ]
    try:
        return [[next(batches) for _ in range(count)] for batches in ranks]
    finally:
        for batches in ranks:
            batches.close()


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("seed", range(5))
def test_every_flipped_bit_is_found_and_named(copied: Path, field: str, seed: int) -> None:
    reader = _open(copied)
    random = np.random.default_rng([seed, FIELDS.index(field)])
    row = int(random.integers(reader.num_clips))
    name, offset = _flip(copied, reader.keys[row], field, int(random.integers(1 << 20)))
    for read in (lambda: reader.read(np.array([row])), lambda: _steps(reader, 2)):
        with pytest.raises(DataError) as caught:
            read()
        text = str(caught.value)
        for part in (reader.keys[row], name, f"offset {offset}", f"field {field}", "expected", "hopescale data verify"):
            assert part in text, part
    assert reader.stats().checksum_errors > 0
    assert reader.stats().bad_clips_checksum >= 2


def test_a_flipped_frame_outside_of_what_is_read_does_not_matter(copied: Path) -> None:
    whole = _open(copied)
    key = next(key for key, length in zip(whole.keys, whole.lengths, strict=True) if length == 5)
    frame_bits = whole.tokens * whole.encoder_dim * 16
    _flip(copied, key, "features", 4 * frame_bits + 3)
    short = _open(copied, frames=4)
    assert len(_steps(short, 2)[0]) == 2
    _flip(copied, key, "features", 3 * frame_bits + 3)
    with pytest.raises(DataError, match="field features"):
        _steps(short, 2)


def test_without_checksums_a_flip_passes(copied: Path) -> None:
    reader = _open(copied, reader={"checksums": False})
    _flip(copied, reader.keys[0], "features")
    _steps(reader, 2)


def _everything(parts: list[list[StepBatches]], step: int) -> list[tuple[int, str, float, float]]:
    """Position, key, weight and sum of each clip of a step, over all ranks."""
    return [
        (int(position), key, float(weight), float(features.double().sum()))
        for rank in parts
        for batch in rank[step].micro
        for position, key, weight, features in zip(
            batch.positions, batch.keys, batch.weights, batch.features, strict=True
        )
        if not (key == batch.keys[-1] and weight == 0 and len(batch.keys) == 1 and world_fill(parts, step))
    ]


def world_fill(parts: list[list[StepBatches]], step: int) -> bool:
    """Whether some rank has a filling clip in this step."""
    return sum(len(batch.keys) for rank in parts for batch in rank[step].micro) > 7


@pytest.mark.parametrize("policy", ["substitute", "mask"])
def test_policies_do_the_same_on_any_number_of_ranks(copied: Path, tmp_path: Path, policy: str) -> None:
    clean = _steps(_open(copied), 4)
    reader = _open(copied, reader={"on_bad_clip": policy, "max_bad_fraction": 0.2})
    bad = {reader.keys[2], reader.keys[9]}
    for key in bad:
        _flip(copied, key, "features")
    log = tmp_path / "bad.jsonl"
    whole = _steps(reader, 4, log=log)
    for world in (2, 3):
        parts = _steps(_open(copied, reader={"on_bad_clip": policy, "max_bad_fraction": 0.2}), 4, world=world)
        for step in range(4):
            assert _everything(parts, step) == _everything(whole, step)
    hit = 0
    for step in range(4):
        was = _everything(clean, step)
        for before, after in zip(was, _everything(whole, step), strict=True):
            if before[1] not in bad:
                assert before == after
                continue
            hit += 1
            lengths = dict(zip(reader.keys, reader.lengths.tolist(), strict=True))
            if policy == "mask":
                assert (after[1], after[2], after[3]) == (before[1], 0.0, 0.0)
            else:
                assert after[1] not in bad
                assert lengths[after[1]] == lengths[before[1]]
                assert after[2] == 1.0
        assert whole[0][step].num_frames() == clean[0][step].num_frames()
    assert hit >= 2
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert {record["key"] for record in records} == bad
    assert all(record["policy"] == policy and "expected" in record["reason"] for record in records)
    assert reader.stats().bad_clips_checksum == len(records)


def test_a_substitute_that_is_bad_itself_is_replaced_too(tmp_path: Path) -> None:
    write_dataset(tmp_path, clips=5, partitions=("base",))
    reader = _open(tmp_path, reader={"on_bad_clip": "substitute", "max_bad_fraction": 1.0})
    for key in reader.keys[:4]:
        _flip(tmp_path, key, "features")
    for step in _steps(reader, 3)[0]:
        assert {key for batch in step.micro for key in batch.keys} == {reader.keys[4]}
    _flip(tmp_path, reader.keys[4], "actions")
    with pytest.raises(DataError, match="no clip of the same length"):
        _steps(_open(tmp_path, reader={"on_bad_clip": "substitute", "max_bad_fraction": 1.0}), 1)


def test_too_many_bad_clips_end_the_run(copied: Path) -> None:
    reader = _open(copied, reader={"on_bad_clip": "mask"})
    _flip(copied, reader.keys[0], "features")
    _steps(reader, 4)
    _flip(copied, reader.keys[1], "features")
    with pytest.raises(DataError, match=r"2 of 14 clips are bad.*max_bad_fraction"):
        _steps(reader, 4)


def test_a_shard_cut_short_while_it_is_read(copied: Path) -> None:
    reader = _open(copied, reader={"on_bad_clip": "mask", "max_bad_fraction": 1.0})
    batches = GlobalBatches(reader, global_batch=1, rank=0, world_size=1, micro_batch=1)
    next(batches)
    path = copied / "shards" / "train-000000.tar"
    os.truncate(path, path.stat().st_size // 2)
    masked = [int(next(batches).micro[0].weights[0]) == 0 for _ in range(28)]
    batches.close()
    assert 1 <= sum(masked) <= 8
    stats = reader.stats()
    # Clips that were read ahead and not taken any more are among these.
    assert stats.bad_clips_short + stats.bad_clips_unreadable >= sum(masked)
    with pytest.raises(DataError, match=r"train-000000\.tar"):
        _steps(_open_unchecked(reader), 4)


def _open_unchecked(reader: ClipReader) -> ClipReader:
    reader.config = reader.config.model_copy(
        update={"reader": reader.config.reader.model_copy(update={"on_bad_clip": "raise"})}
    )
    return reader


def test_a_read_that_fails_once_is_repeated(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = _open(copied, reader={"threads": 1})
    expected = _steps(reader, 2)
    real, calls = os.preadv, []

    def flaky(descriptor: int, buffers: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 3:
            raise OSError(5, "Input/output error")
        got = real(descriptor, buffers, offset)
        if len(calls) == 6:
            memoryview(buffers[0])[0:1] = bytes([memoryview(buffers[0])[0] ^ 1])
        return got

    monkeypatch.setattr(shard_reads.os, "preadv", flaky)
    found = _steps(reader, 2)
    assert [_everything(found, step) for step in range(2)] == [_everything(expected, step) for step in range(2)]
    assert reader.stats().retries >= 1
    assert reader.stats().bad_clips_checksum == 0


def test_short_reads_of_the_system_are_completed(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = _open(copied)
    expected = _steps(reader, 2)
    real = os.preadv

    def slow(descriptor: int, buffers: Any, offset: int) -> int:
        return real(descriptor, [memoryview(buffers[0])[:777]], offset)

    monkeypatch.setattr(shard_reads.os, "preadv", slow)
    found = _steps(_open(copied), 2)
    for mine, theirs in zip(found[0], expected[0], strict=True):
        assert all(torch.equal(a.features, b.features) for a, b in zip(mine.micro, theirs.micro, strict=True))


def test_neighbours_are_read_in_one_call(copied: Path) -> None:
    reader = _open(copied, reader={"threads": 1})
    files = shard_reads.OpenShards(reader.store)
    size = [reader.fields.span(row, "features") for row in range(4)]
    ranges = [
        shard_reads.ByteRange(0, offset, np.empty(nbytes, np.uint8), number)
        for number, (offset, nbytes) in reversed(list(enumerate(size)))
    ]
    (run,) = list(shard_reads.runs(ranges))
    files.read(run)
    assert files.calls == 1
    for item in ranges:
        row = item.owner
        assert bytes(item.target) == bytes(reader.clip(row).features.view(torch.uint8).flatten().numpy())
    files.close()


def test_a_substitute_comes_from_the_same_part_of_a_mixture(tmp_path: Path) -> None:
    write_dataset(tmp_path, clips=8, partitions=("old", "new", "later"))
    parts = [{"view": ["old"], "weight": 1.0, "clips": 3}, {"view": ["new"], "weight": 1.0}]
    config = {"mixture": parts, "mixture_block": 4, "reader": {"on_bad_clip": "substitute", "max_bad_fraction": 0.5}}
    buffer = {key for step in _steps(_open(tmp_path, **config), 8)[0] for batch in step.micro for key in batch.keys}
    buffer = {key for key in buffer if key.startswith("old")}
    assert len(buffer) == 3
    _flip(tmp_path, sorted(buffer)[0], "features")
    drawn = [key for step in _steps(_open(tmp_path, **config), 8)[0] for batch in step.micro for key in batch.keys]
    assert {key for key in drawn if not key.startswith("new")} == buffer - {sorted(buffer)[0]}
    assert sum(key.startswith("old") for key in drawn) == len(drawn) // 2


@pytest.mark.parametrize("policy", ["mask", "substitute", "raise"])
def test_a_process_at_its_limit_is_no_bad_clip(copied: Path, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    limits = {"max_bad_fraction": 1.0} if policy != "raise" else {}
    reader = _open(copied, reader={"on_bad_clip": policy, **limits})

    def refused(shard: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(reader.store, "open", refused)
    with pytest.raises(DataError, match=r"data\.reader\.threads.*Too many open files.*ulimit -n"):
        _steps(reader, 1)
    assert reader.stats().bad_clips_unreadable == 0
