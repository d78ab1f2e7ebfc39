"""Partition and split of every clip: as the source says, or by rules over the clips' keys."""

from __future__ import annotations

import fnmatch
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_pipeline.errors import DataError, Problem, nearest
from data_pipeline.order import mix64, uid
from data_pipeline.sources.base import Listing, SourceClip

DEFAULT_PARTITION = "all"
PARTITION_RULE = "letters, digits, _, - and dots, at most 80, no dot in front"
SPLIT_RULES = ("heldout", "heldout_last")

_PARTITION = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,79}")
_DIGITS = re.compile(r"([0-9]+)")
_NUMBERS = re.compile(r"[0-9]*\.\.[0-9]*")
_HELDOUT_WORD = uid("heldout")
_MAX_NAMED = 5
_MAX_RULE = 1000


def is_valid_partition(name: str) -> bool:
    """Return whether `name` may name a partition."""
    return _PARTITION.fullmatch(name) is not None


def natural(key: str) -> tuple[str | int, ...]:
    """Return what keys are sorted by, digits as numbers: `clip_9` comes before `clip_00010`."""
    # Splitting at digits alternates text and numbers, so that the same kind is compared at each place.
    return tuple(int(part) if place % 2 else part for place, part in enumerate(_DIGITS.split(key)))


@dataclass(frozen=True)
class PartitionRule:
    """Which keys belong to a partition: a range, or a shell pattern.

    Attributes:
        name: Of the partition.
        text: As the user wrote it, after the equals sign: `FIRST..END` without END itself, or a pattern such as `a*`.
            Ends that are plain numbers are compared with the last number of a key, others in natural order.
    """

    name: str
    text: str

    def matches(self, key: str) -> bool:
        """Return whether a key belongs to the partition."""
        if ".." not in self.text:
            return fnmatch.fnmatchcase(key, self.text)
        first, end = self.text.split("..", 1)
        if _NUMBERS.fullmatch(self.text):
            numbers = _DIGITS.findall(key)
            return bool(numbers) and int(first or 0) <= int(numbers[-1]) < (int(end) if end else math.inf)
        place = natural(key)
        return (not first or natural(first) <= place) and (not end or place < natural(end))


def partition_rule(text: str) -> PartitionRule:
    """Return the rule that a user wrote as `NAME=FIRST..END` or `NAME=PATTERN`.

    Raises:
        DataError: It has another form.
    """
    name, equals, rule = text.partition("=")
    fix = "write e.g. base=clip_00000..clip_05000, base=0..5000 or ice=ice_*"
    if not equals or not rule or rule == ".." or rule.count("..") > 1 or len(text) > _MAX_RULE:
        raise DataError(Problem("partition", text, "must be NAME=FIRST..END or NAME=PATTERN", fix))
    if not is_valid_partition(name):
        raise DataError(Problem("partition", text, f"the name of a partition has {PARTITION_RULE}", fix))
    if ".." in rule:
        first, end = rule.split("..")
        if first and end and not natural(first) < natural(end):
            raise DataError(Problem("partition", text, "the range is empty: its end is left out", fix))
    return PartitionRule(name, rule)


