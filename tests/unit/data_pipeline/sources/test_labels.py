from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.sources.base import ArraySpec, Listing, SkippedClip, SourceClip
from data_pipeline.sources.labels import PartitionRule, labels, natural, num_heldout

SPECS = {"features": ArraySpec("float16", (4, 6, 8)), "actions": ArraySpec("float32", (3, 2))}


def listing(*keys: str, partition: str = "", split: str | None = None, bad: tuple[str, ...] = ()) -> Listing:
    skipped = [SkippedClip(key, key, "bad") for key in bad]
    return Listing([SourceClip(key, partition, split, SPECS, "", key) for key in keys], skipped)  # pyright: ignore


def thesis_keys(count: int) -> list[str]:
    return [f"clip_{number:05d}" for number in range(count)]


def partitions_of(found: Listing) -> dict[str, str]:
    return {clip.key: clip.partition for clip in found.clips}


def test_without_rules_clips_have_their_own_partition_or_all_of_them_the_same() -> None:
    assert set(partitions_of(labels().apply(listing("a", "b"))).values()) == {"all"}
    assert set(partitions_of(labels().apply(listing("a", "b", partition="ice"))).values()) == {"ice"}
    mixed = Listing([*listing("a", partition="ice").clips, *listing("b", "c").clips])
    with pytest.raises(DataError, match=r"2 clips, e.g. b, c, have no partition, while 1 others have one"):
        labels().apply(mixed)


@pytest.mark.parametrize(
    "rules",
    [
        ("base=clip_00000..clip_00050", "one=clip_00050..clip_00060", "two=clip_00060.."),
        ("base=0..50", "one=50..60", "two=60.."),
        ("base=..50", "one=clip_50..clip_60", "two=clip_60..clip_9999"),
        ("base=clip_000[0-4]?", "one=clip_0005?", "two=clip_000[6-9]?"),
    ],
)
def test_ranges_by_number_and_patterns_say_the_same(rules: tuple[str, ...]) -> None:
    found = labels(rules).apply(listing(*thesis_keys(100)))
    assert Counter(partitions_of(found).values()) == {"base": 50, "one": 10, "two": 40}
    assert partitions_of(found)["clip_00050"] == "one"


@settings(max_examples=100, deadline=None)
@given(first=st.integers(0, 120), end=st.integers(0, 120), width=st.integers(1, 6))
def test_a_range_takes_its_first_key_and_not_its_end_however_wide_numbers_are(first: int, end: int, width: int) -> None:
    rule = PartitionRule("base", f"clip_{first:0{width}d}..clip_{end}")
    assert [number for number in range(120) if rule.matches(f"clip_{number:05d}")] == list(range(first, min(end, 120)))
    assert rule.matches("clip_00007") == PartitionRule("base", f"{first}..{end}").matches("clip_00007")


@given(st.lists(st.tuples(st.text("abz", max_size=3), st.integers(0, 200)), max_size=20))
def test_natural_order_sorts_numbers_as_numbers(pairs: list[tuple[str, int]]) -> None:
    ordered = sorted((f"{text}_{number}" for text, number in pairs), key=natural)
    assert ordered == [f"{text}_{number}" for text, number in sorted(pairs, key=lambda pair: (f"{pair[0]}_", pair[1]))]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (("a=0..6", "b=5..10"), "1 clips belong to two partitions, e.g. clip_00005 to a=0..6 and b=5..10"),
        (("a=0..6",), "4 clips, e.g. clip_00006, clip_00007, clip_00008, clip_00009, belong to no partition"),
        (("a=0..10", "b=10..20"), "partition=b=10..20: no clip's key fits the rule"),
        (("a=*", "b=x*"), "partition=b=x*: no clip's key fits the rule"),
    ],
)
def test_rules_that_do_not_cover_every_clip_once_are_refused(rules: tuple[str, ...], expected: str) -> None:
    with pytest.raises(DataError) as caught:
        labels(rules).apply(listing(*thesis_keys(10)))
    assert expected in str(caught.value)


def test_a_rule_whose_clips_are_all_bad_is_not_to_blame() -> None:
    found = labels(("a=0..10", "b=10..20")).apply(listing(*thesis_keys(10), bad=("clip_00010",)))
    assert set(partitions_of(found).values()) == {"a"}


def test_rules_beside_what_the_source_says_are_refused() -> None:
    with pytest.raises(DataError, match=r"the source itself names the partitions of 2 clips, e.g. ice"):
        labels(("a=*",)).apply(listing("x", "y", partition="ice"))
    with pytest.raises(DataError, match="the source itself says the split of 2 of 2 clips"):
        labels((), "heldout=0.1").apply(listing("x", "y", split="train"))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("base", "must be NAME=FIRST..END or NAME=PATTERN"),
        ("base=", "must be NAME="),
        ("base=..", "must be NAME="),
        ("base=1..2..3", "must be NAME="),
        ("base=x" + "y" * 1000, "must be NAME="),
        ("../up=1..2", "the name of a partition has letters"),
        ("=a*", "the name of a partition has letters"),
        ("base=clip_9..clip_00009", "the range is empty"),
        ("base=5..4", "the range is empty"),
    ],
)
def test_a_partition_rule_of_another_form_is_refused(rule: str, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        labels((rule,))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "split", ["held=0.1", "heldout", "heldout=", "heldout=0", "heldout=1", "heldout=nan", "heldout_last=2"]
)
def test_a_split_rule_of_another_form_is_refused(split: str) -> None:
    with pytest.raises(DataError):
        labels((), split)


@settings(max_examples=100, deadline=None)
@given(num_clips=st.integers(0, 400), share=st.floats(0.001, 0.999))
def test_both_splits_get_clips_and_the_share_is_met_to_the_nearest(num_clips: int, share: float) -> None:
    count = num_heldout(num_clips, share)
    assert abs(count - num_clips * share) <= 1
    assert (1 <= count < num_clips) if num_clips > 1 else count <= 0


@pytest.mark.parametrize("split", ["heldout=0.2", "heldout_last=0.2"])
def test_the_share_is_held_out_of_every_partition(split: str) -> None:
    found = labels(("a=0..50", "b=50..60"), split).apply(listing(*thesis_keys(60)))
    heldout = Counter(clip.partition for clip in found.clips if clip.split == "heldout")
    assert heldout == {"a": 10, "b": 2}
    assert {clip.split for clip in found.clips} == {"train", "heldout"}


def test_the_last_share_is_the_last_in_natural_order() -> None:
    keys = [f"clip_{number}" for number in range(20)]
    found = labels((), "heldout_last=0.25").apply(listing(*reversed(keys)))
    assert {clip.key for clip in found.clips if clip.split == "heldout"} == set(keys[15:])


def test_the_hashed_share_depends_on_keys_alone() -> None:
    keys = thesis_keys(40)
    rule = labels((), "heldout=0.1")
    held = {clip.key for clip in rule.apply(listing(*keys)).clips if clip.split == "heldout"}
    again = {clip.key for clip in rule.apply(listing(*reversed(keys))).clips if clip.split == "heldout"}
    # Guards against a change of the hash: a data set made again keeps its split.
    assert held == again == {"clip_00018", "clip_00020", "clip_00034", "clip_00038"}
