"""Runs of the sharder that end too early, or are asked for twice."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.dataset.verify import verify
from data_pipeline.errors import DataError
from data_pipeline.schema import Manifest
from data_pipeline.shard import shard
from data_pipeline.shard.journal import read_plan, read_record
from data_pipeline.shard.merge import merge
from data_pipeline.shard.plan import ShardSettings
from data_pipeline.shard.run import RunSettings, open_clips, plan_shards, rebuild_shard, shard_part
from data_pipeline.stats import SharderStats
from tests.clip_sources import MemorySource, changed, memory_source
from tests.feature_folders import write_features

CLIPS_PER_SHARD = 3


def _content(folder: Path) -> dict[str, str]:
    """sha256 of every file of a data set."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _make(source: MemorySource, out: Path, **settings: object) -> Manifest:
    return shard(source, out, clips_per_shard=CLIPS_PER_SHARD, **settings)  # pyright: ignore[reportArgumentType]


def _part(source: MemorySource, out: Path, part: str) -> Manifest | None:
    return shard_part(open_clips(source), out, ShardSettings(CLIPS_PER_SHARD), RunSettings(), part)


@pytest.fixture(scope="module")
def source() -> MemorySource:
    return memory_source(16, heldout=5, extrinsics=2)


@pytest.fixture(scope="module")
def whole(source: MemorySource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    _make(source, out)
    return out


def _killed(work: Callable[[], object], after: int) -> bool:
    """Run `work` in a copy of this process that dies, without warning, at one of its calls that change the disk.

    Returns:
        Whether it died before its end.
    """
    pid = os.fork()
    if pid == 0:
        calls = 0

        def counted(function: Callable) -> Callable:
            def call(*arguments: object, **named: object) -> object:
                nonlocal calls
                calls += 1
                if calls == after:
                    # Half of a write reaches the file, as when a machine stops.
                    if function is writev:
                        writev(arguments[0], [bytes(memoryview(arguments[1][0])[:100])])  # pyright: ignore
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **named)

            return call

        writev = os.writev
        for name in ("writev", "fsync", "rename", "replace", "unlink", "mkdir", "open"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        except BaseException:
            os._exit(9)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _check_killed_runs(source: MemorySource, whole: Path, tmp_path: Path, trials: int, seed: int) -> None:
    expected, random = _content(whole), np.random.default_rng(seed)
    shards = {name: sha256 for name, sha256 in expected.items() if name.startswith("shards/")}
    total, died = 243, 0
    for trial in range(trials):
        out = tmp_path / str(trial)
        # Killed once, killed again while it goes on, then left alone.
        for after in random.integers(1, total, 2):
            died += _killed(lambda out=out: _make(source, out), int(after))
            found = _content(out) if out.exists() else {}
            for name, sha256 in found.items():
                assert not name.endswith(".tar") or sha256 == shards[name]
            assert "manifest.json" not in found or found["manifest.json"] == expected["manifest.json"]
        _make(source, out)
        assert _content(out) == expected
    assert died > trials


def test_a_run_killed_anywhere_goes_on_to_the_same_bytes(source: MemorySource, whole: Path, tmp_path: Path) -> None:
    _check_killed_runs(source, whole, tmp_path, 8, 1)


@pytest.mark.slow
def test_a_run_killed_at_fifty_places_goes_on_to_the_same_bytes(
    source: MemorySource, whole: Path, tmp_path: Path
) -> None:
    _check_killed_runs(source, whole, tmp_path, 50, 2)


def test_a_killed_zarr_run_goes_on_to_the_same_bytes(source: MemorySource, tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    _make(source, tmp_path / "whole", format="zarr")
    expected = _content(tmp_path / "whole")
    # Over all of a run: chunks, small arrays, their names, folders, index, and the manifest.
    for after in (30, 120, 330, 520, 700, 760, 800):
        assert _killed(lambda after=after: _make(source, tmp_path / str(after), format="zarr"), after)
        found = _content(tmp_path / str(after))
        assert "manifest.json" not in found or found["manifest.json"] == expected["manifest.json"]
        _make(source, tmp_path / str(after), format="zarr")
        assert _content(tmp_path / str(after)) == expected


def test_all_of_a_zarr_group_is_on_the_disk_before_the_manifest_is(
    source: MemorySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("zarr")
    fsync, synced = os.fsync, []

    def noted(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    _make(source, tmp_path, format="zarr")
    before = set(synced[: synced.index((tmp_path / "manifest.json").stat().st_ino)])
    for path in (tmp_path / "shards", *(tmp_path / "shards").rglob("*")):
        assert path.stat().st_ino in before, path
    assert not list((tmp_path / "shards").glob("*.tmp"))


def test_a_group_that_cannot_be_written_leaves_no_half_of_it(
    source: MemorySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zarr = pytest.importorskip("zarr")

    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(zarr.Group, "create_array", full)
        with pytest.raises(DataError, match="No space left on device"):
            _make(source, tmp_path, format="zarr")
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["clips.zarr"]
    assert _make(source, tmp_path, format="zarr").num_clips == 16


def test_finished_shards_are_not_written_again(source: MemorySource, whole: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        _make(source, out, progress=stop)
    kept = {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}
    assert sorted(path.name for path in kept) == ["train-000000.tar", "train-000001.tar"]
    seen: list[SharderStats] = []
    done: list[tuple[int, int]] = []
    _make(source, out, report=seen.append, progress=lambda *at: done.append(at))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert done[0] == (7, 16)
    assert done[-1] == (16, 16)
    assert (seen[0].skipped, seen[0].clips) == (6, 0)
    assert (seen[-1].skipped, seen[-1].clips, seen[-1].shards) == (6, 10, 4)
    assert seen[-1].bytes == sum(path.stat().st_size for path in (out / "shards").iterdir() if path not in kept)
    assert _content(out) == _content(whole)


def test_a_shard_that_changed_size_is_written_again_and_others_only_if_one_is_paranoid(
    source: MemorySource, whole: Path, tmp_path: Path
) -> None:
    for part in ("0/2", "1/2"):
        assert _part(source, tmp_path, part) is None
    short, flipped = tmp_path / "shards" / "train-000001.tar", tmp_path / "shards" / "train-000002.tar"
    os.truncate(short, 1000)
    content = bytearray(flipped.read_bytes())
    content[5000] ^= 1
    flipped.write_bytes(content)
    with pytest.raises(DataError, match="1 of 6 shards are not finished: train-000001"):
        merge(tmp_path)
    for part in ("0/2", "1/2"):
        shard_part(open_clips(source), tmp_path, ShardSettings(CLIPS_PER_SHARD), RunSettings(paranoid=True), part)
    merge(tmp_path)
    assert _content(tmp_path) == _content(whole)


def test_parts_and_a_merge_give_the_same_bytes_as_one_run(source: MemorySource, whole: Path, tmp_path: Path) -> None:
    for part in ("2/4", "0/4", "3/4"):
        assert _part(source, tmp_path, part) is None
    with pytest.raises(DataError, match=r"2 of 6 shards are not finished: train-00000[01]"):
        merge(tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    _part(source, tmp_path, "1/4")
    manifest = merge(tmp_path)
    assert _content(tmp_path) == _content(whole)
    assert merge(tmp_path) == manifest
    assert _part(source, tmp_path, "1/4") == manifest


def test_a_complete_data_set_is_left_as_it_is(source: MemorySource, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    seen: list[SharderStats] = []
    _make(source, whole, report=seen.append)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == before
    assert (seen[-1].skipped, seen[-1].clips) == (16, 0)
    with pytest.raises(DataError, match="holds a complete data set of another kind"):
        _make(source, whole, seed=1)


def test_damage_in_a_complete_data_set_is_said_not_hidden(source: MemorySource, tmp_path: Path) -> None:
    _make(source, tmp_path)
    path = tmp_path / "shards" / "heldout-000000.tar"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    _make(source, tmp_path)
    with pytest.raises(DataError, match=r"1 shards are damaged: heldout-000000.*--repair"):
        _make(source, tmp_path, paranoid=True)


@pytest.mark.parametrize(
    ("settings", "change", "expected"),
    [
        ({"seed": 1}, {}, "seed=1: the data set was begun with 0"),
        ({"dtype": "float32"}, {}, "dtype=float32: the data set was begun with keep"),
        ({}, {"stamp": "later"}, "1 clips have changed in the source"),
        ({}, {"key": "base/other"}, "1 clips are gone from the source"),
    ],
)
def test_changed_settings_and_sources_are_named(
    source: MemorySource, tmp_path: Path, settings: dict, change: dict, expected: str
) -> None:
    _part(source, tmp_path, "0/3")
    before = _content(tmp_path)
    other = changed(source, source.clips[0].key, **change)
    if "key" in change:
        other = replace(other, arrays={**source.arrays, "base/other": source.arrays[source.clips[0].key]})
    with pytest.raises(DataError) as caught:
        _make(other, tmp_path, **settings)
    assert expected in str(caught.value)
    assert _content(tmp_path) == before


def test_two_sharders_on_one_folder_are_told_of_each_other(source: MemorySource, tmp_path: Path) -> None:
    errors: list[str] = []

    def another(done: int, total: int) -> None:
        if done == 4:
            for attempt in (lambda: _make(source, tmp_path), lambda: _part(source, tmp_path, "0/2")):
                with pytest.raises(DataError) as caught:
                    attempt()
                errors.append(str(caught.value))
            with pytest.raises(DataError, match="is writing there"):
                merge(tmp_path)

    _make(source, tmp_path, progress=another)
    assert all(f"process {os.getpid()} on {os.uname().nodename} is writing there (part 0/1)" in text for text in errors)
    assert len(errors) == 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_one_shard_can_be_written_again_from_its_source(tmp_path: Path) -> None:
    features = write_features(tmp_path / "features", states=True)
    shard(features, tmp_path / "out", clips_per_shard=4)
    record = rebuild_shard(tmp_path / "out", "train-000002", tmp_path / "again", features)
    assert record == read_record(tmp_path / "out", "train-000002")
    expected = (tmp_path / "out/shards/train-000002.tar").read_bytes()
    assert (tmp_path / "again/shards/train-000002.tar").read_bytes() == expected
    assert read_plan(tmp_path / "out").source.path == str(features)
    with pytest.raises(DataError, match="has no record of it"):
        rebuild_shard(tmp_path / "out", "train-000099", tmp_path / "again", features)
    clip = record.clips[0].key
    (features / clip.split("-")[0] / f"{clip}.npz").unlink()
    with pytest.raises(DataError, match=f"1 of its clips are gone or have changed in .*{clip}"):
        rebuild_shard(tmp_path / "out", "train-000002", tmp_path / "again", features)


@pytest.mark.parametrize("kind", ["callable", "features"])
def test_a_data_set_cannot_choose_what_is_run_or_read_when_a_shard_is_made_again(tmp_path: Path, kind: str) -> None:
    features, canary, out = write_features(tmp_path / "features"), tmp_path / "canary", tmp_path / "out"
    shard(features, out, clips_per_shard=4)
    document = json.loads((out / "plan.json").read_text())
    options = {"argument": f"touch {canary}"} if kind == "callable" else {}
    document["source"] = {"kind": kind, "path": "os:system" if kind == "callable" else str(features), "settings": {}}
    document["source"]["settings"] = {"options": options, "provenance": {}, "partitions": [], "split": None}
    (out / "plan.json").write_text(json.dumps(document))
    given = features if kind == "callable" else None
    with pytest.raises(DataError, match=r"none is run because a data set says so|name the source yourself"):
        rebuild_shard(out, "train-000000", tmp_path / "again", given)
    (out / "shards" / "train-000000.tar").unlink()
    assert not verify(out, level="quick", repair=True, source=given).sound
    assert not canary.exists()


def test_a_source_that_has_moved_makes_a_shard_again(tmp_path: Path) -> None:
    features = write_features(tmp_path / "features")
    shard(features, tmp_path / "out", clips_per_shard=4)
    features.rename(tmp_path / "moved")
    (tmp_path / "out/shards/train-000000.tar").unlink()
    assert verify(tmp_path / "out", level="quick", repair=True, source=tmp_path / "moved").sound


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda plan: plan["shards"][0].update(name="../../../victim/results"), "is no name of a shard"),
        (lambda plan: plan["shards"][0].update(name="train-000000\n"), "is no name of a shard"),
        (lambda plan: plan.update(fields={"../x": plan["fields"]["features"]}), "is no field of a clip"),
        (lambda plan: plan["settings"].update(seed=9), "was changed after it was written"),
        (lambda plan: plan["clips"].pop(), "was changed after it was written"),
    ],
)
def test_a_plan_of_unknown_origin_names_no_other_files(
    source: MemorySource, tmp_path: Path, change: Callable[[dict], object], expected: str
) -> None:
    out, victim = tmp_path / "a" / "b" / "out", tmp_path / "a" / "victim" / "results.npz"
    _part(source, out, "0/2")
    victim.parent.mkdir()
    victim.write_text("mine")
    document = json.loads((out / "plan.json").read_text())
    change(document)
    (out / "plan.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=expected):
        merge(out)
    assert victim.read_text() == "mine"


def test_a_record_of_another_shard_or_of_files_elsewhere_is_none(source: MemorySource, tmp_path: Path) -> None:
    _make(source, tmp_path)
    path = tmp_path / "journal" / "train-000000.json"
    record = json.loads(path.read_text())
    for change in ({"name": "../x"}, {"files": {"../manifest.json": {"bytes": 1, "sha256": ""}}}):
        path.write_text(json.dumps(record | change))
        assert read_record(tmp_path, "train-000000") is None


def test_a_sampled_conversion_is_judged_by_the_same_tokens_when_a_shard_is_made_again(tmp_path: Path) -> None:
    features = write_features(tmp_path / "features")
    settings = ShardSettings(4, dtype="int8", statistics="sample")
    clips = open_clips(features)
    shard_part(clips, tmp_path / "out", settings, RunSettings())
    plan, work = plan_shards(clips, settings, RunSettings())
    assert any(clip.phase % 8 for some in work for clip in some)
    for number, each in enumerate(plan.shards):
        record = rebuild_shard(tmp_path / "out", each.name, tmp_path / "again", features)
        assert record == read_record(tmp_path / "out", each.name)
        assert [clip.phase for clip in record.clips] == [clip.phase for clip in work[number]]


def test_parts_made_with_different_limits_are_not_merged(tmp_path: Path) -> None:
    source = memory_source(8, dtype="float32", heldout=0)
    settings, parts = ShardSettings(4, dtype="int8"), (("0/2", 0.05), ("1/2", 0.2))
    for part, limit in parts:
        shard_part(open_clips(source), tmp_path, settings, RunSettings(max_error=limit), part)
    # What the strictest limit allows too may be merged.
    strict = tmp_path / "journal" / "train-000000.json"
    record = json.loads(strict.read_text())
    strict.write_text(json.dumps(record | {"max_error": record["worst_error"] / 2}))
    with pytest.raises(DataError, match="the parts were made with different limits"):
        merge(tmp_path)
    for part in ("0/2", "1/2"):
        shard_part(open_clips(source), tmp_path, settings, RunSettings(max_error=0.2), part)
    assert merge(tmp_path).num_clips == 8
