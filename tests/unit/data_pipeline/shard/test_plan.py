from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.order import mix64, uid
from data_pipeline.schema import ShardEntry
from data_pipeline.shard.journal import read_plan, write_plan
from data_pipeline.shard.plan import (
    ENTRY_BYTES,
    Plan,
    ShardSettings,
    SourceRecord,
    Work,
    differences,
    make_plan,
    part_of,
    payload_bytes,
)
from data_pipeline.sources.base import ArraySpec, Listing, SkippedClip, SourceClip, SourceProvenance
from tests.clip_sources import MemorySource, changed, memory_source

RECORD = SourceRecord("memory", None, {})


def _plan(source: MemorySource, *, on_error: str = "fail", **settings: object) -> tuple[Plan, Work]:
    made = ShardSettings(**settings)  # pyright: ignore[reportArgumentType]
    return make_plan(source.listing(), source.provenance, RECORD, made, on_error)  # pyright: ignore[reportArgumentType]


def _keys(work: Work) -> list[list[str]]:
    return [[each.clip.key for each in some] for some in work]


def _clips(keys: list[str], splits: list[str | None]) -> list[SourceClip]:
    arrays = {"features": ArraySpec("float16", (3, 4, 8)), "actions": ArraySpec("float32", (2, 2))}
    return [
        SourceClip(key, "all", split, arrays, key, key)  # pyright: ignore[reportArgumentType]
        for key, split in zip(keys, splits, strict=True)
    ]


