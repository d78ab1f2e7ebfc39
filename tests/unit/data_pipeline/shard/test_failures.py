"""Clips that cannot be used and targets that cannot be written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.dataset.index import Index
from data_pipeline.errors import DataError, Problem
from data_pipeline.schema import Manifest
from data_pipeline.shard import shard
from data_pipeline.shard.merge import merge
from data_pipeline.shard.plan import ShardSettings, SourceRecord
from data_pipeline.shard.run import OpenedClips, RunSettings, shard_part
from data_pipeline.shard.walk import open_regular, walk
from data_pipeline.sources.base import SkippedClip, SourceClip
from data_pipeline.stats import SharderStats
from tests.clip_sources import MemorySource, memory_source, with_arrays


def _broken(source: MemorySource) -> tuple[MemorySource, dict[str, str]]:
    """Four clips that only reading shows to be bad, and what is said of each."""
    keys = [clip.key for clip in source.clips[:4]]
    nan = source.arrays[keys[0]]["features"].copy()
    nan[2, 3, 4] = np.nan
    endless = source.arrays[keys[1]]["actions"].copy()
    endless[1, 0] = np.inf
    source = with_arrays(source, keys[0], {"features": nan})
    source = with_arrays(source, keys[1], {"actions": endless})
    source = with_arrays(source, keys[2], {"states": source.arrays[keys[2]]["states"][:-1]})
    reasons = (
        "features holds nan at [2, 3, 4]: all values must be finite",
        "actions holds inf at [1, 0]: all values must be finite",
        "states was listed as float32 [5, 3] and read as float32 [4, 3]",
        "the file ends too early",
    )
    return replace(source, unreadable=frozenset(keys[3:])), dict(zip(keys, reasons, strict=True))


def _no_leftovers(out: Path) -> bool:
    return not [path for path in out.rglob("*") if path.name.endswith((".tmp", ".lock"))]


def test_bad_clips_end_the_run_by_name_or_are_left_out_and_listed(tmp_path: Path) -> None:
    source = replace(memory_source(20), bad=(SkippedClip("zzz", "row 99", "its header is damaged"),))
    broken, reasons = _broken(source)
    with pytest.raises(DataError, match="clip zzz: its header is damaged"):
        shard(broken, tmp_path / "fail")
    with pytest.raises(DataError) as caught:
        shard(replace(broken, bad=()), tmp_path / "fail", clips_per_shard=4)
    assert any(text in str(caught.value) and key in str(caught.value) for key, text in reasons.items())
    assert _no_leftovers(tmp_path / "fail")
    seen: list[SharderStats] = []
    some: dict[str, Any] = {"clips_per_shard": 4, "on_error": "skip", "max_bad_fraction": 0.25}
    with pytest.raises(DataError, match=r"cannot be used, e.g. .*allow it: max_bad_fraction="):
        shard(broken, tmp_path / "few", clips_per_shard=4, on_error="skip")
    manifest = shard(broken, tmp_path / "skip", **some, report=seen.append)
    assert manifest.num_clips == 16
    assert sum(sum(counts.values()) for counts in manifest.partitions.values()) == 16
    assert seen[-1].bad == 5
    report = json.loads((tmp_path / "skip" / "report.json").read_text())
    assert {clip["key"]: clip["reason"] for clip in report["skipped"]} == {**reasons, "zzz": "its header is damaged"}
    assert not set(reasons) & set(Index(tmp_path / "skip", manifest).keys())


def test_a_clip_left_out_leaves_all_other_shards_alone(tmp_path: Path) -> None:
    source = memory_source(20)
    shard(source, tmp_path / "all", clips_per_shard=4)
    without = replace(source, unreadable=frozenset({source.clips[7].key}))
    shard(without, tmp_path / "some", clips_per_shard=4, on_error="skip")
    same = [
        path.name
        for path in (tmp_path / "all" / "shards").iterdir()
        if path.read_bytes() == (tmp_path / "some" / "shards" / path.name).read_bytes()
    ]
    assert len(same) == len(list((tmp_path / "all" / "shards").iterdir())) - 1


def test_a_failed_run_goes_on_with_bad_clips_left_out_and_not_the_other_way_round(tmp_path: Path) -> None:
    source = memory_source(20)
    broken = replace(source, unreadable=frozenset({source.clips[0].key}))
    with pytest.raises(DataError, match="the file ends too early"):
        shard(broken, tmp_path, clips_per_shard=4)
    assert shard(broken, tmp_path, clips_per_shard=4, on_error="skip").num_clips == 19
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match="the file ends too early"):
        shard(broken, tmp_path, clips_per_shard=4)


def test_a_shard_that_loses_all_its_clips_is_not_written(tmp_path: Path) -> None:
    source = memory_source(9, heldout=1)
    broken = replace(source, unreadable=frozenset({source.clips[-1].key}))
    manifest = shard(broken, tmp_path, clips_per_shard=4, on_error="skip")
    assert [entry.name for entry in manifest.shards] == ["train-000000.tar", "train-000001.tar"]
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["train-000000.tar", "train-000001.tar"]
    none = replace(source, unreadable=frozenset(clip.key for clip in source.clips))
    with pytest.raises(DataError, match=r"every clip was left out; .*: the file ends too early"):
        shard(none, tmp_path / "none", on_error="skip", max_bad_fraction=1)


def test_numbers_a_type_cannot_hold_are_named(tmp_path: Path) -> None:
    source = memory_source(6, dtype="float32")
    key = source.clips[2].key
    large = source.arrays[key]["features"].copy()
    large[1, 1, 1] = -70000
    source = with_arrays(source, key, {"features": large})
    with pytest.raises(DataError) as caught:
        shard(source, tmp_path / "fail", dtype="float16")
    assert key in str(caught.value)
    assert "features hold 1 numbers that float16 cannot hold, e.g. -70000" in str(caught.value)
    manifest = shard(source, tmp_path / "skip", dtype="float16", on_error="skip")
    assert manifest.num_clips == 5
    assert manifest.conversion is not None
    assert manifest.conversion.overflows == 1
    shard(source, tmp_path / "bf16", dtype="bfloat16")


def test_conversions_that_lose_too_much_are_refused_by_clip(tmp_path: Path) -> None:
    def spiky(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        values = random.normal(size=shape) * 1e-3
        values[0, 0] = 1000
        values[0, 0, ::2] = -1000
        return values

    source = memory_source(4, dtype="float32")
    key = source.clips[1].key
    source = with_arrays(source, key, {"features": spiky(np.random.default_rng(0), (5, 6, 16)).astype(np.float32)})
    with pytest.raises(DataError) as caught:
        shard(source, tmp_path / "out", dtype="int8")
    assert key in str(caught.value)
    assert "max_error=0.05" in str(caught.value)
    # A higher limit goes on where the lower one ended.
    manifest = shard(source, tmp_path / "out", dtype="int8", max_error=0.999)
    assert manifest.num_clips == 4
    assert shard(source, tmp_path / "skip", dtype="int8", on_error="skip").num_clips == 3


def _disk_with_room_for(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    writev = os.writev

    def limited(descriptor: int, pieces: list[memoryview]) -> int:
        nonlocal room
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = memoryview(b"".join(pieces))[:room]
        room -= len(part)
        return writev(descriptor, [part])

    monkeypatch.setattr(os, "writev", limited)


@pytest.mark.parametrize("room", [0, 100, 9_000, 40_000])
def test_a_full_disk_leaves_finished_shards_only_and_can_be_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    source = memory_source(20)
    with monkeypatch.context() as patch:
        _disk_with_room_for(patch, room)
        with pytest.raises(DataError) as caught:
            shard(source, tmp_path / "out", clips_per_shard=4)
    assert "No space left on device" in str(caught.value)
    assert "make room, then run the same command again: finished shards are kept" in str(caught.value)
    assert _no_leftovers(tmp_path / "out")
    for path in (tmp_path / "out" / "shards").iterdir():
        descriptor = open_regular(path)
        assert len(list(walk(descriptor))) == 4 * 4
        os.close(descriptor)
    shard(source, tmp_path / "out", clips_per_shard=4)
    shard(source, tmp_path / "whole", clips_per_shard=4)
    for path in (tmp_path / "whole").rglob("*.*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes()


@contextmanager
def _small_disk(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a disk")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_or_read_only_is_named(tmp_path: Path) -> None:
    source, disk = memory_source(20), tmp_path / "disk"
    with _small_disk(disk, "size=200k"):
        for workers in (1, 2):
            with pytest.raises(DataError, match="No space left on device"):
                shard(source, disk / "out", clips_per_shard=4, workers=workers)
            assert _no_leftovers(disk / "out")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for out in (disk / "out", disk / "new"):
            with pytest.raises(DataError, match=r"Read-only file system.*make the folder writable"):
                shard(source, out, clips_per_shard=4)
        subprocess.run(["mount", "-o", "remount,rw,size=40m", str(disk)], check=True)
        assert shard(source, disk / "out", clips_per_shard=4).num_clips == 20


@pytest.mark.parametrize("name", ["plan.json", "journal/train-000000.json", "index/uid.npy", "manifest.json"])
def test_a_disk_that_fills_up_beside_the_shards_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source, fsync = memory_source(8), os.fsync
    with monkeypatch.context() as patch:

        def failing(descriptor: int) -> None:
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"{name}.tmp"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        patch.setattr(os, "fsync", failing)
        with pytest.raises(DataError, match="No space left on device"):
            shard(source, tmp_path)
    assert _no_leftovers(tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    assert shard(source, tmp_path).num_clips == 8


@dataclass
class FailingDisk(MemorySource):
    """Says for some clips what a disk says that gives out."""

    number: int = errno.EIO

    def read(self, clip: SourceClip) -> dict[str, np.ndarray]:
        if clip.key in self.unreadable:
            try:
                raise OSError(self.number, os.strerror(self.number))
            except OSError as error:
                raise DataError(Problem("source", clip.key, "cannot be read", "look after the disk")) from error
        return super().read(clip)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_a_disk_that_gives_out_is_no_bad_clip(tmp_path: Path, number: int) -> None:
    plain = memory_source(20)
    source = FailingDisk(plain.clips, plain.arrays, unreadable=frozenset({plain.clips[3].key}), number=number)
    with pytest.raises(DataError, match="cannot be read"):
        shard(source, tmp_path, clips_per_shard=4, on_error="skip", max_bad_fraction=1)
    assert shard(plain, tmp_path, clips_per_shard=4).num_clips == 20


def test_too_many_bad_clips_end_the_run_and_are_read_again_by_the_next(tmp_path: Path) -> None:
    source = memory_source(40)
    lost = replace(source, unreadable=frozenset(clip.key for clip in source.clips[:30]))
    with pytest.raises(DataError, match=r"of 40 clips cannot be used.*the file ends too early.*max_bad_fraction="):
        shard(lost, tmp_path, clips_per_shard=4, on_error="skip")
    assert not (tmp_path / "manifest.json").exists()
    assert shard(source, tmp_path, clips_per_shard=4, on_error="skip").num_clips == 40
    listed = replace(source, bad=tuple(SkippedClip(f"z{i}", "row", "no header") for i in range(2)))
    with pytest.raises(DataError, match="2 of 42 clips cannot be used"):
        shard(listed, tmp_path / "listed", on_error="skip")
    # What the listing leaves out and what reading does count together.
    one_each = replace(source, bad=listed.bad[:1], unreadable=frozenset({source.clips[0].key}))
    with pytest.raises(DataError, match="2 of 41 clips cannot be used"):
        shard(one_each, tmp_path / "each", on_error="skip")


def test_parts_may_leave_out_no_more_than_the_whole(tmp_path: Path) -> None:
    source = memory_source(40)
    lost = replace(source, unreadable=frozenset(clip.key for clip in source.clips[::10]))
    opened = OpenedClips(lost, SourceRecord("memory", None, {}))
    settings = ShardSettings(clips_per_shard=5)

    def make(out: Path, fraction: float, parts: int) -> Manifest:
        how = RunSettings(on_error="skip", max_bad_fraction=fraction)
        for number in range(parts):
            shard_part(opened, out, settings, how, f"{number}/{parts}")
        return merge(out)

    # One bad clip is allowed to each part, four to none of all.
    with pytest.raises(DataError, match="4 of 40 clips cannot be used"):
        make(tmp_path / "parts", 0.05, 8)
    with pytest.raises(DataError, match="4 of 40 clips cannot be used"):
        merge(tmp_path / "parts")
    # The share that is suggested is enough, and a part may have all of them.
    assert make(tmp_path / "allowed", 0.1, 2).num_clips == 36


def test_a_run_that_left_out_too_many_clips_cannot_be_merged(tmp_path: Path) -> None:
    source = memory_source(20, heldout=0)
    lost = replace(source, unreadable=frozenset(clip.key for clip in source.clips[:3]))
    for _ in range(2):
        with pytest.raises(DataError, match="of 20 clips cannot be used"):
            shard(lost, tmp_path, clips_per_shard=30, on_error="skip")
        with pytest.raises(DataError, match="of 20 clips cannot be used"):
            merge(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_a_complete_data_set_with_other_limits_is_not_called_damaged(tmp_path: Path) -> None:
    source = memory_source(20, dtype="float32")
    lost = replace(source, unreadable=frozenset({source.clips[0].key}))
    shard(lost, tmp_path, dtype="int8", on_error="skip")
    assert shard(lost, tmp_path, dtype="int8", on_error="skip").num_clips == 19
    others: list[dict[str, Any]] = [{"on_error": "fail"}, {"on_error": "skip", "max_error": 0.01}]
    for settings in others:
        with pytest.raises(DataError, match="was made with o") as caught:
            shard(source, tmp_path, dtype="int8", **settings)
        assert "damaged" not in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "value"), [("float32", 3e38), ("float32", -2e17), ("bfloat16", 3e38), ("int8", 1e20)]
)
def test_features_whose_statistics_would_not_be_finite_are_refused(tmp_path: Path, dtype: str, value: float) -> None:
    def large(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        values = random.normal(size=shape)
        values[0, 0, 0] = value
        return values

    with pytest.raises(DataError, match="neither LayerNorm nor the statistics would be finite"):
        shard(memory_source(4, dtype=dtype, values=large), tmp_path / "out")
    fitting = memory_source(4, dtype=dtype, values=lambda random, shape: random.normal(size=shape) * 1e15)
    shard(fitting, tmp_path / "fits")
    with np.load(tmp_path / "fits" / "stats.npz") as stored:
        assert all(np.isfinite(stored[name]).all() for name in stored if name != "partitions")
    assert np.isfinite(np.load(tmp_path / "fits" / "mean_frame.npy")).all()


def test_numbers_that_float32_rounds_to_nothing_are_an_error_of_the_conversion(tmp_path: Path) -> None:
    def tiny(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return random.normal(size=shape) * 1e-50

    with pytest.raises(DataError, match="changes them by 1 of their size"):
        shard(memory_source(3, dtype="float64", values=tiny), tmp_path / "tiny", dtype="float32")
    manifest = shard(memory_source(3, dtype="float64"), tmp_path / "out", dtype="float32")
    assert manifest.conversion is not None
    assert 1e-9 < manifest.conversion.relative_rmse < 1e-7


def test_every_change_of_type_is_reported(tmp_path: Path) -> None:
    shard(memory_source(3, action_dtype="int64"), tmp_path / "int")
    (note,) = json.loads((tmp_path / "int" / "report.json").read_text())["notes"]
    assert note.startswith("actions: int64 was stored as float32; 0 of ")
    shard(memory_source(3, action_dtype="float16"), tmp_path / "half")
    (note,) = json.loads((tmp_path / "half" / "report.json").read_text())["notes"]
    assert note == "actions: float16 was stored as float32; no value changed"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_error": 0.1}, "has no effect with dtype=keep"),
        ({"max_bad_fraction": 0.5}, "has no effect with on_error=fail"),
        ({"max_bad_fraction": 2.0, "on_error": "skip"}, "must be 0 to 1"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: Path, settings: dict, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        shard(memory_source(3), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