@dataclass(frozen=True)
class Labels:
    """How clips get a partition and a split.

    Attributes:
        partitions: Rules; a clip must match exactly one. Without any, clips have the source's own partition, or all of
            them `all`.
        heldout: Share of each partition's clips that are held out, chosen by the hash of their keys.
        heldout_last: Share of each partition's clips that are held out, from the end in natural order of the keys.
    """

    partitions: tuple[PartitionRule, ...] = ()
    heldout: float | None = None
    heldout_last: float | None = None

    def apply(self, listing: Listing) -> Listing:
        """Return the listing with the partition of every clip, and the splits that follow from the rules.

        Raises:
            DataError: Clips of no partition or of two, a rule without a clip, or rules for what the source itself says.
        """
        clips = self._split(self._partitioned(listing))
        return Listing(clips, listing.bad)

    def _partitioned(self, listing: Listing) -> list[SourceClip]:
        clips = listing.clips
        own = [clip for clip in clips if clip.partition]
        if not self.partitions:
            if own and len(own) < len(clips):
                unnamed = [clip.key for clip in clips if not clip.partition]
                rule = f"{_some(unnamed)} have no partition, while {len(own)} others have one"
                raise DataError(Problem("partition", None, rule, "name the partition of every clip, or of none"))
            return list(own) if own else [replace(clip, partition=DEFAULT_PARTITION) for clip in clips]
        if own:
            rule = f"the source itself names the partitions of {len(own)} clips, e.g. {own[0].partition}"
            raise DataError(Problem("partition", self.partitions[0].text, rule, "leave the rules out"))
        matches = {clip.key: [rule for rule in self.partitions if rule.matches(clip.key)] for clip in clips}
        problems = self._rule_problems(listing, matches)
        if problems:
            raise DataError(problems)
        return [replace(clip, partition=matches[clip.key][0].name) for clip in clips]

    def _rule_problems(self, listing: Listing, matches: dict[str, list[PartitionRule]]) -> list[Problem]:
        problems = []
        texts = {rule: f"{rule.name}={rule.text}" for rule in self.partitions}
        several = [key for key, rules in matches.items() if len(rules) > 1]
        if several:
            rules = " and ".join(texts[rule] for rule in matches[several[0]])
            rule = f"{len(several)} clips belong to two partitions, e.g. {several[0]} to {rules}"
            problems.append(Problem("partition", rules, rule, "let no two rules overlap"))
        if missed := [key for key, rules in matches.items() if not rules]:
            rule = f"{_some(missed)} belong to no partition"
            problems.append(Problem("partition", ", ".join(texts.values()), rule, "add a rule for them"))
        used = {rule for rules in matches.values() for rule in rules}
        for rule in self.partitions:
            # A rule whose clips are all bad is not at fault.
            if rule not in used and not any(rule.matches(skipped.key) for skipped in listing.bad):
                fix = f"the first key is {listing.clips[0].key}" if listing.clips else "correct the rule"
                problems.append(Problem("partition", texts[rule], "no clip's key fits the rule", fix))
        return problems

    def _split(self, clips: list[SourceClip]) -> list[SourceClip]:
        share = self.heldout if self.heldout_last is None else self.heldout_last
        if share is None:
            return clips
        own = sum(clip.split is not None for clip in clips)
        if own:
            rule = f"the source itself says the split of {own} of {len(clips)} clips"
            raise DataError(Problem("split", share, rule, "leave the rule out"))
        by_partition: dict[str, list[str]] = {}
        for clip in clips:
            by_partition.setdefault(clip.partition, []).append(clip.key)
        heldout: set[str] = set()
        for keys in by_partition.values():
            ranked = _by_hash(keys) if self.heldout_last is None else sorted(keys, key=natural, reverse=True)
            heldout.update(ranked[: num_heldout(len(keys), share)])
        return [replace(clip, split="heldout" if clip.key in heldout else "train") for clip in clips]


def num_heldout(num_clips: int, share: float) -> int:
    """Return how many of a partition's clips are held out: the nearest whole number, and both splits get at least one.

    Args:
        num_clips: Clips of the partition; of a single one, none is held out.
        share: Wanted share, between 0 and 1.
    """
    return min(max(int(num_clips * share + 0.5), 1), num_clips - 1)


def labels(partitions: Sequence[str] = (), split: str | None = None) -> Labels:
    """Return the rules that a user wrote.

    Args:
        partitions: As for `partition_rule`.
        split: `heldout=SHARE` or `heldout_last=SHARE`, or None for none.

    Raises:
        DataError: A rule has another form, or is given twice.
    """
    for text in partitions:
        if not isinstance(text, str):
            fix = "write rules such as base=0..5000 or ice=ice_*"
            raise DataError(Problem("partition", str(text)[:80], "a rule is a text", fix))
    repeated = [text for text, count in Counter(partitions).items() if count > 1]
    if repeated:
        raise DataError(Problem("partition", repeated[0], "the same rule is given twice", "give it once"))
    rules = tuple(partition_rule(text) for text in partitions)
    if split is None:
        return Labels(rules)
    name, _, text = split.partition("=")
    if name not in SPLIT_RULES:
        fix = f"write e.g. heldout=0.1; {nearest(name, SPLIT_RULES)}"
        raise DataError(Problem("split", split, "unknown rule", fix))
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise DataError(Problem("split", split, "the share must lie between 0 and 1", f"write e.g. {name}=0.1"))
    return Labels(rules, **{name: share})


def _by_hash(keys: Sequence[str]) -> list[str]:
    ordered = sorted(keys)
    hashes = mix64(np.array([uid(key) for key in ordered], np.uint64), _HELDOUT_WORD)
    return [ordered[place] for place in np.argsort(hashes, kind="stable")]


def _some(keys: Sequence[str]) -> str:
    return f"{len(keys)} clips, e.g. {', '.join(keys[:_MAX_NAMED])},"