@given(
    keys=st.lists(st.from_regex("[a-z0-9]{1,6}", fullmatch=True), min_size=1, max_size=40, unique=True),
    clips_per_shard=st.integers(1, 50),
    seed=st.integers(0, 1 << 40),
    parts=st.integers(1, 9),
    container=st.sampled_from(["tar", "zarr"]),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_every_clip_is_planned_once_and_every_shard_belongs_to_one_part(
    keys: list[str], clips_per_shard: int, seed: int, parts: int, container: str, data: st.DataObject
) -> None:
    splits = data.draw(st.lists(st.sampled_from(["train", "heldout", None]), min_size=len(keys), max_size=len(keys)))
    listing = Listing(_clips(keys, splits))
    made = ShardSettings(clips_per_shard, seed, format=container)  # pyright: ignore[reportArgumentType]
    plan, work = make_plan(listing, SourceProvenance(), RECORD, made)
    planned = [key for some in _keys(work) for key in some]
    assert sorted(planned) == sorted(keys)
    assert [key for key, _ in plan.clips] == planned
    assert [shard.num_clips for shard in plan.shards] == [len(some) for some in work]
    assert all(0 < len(some) <= clips_per_shard for some in work)
    order = [each.clip.split or "" for some in work for each in some]
    assert order == sorted(order, key=["train", "heldout"].index)
    numbers = [number for part in range(parts) for number in part_of(f"{part}/{parts}", len(work))]
    assert numbers == list(range(len(work)))


def test_the_order_inside_a_split_is_that_of_the_hashed_keys_whatever_the_source_order() -> None:
    source = memory_source(40, heldout=9)
    backwards = replace(source, clips=source.clips[::-1])
    plan, work = _plan(source, clips_per_shard=8, seed=3)
    assert _keys(_plan(backwards, clips_per_shard=8, seed=3)[1]) == _keys(work)
    train = [key for some in _keys(work)[:4] for key in some]
    hashes = mix64(np.array([uid(key) for key in train], np.uint64), 3)
    assert np.all(np.diff(hashes.astype(object)) > 0)
    names = [*(f"train-{number:06d}" for number in range(4)), "heldout-000000", "heldout-000001"]
    assert [shard.name for shard in plan.shards] == names


def test_the_digest_covers_all_that_decides_bytes_and_nothing_else() -> None:
    source = memory_source(12)
    plan, _ = _plan(source, clips_per_shard=4)
    key = source.clips[3].key
    others = [
        _plan(source, clips_per_shard=5),
        _plan(source, clips_per_shard=4, seed=1),
        _plan(source, clips_per_shard=4, dtype="int8"),
        _plan(source, clips_per_shard=4, statistics="sample"),
        _plan(source, clips_per_shard=4, format="zarr"),
        _plan(changed(source, key, stamp="later"), clips_per_shard=4),
        _plan(changed(source, key, split="heldout"), clips_per_shard=4),
        _plan(changed(source, key, partition="base"), clips_per_shard=4),
        _plan(changed(source, key, key="other"), clips_per_shard=4),
        _plan(replace(source, clips=source.clips[:-1]), clips_per_shard=4),
        _plan(replace(source, provenance=SourceProvenance(encoder="x")), clips_per_shard=4),
    ]
    assert len({plan.digest, *(other.digest for other, _ in others)}) == 1 + len(others)
    moved, _ = make_plan(
        Listing(source.clips, (SkippedClip("z", "z", "gone"),)),
        source.provenance,
        SourceRecord("memory", "/elsewhere", {}),
        ShardSettings(clips_per_shard=4),
        "skip",
    )
    assert moved.digest == plan.digest


def test_differences_name_settings_and_clips() -> None:
    source = memory_source(12)
    plan, _ = _plan(source, clips_per_shard=4)
    assert "clips_per_shard=5: the data set was begun with 4" in str(
        DataError(differences(plan, _plan(source, clips_per_shard=5)[0]))
    )
    known = replace(source, provenance=replace(source.provenance, encoder="vjepa2"))
    known = replace(known, clips=[replace(clip, partition="all") for clip in source.clips])
    text = str(DataError(differences(plan, _plan(known, clips_per_shard=4, dtype="int8")[0])))
    assert "source.provenance.encoder=vjepa2: it was unknown when the data set was begun" in text
    assert "source.partitions=all: it was base, ice when" in text
    assert "source.features" not in text
    key = source.clips[3].key
    later = replace(changed(source, key, stamp="later"), clips=[*changed(source, key, stamp="later").clips[:-1]])
    text = str(DataError(differences(plan, _plan(later, clips_per_shard=4)[0])))
    assert f"{key}: 1 clips have changed in the source" in text
    assert f"{source.clips[-1].key}: 1 clips are gone from the source" in text


def test_a_written_plan_is_read_back(tmp_path: Path) -> None:
    plan, _ = _plan(memory_source(12, dtype="float32"), clips_per_shard=4, dtype="int8")
    write_plan(tmp_path, plan)
    assert read_plan(tmp_path) == plan


def test_a_shard_holds_half_a_gibibyte_unless_told_otherwise() -> None:
    clips = _clips([f"c{number}" for number in range(600)], [None] * 600)
    arrays = {"features": ArraySpec("float32", (8, 256, 1024)), "actions": ArraySpec("float32", (7, 2))}
    large = Listing([replace(clip, arrays=arrays) for clip in clips])
    plan, _ = make_plan(large, SourceProvenance(), RECORD, ShardSettings(dtype="float16"))
    assert plan.settings.clips_per_shard == 127
    assert payload_bytes(plan, large.clips[:1]) == 8 * 256 * 1024 * 2 + 7 * 2 * 4
    assert plan.settings.statistics == "sample"
    assert plan.sample_every == 8
    small, _ = make_plan(Listing(clips), SourceProvenance(), RECORD, ShardSettings())
    assert small.settings.clips_per_shard == 256
    assert small.settings.statistics == "all"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"key": "a.b"}, "no dots"),
        ({"split": "test"}, "its split test is none of train, heldout"),
        ({"arrays": {"features": ArraySpec("float16", (4, 6, 16))}}, "it has no actions"),
        ({"features": ArraySpec("float16", (4, 6, 17))}, "its features are float16 [4, 6, 17]; base/clip_00000 has"),
        ({"features": ArraySpec("float16", (4, 96))}, "its features have shape [4, 96], not 3 axes"),
        ({"features": ArraySpec("float16", (1, 6, 16))}, "one frame has no transition"),
        (
            {"actions": ArraySpec("float32", (5, 2))},
            "its actions have 5 rows; 4 frames (action_alignment as-is) need 3",
        ),
        ({"states": ArraySpec("float32", (3, 3))}, "its states have 3 rows; 4 frames (action_alignment as-is) need 4"),
        ({"features_scale": ArraySpec("float32", (16,))}, "features_scale belongs to int8 features"),
        ({"rewards": ArraySpec("float32", (3, 1))}, "it has a field rewards"),
    ],
)
def test_clips_that_cannot_be_used_are_named_or_left_out(changes: dict, expected: str) -> None:
    source = memory_source(10)
    clip = source.clips[3]
    fields = {name: spec for name, spec in changes.items() if isinstance(spec, ArraySpec)}
    entry = {name: value for name, value in changes.items() if name not in fields}
    if fields:
        entry["arrays"] = {**clip.arrays, "features": ArraySpec("float16", (4, 6, 16)), **fields}
    damaged = changed(source, clip.key, **entry)
    with pytest.raises(DataError) as caught:
        _plan(damaged)
    assert expected in str(caught.value)
    plan, work = _plan(damaged, on_error="skip")
    assert plan.num_clips == 9
    assert clip.key not in [key for some in _keys(work) for key in some]
    assert expected in plan.bad[0].reason


@pytest.mark.parametrize("spec", [ArraySpec("float64", (16,)), ArraySpec("float32", (15,))])
def test_the_scale_of_int8_is_one_single_precision_number_a_channel(spec: ArraySpec) -> None:
    source = memory_source(4, dtype="int8")
    clip = source.clips[1]
    with pytest.raises(DataError, match="not float32 with one number a channel"):
        _plan(changed(source, clip.key, arrays={**clip.arrays, "features_scale": spec}))


def test_what_no_choice_can_mend_is_refused_even_if_clips_may_be_left_out() -> None:
    source = memory_source(4)
    twice = replace(source, clips=[*source.clips, source.clips[0]])
    with pytest.raises(DataError, match="two clips have this key"):
        _plan(twice, on_error="skip")
    with pytest.raises(DataError, match="lists no clips that can be used: gone"):
        _plan(replace(source, clips=[], bad=(SkippedClip("a", "a", "gone"),)), on_error="skip")
    with pytest.raises(DataError, match=r"clip a: gone\. Fix: correct the settings that say how the source is read"):
        _plan(replace(source, clips=[], bad=(SkippedClip("a", "a", "gone"),)))
    grid = replace(source, provenance=SourceProvenance(grid=(2, 2)))
    with pytest.raises(DataError, match=r"grid=\[2, 2\]: a frame of the source has 6 tokens"):
        _plan(grid)


@pytest.mark.parametrize("dtype", ["float64", "int16", "uint8"])
def test_types_that_cannot_be_kept_are_refused_with_the_fix(dtype: str) -> None:
    with pytest.raises(DataError, match=r"cannot be stored as they are\. Fix: set dtype=float32"):
        _plan(memory_source(4, dtype=dtype))
    assert _plan(memory_source(4, dtype=dtype), dtype="float16")[0].fields["features"].stored == "float16"


@pytest.mark.parametrize("part", ["", "1", "1/1", "-1/2", "a/b", "4/4", "0/0", "1/2/3"])
def test_a_part_has_a_number_below_their_count(part: str) -> None:
    with pytest.raises(DataError, match="i from 0 to n - 1"):
        part_of(part, 10)


def test_settings_are_checked_together() -> None:
    with pytest.raises(DataError) as caught:
        ShardSettings(-1, -2, "float61", "some", "rar")  # pyright: ignore[reportArgumentType]
    assert len(caught.value.problems) == 5
    assert "did you mean float16?" in str(caught.value)


def test_more_shards_than_a_manifest_can_list_are_refused_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(json.dumps(asdict(ShardEntry("heldout-000000000000.tar", 1 << 61, 1 << 31, "0" * 64)), indent=3)) + 8 < (
        ENTRY_BYTES
    )
    monkeypatch.setattr("data_pipeline.shard.plan._ENTRIES_BYTES", 10 * ENTRY_BYTES)
    assert len(_plan(memory_source(20, heldout=0), clips_per_shard=2)[0].shards) == 10
    with pytest.raises(DataError, match=r"clips_per_shard=1: 20 clips make 20 files.*clips_per_shard to 2 or more"):
        _plan(memory_source(20, heldout=0), clips_per_shard=1)
