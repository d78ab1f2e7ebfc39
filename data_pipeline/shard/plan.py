"""What a run of the sharder will write: which clip into which shard, decided before the first payload is read."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from data_pipeline.alignment import ActionAlignment, rows_needed
from data_pipeline.checksum import ChecksumName, best_checksum
from data_pipeline.dataset.manifest import MAX_MANIFEST
from data_pipeline.dtypes import SCALED, STORED_TYPES
from data_pipeline.errors import DataError, Problem, nearest
from data_pipeline.order import ceil_div, mix64, uid
from data_pipeline.parts import parse_part
from data_pipeline.schema import FIELDS, SPLITS, Provenance, StoredName, row_shape
from data_pipeline.shard.convert import FEATURE_TYPES, INTEGERS, FeatureType
from data_pipeline.shard.statistics import SAMPLE_EVERY, phases
from data_pipeline.shard.tar import KEY_RULE, is_valid_key
from data_pipeline.sources.base import Listing, SkippedClip, SourceClip, SourceProvenance
from data_pipeline.sources.provenance import likely_grid

SKIP_OR_REPAIR = "repair the clip, or leave such clips out with on_error=skip"
_HOW_TO_READ = "correct the settings that say how the source is read, source.OPTION and provenance.ENTRY, or the source"
PLAN_FORMAT = 3
"""Of plan.json and of the journal beside it."""

SHARD_VERSION = 2
"""Counted up when the same plan would give other bytes."""

SHARD_BYTES = 512 << 20
MAX_CLIPS_PER_SHARD = 256
SMALL_SOURCE = 256 << 20

StatisticsMode = Literal["auto", "all", "sample"]
Container = Literal["tar", "zarr"]
OnError = Literal["fail", "skip"]
SHARD_STEM = re.compile(r"(train|heldout|clips)-[0-9]{6,12}")
"""Names of shards, without a suffix."""

ENTRY_BYTES = 192
"""Most bytes that one shard takes in manifest.json."""

_ENTRIES_BYTES = MAX_MANIFEST - (16 << 20)
_MAX_SHOWN = 20
_MAX_PARTITIONS = 1 << 15


@dataclass(frozen=True)
class ShardSettings:
    """What decides the bytes of a data set beside its source.

    Attributes:
        clips_per_shard: Clips in each shard but the last one of a split; 0 takes as many as fill half a GiB, at most
            256.
        seed: Of the shuffle before sharding.
        dtype: Type that features are stored as.
        statistics: all takes every training token, sample one of eight; auto takes all below 256 MiB of features.
        format: tar for training, zarr for analysis.
    """

    clips_per_shard: int = 0
    seed: int = 0
    dtype: FeatureType = "keep"
    statistics: StatisticsMode = "auto"
    format: Container = "tar"

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            DataError: Names all that are wrong.
        """
        problems = []
        if self.clips_per_shard < 0:
            problems.append(
                Problem("clips_per_shard", self.clips_per_shard, "must be at least 1", "use 0 to let the size decide")
            )
        if self.seed < 0:
            problems.append(Problem("seed", self.seed, "must not be negative", "use 0"))
        choices = {"dtype": FEATURE_TYPES, "statistics": get_args(StatisticsMode), "format": get_args(Container)}
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                problems.append(Problem(name, getattr(self, name), "unknown", nearest(str(getattr(self, name)), valid)))
        if problems:
            raise DataError(problems)


@dataclass(frozen=True)
class SourceRecord:
    """How to open the source again.

    Attributes:
        kind: Its layout.
        path: Where it is, absolute; None for a source that has no place on disk.
        settings: What else `sources.open.open_source` was told.
    """

    kind: str
    path: str | None
    settings: dict[str, Any]


@dataclass(frozen=True)
class PlannedField:
    """One field of every clip.

    Attributes:
        source: Its type in the source.
        stored: Its type in the shards.
        shape: Without the axis of frames or rows: features `[N, E]`, others `[width]`.
    """

    source: str
    stored: StoredName
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PlannedShard:
    """One shard: its name, without a suffix, and the number of its clips."""

    name: str
    num_clips: int


@dataclass(frozen=True)
class Plan:
    """The content of plan.json, whose presence without manifest.json means that a data set is not finished.

    Attributes:
        format: Version of this layout.
        digest: sha256 over all of the below that decides bytes.
        source: What is read.
        settings: As asked for, with 0 and auto resolved.
        provenance: For the manifest.
        action_alignment: How recorded actions become one per transition.
        checksum: Of the fields.
        frames: Stored frames of the longest clip.
        rows: Recorded rows of actions of the clip with most.
        fields: By name.
        partitions: Names, in the order of the manifest.
        sample_every: Statistics take one of so many (frame, token) pairs.
        bad: Clips that were left out when the plan was made.
        shards: In the order of the index.
        clips: Keys in that order, each with a digest of all that is known of the clip before it is read.
    """

    format: int
    digest: str
    source: SourceRecord
    settings: ShardSettings
    provenance: Provenance
    action_alignment: ActionAlignment
    checksum: ChecksumName
    frames: int
    rows: int
    fields: dict[str, PlannedField]
    partitions: tuple[str, ...]
    sample_every: int
    bad: tuple[SkippedClip, ...]
    shards: tuple[PlannedShard, ...]
    clips: tuple[tuple[str, str], ...]

    @property
    def num_clips(self) -> int:
        """Clips that are to be written."""
        return len(self.clips)


class PlannedClip(NamedTuple):
    """A clip on its way into a shard."""

    clip: SourceClip
    """Its split is never None."""
    partition: int
    phase: int
    """Frames of its split's clips whose keys sort before its own, for the sample of the statistics."""


Work = tuple[tuple[PlannedClip, ...], ...]
"""The clips of each shard."""


def make_plan(
    listing: Listing,
    provenance: SourceProvenance,
    source: SourceRecord,
    settings: ShardSettings,
    on_error: OnError = "fail",
) -> tuple[Plan, Work]:
    """Decide which clip goes where.

    Each split is sorted by key, shuffled by `seed` and cut into shards, training shards first; zarr has shards that run
    over both. Clips whose source names no split are training clips.

    Args:
        listing: Of the source.
        provenance: Of the source, as it is after the listing.
        source: For plan.json.
        settings: What to make of it.
        on_error: skip leaves clips out that cannot be used, fail refuses the source.

    Raises:
        DataError: Names every clip that cannot be used (up to 20), or settings that do not fit.
    """
    clips, bad = _usable(listing, provenance.action_alignment)
    if bad and on_error == "fail":
        # Where no clip at all can be used, rather the settings are wrong than each of them.
        fix = SKIP_OR_REPAIR if clips else _HOW_TO_READ
        problems = [Problem("source", f"clip {clip.key}", clip.reason, fix) for clip in bad]
        more = [Problem("source", source.path, f"{len(bad)} clips in all cannot be used", fix)]
        raise DataError(problems if len(bad) <= _MAX_SHOWN else problems[: _MAX_SHOWN - 1] + more)
    if not clips:
        rule = f"lists no clips that can be used{f': {bad[0].reason}' if bad else ''}"
        raise DataError(Problem("source", source.path, rule, _HOW_TO_READ if bad else "name another source"))
    fields = _fields(clips[0], settings.dtype)
    settings = _resolved(settings, clips, fields)
    names, ordered = _shards(clips, settings)
    _check_size(len(names) * (1 if settings.format == "tar" else len(fields)), len(clips), settings)
    partitions = tuple(dict.fromkeys(clip.partition for clip in clips))
    if len(partitions) > _MAX_PARTITIONS:
        raise DataError(Problem("source", len(partitions), f"has more than {_MAX_PARTITIONS} partitions", "merge some"))
    before = phases((clip.key, clip.split or "train", clip.length) for clip in clips)
    number = {name: row for row, name in enumerate(partitions)}
    work = tuple(
        tuple(PlannedClip(clip, number[clip.partition], before[clip.key]) for clip in some) for some in ordered
    )
    plan = Plan(
        format=PLAN_FORMAT,
        digest="",
        source=source,
        settings=settings,
        provenance=_provenance(provenance, source.kind, fields["features"].shape[0]),
        action_alignment=provenance.action_alignment,
        checksum=best_checksum(),
        frames=max(clip.length for clip in clips),
        rows=max(clip.arrays["actions"].shape[0] for clip in clips),
        fields=fields,
        partitions=partitions,
        sample_every=1 if settings.statistics == "all" else SAMPLE_EVERY,
        bad=tuple(bad),
        shards=tuple(PlannedShard(name, len(some)) for name, some in zip(names, work, strict=True)),
        clips=tuple((each.clip.key, clip_digest(each.clip)) for some in work for each in some),
    )
    return replace(plan, digest=plan_digest(plan)), work


def clip_digest(clip: SourceClip) -> str:
    """Return 16 hex digits over key, labels, types, shapes and stamp of a clip."""
    arrays = {name: [spec.dtype, list(spec.shape)] for name, spec in sorted(clip.arrays.items())}
    text = json.dumps([clip.key, clip.partition, clip.split, arrays, clip.stamp])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def differences(old: Plan, new: Plan) -> list[Problem]:
    """Return what makes two plans differ: settings first, then clips that were added, removed or changed."""
    fix = "run it as before, or write to another folder"
    problems = []
    for name, before in {**asdict(old.settings), "checksum": old.checksum}.items():
        after = new.checksum if name == "checksum" else getattr(new.settings, name)
        if before != after:
            problems.append(Problem(name, after, f"the data set was begun with {before}", fix))
    before, after = _known_of_source(old), _known_of_source(new)
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            rule = f"it was {before.get(name)} when the data set was begun"
            problems.append(Problem(f"source.{name}", after.get(name), rule, fix))
    fix = "put the source back as it was, or remove the unfinished data set and start again"
    was, now = dict(old.clips), dict(new.clips)
    for what, keys in {
        "are new in the source": [key for key in now if key not in was],
        "are gone from the source": [key for key in was if key not in now],
        "have changed in the source": [key for key in now if was.get(key, now[key]) != now[key]],
    }.items():
        if keys:
            rule = f"{len(keys)} clips {what} since the data set was begun"
            problems.append(Problem("source", f"{', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}", rule, fix))
    rule = "the data set was begun by another release"
    return problems or [Problem("plan", old.digest, rule, "remove the unfinished data set and start again")]


def _known_of_source(plan: Plan) -> dict[str, str]:
    """Return what a plan says of its source as a whole, as texts."""
    known = {f"provenance.{name}": str(value) for name, value in asdict(plan.provenance).items()}
    known |= {"action_alignment": plan.action_alignment, "partitions": ", ".join(plan.partitions)}
    # Fields that sharding adds are no matter of the source.
    return known | {name: f"{field.source} {list(field.shape)}" for name, field in plan.fields.items() if field.source}


def part_of(part: str, num_shards: int) -> range:
    """Return the numbers of the shards that belong to a part.

    Args:
        part: See `parse_part`.
        num_shards: Shards of the whole plan.

    Raises:
        DataError: It has another form.
    """
    number, parts = parse_part(part, "machines")
    return range(number * num_shards // parts, (number + 1) * num_shards // parts)


def payload_bytes(plan: Plan, clips: Iterable[SourceClip]) -> int:
    """Return the bytes of the stored values of some clips, without headers."""
    return sum(_stored_bytes(clip, plan.fields) for clip in clips)


def _usable(listing: Listing, alignment: ActionAlignment) -> tuple[list[SourceClip], list[SkippedClip]]:
    bad = list(listing.bad)
    counts = Counter(clip.key for clip in listing.clips)
    if repeated := [key for key, count in counts.items() if count > 1]:
        fix = "rename one of them"
        raise DataError([Problem("source.key", key, "two clips have this key", fix) for key in repeated[:_MAX_SHOWN]])
    usable: list[SourceClip] = []
    for clip in listing.clips:
        problem = _problem(clip, usable[0] if usable else clip, alignment)
        if problem:
            bad.append(SkippedClip(clip.key, clip.where, problem))
        else:
            usable.append(replace(clip, split=clip.split or "train"))
    return usable, bad


def _problem(clip: SourceClip, like: SourceClip, alignment: ActionAlignment) -> str:
    """Return what is wrong with a clip, or an empty text."""
    if not is_valid_key(clip.key):
        return f"a key has {KEY_RULE}"
    if clip.split not in (*SPLITS, None):
        return f"its split {clip.split} is none of {', '.join(SPLITS)}"
    if missing := [name for name in ("features", "actions") if name not in clip.arrays]:
        return f"it has no {missing[0]}"
    if unknown := [name for name in clip.arrays if name not in FIELDS]:
        return f"it has a field {unknown[0]}; {nearest(unknown[0], FIELDS)}"
    shapes = {name: spec.shape for name, spec in clip.arrays.items()}
    for name, shape in shapes.items():
        axes = {"features": 3, "features_scale": 1}.get(name, 2)
        if len(shape) != axes or 0 in shape:
            return f"its {name} have shape {list(shape)}, not {axes} axes with at least one entry each"
    frames = clip.length
    if frames < 2:
        return "one frame has no transition to learn"
    least, most = rows_needed(alignment, frames)
    rows = {"actions": (least, most), "states": (frames, frames), "extrinsics": (frames - 1, frames - 1)}
    for name, (low, high) in rows.items():
        if name in shapes and not (low <= shapes[name][0] and (high is None or shapes[name][0] <= high)):
            wanted = f"{low}" if low == high else f"at least {low}"
            return (
                f"its {name} have {shapes[name][0]} rows; {frames} frames (action_alignment {alignment}) need {wanted}"
            )
    if (clip.arrays["features"].dtype == SCALED) != ("features_scale" in shapes):
        return "features_scale belongs to int8 features and to no others"
    scale = clip.arrays.get("features_scale")
    if scale is not None and (scale.dtype, scale.shape) != ("float32", shapes["features"][2:]):
        return f"its features_scale is {scale.dtype} {list(scale.shape)}, not float32 with one number a channel"
    return _disagreement(clip, like)


def _disagreement(clip: SourceClip, like: SourceClip) -> str:
    if clip.arrays.keys() != like.arrays.keys():
        return f"it has the fields {', '.join(sorted(clip.arrays))}; {like.key} has {', '.join(sorted(like.arrays))}"
    for name, spec in clip.arrays.items():
        other = like.arrays[name]
        widths = (spec.shape[1:], other.shape[1:])
        if spec.dtype != other.dtype or (name != "features_scale" and widths[0] != widths[1]):
            return f"its {name} are {spec.dtype} {list(spec.shape)}; {like.key} has {other.dtype} {list(other.shape)}"
    return ""


def _fields(clip: SourceClip, dtype: FeatureType) -> dict[str, PlannedField]:
    """Return every field as it will be stored; small ones are always f32."""
    fields: dict[str, PlannedField] = {}
    for name, spec in sorted(clip.arrays.items()):
        stored: Any = "float32"
        if name == "features_scale" and dtype not in ("keep", SCALED):
            continue
        if name == "features":
            stored = spec.dtype if dtype == "keep" else dtype
            if stored not in STORED_TYPES:
                kind = "integers" if spec.dtype in INTEGERS else spec.dtype
                rule = f"the features are {spec.dtype}, and {kind} cannot be stored as they are"
                raise DataError(Problem("dtype", dtype, rule, "set dtype=float32, or float16 for half the size"))
        fields[name] = PlannedField(spec.dtype, stored, row_shape(name, spec.shape))
    if dtype == SCALED and "features_scale" not in fields:
        fields["features_scale"] = PlannedField("", "float32", (fields["features"].shape[1],))
    return dict(sorted(fields.items()))


def _stored_bytes(clip: SourceClip, fields: Mapping[str, PlannedField]) -> int:
    total = 0
    for name, planned in fields.items():
        rows = 1 if name == "features_scale" else clip.arrays[name].shape[0]
        total += rows * math.prod(planned.shape) * STORED_TYPES[planned.stored].itemsize
    return total


def _resolved(
    settings: ShardSettings, clips: Sequence[SourceClip], fields: Mapping[str, PlannedField]
) -> ShardSettings:
    largest = max(_stored_bytes(clip, fields) for clip in clips)
    fitting = min(max(SHARD_BYTES // largest, 1), MAX_CLIPS_PER_SHARD)
    if settings.statistics == "auto":
        total = sum(_stored_bytes(clip, fields) for clip in clips)
        settings = replace(settings, statistics="all" if total < SMALL_SOURCE else "sample")
    return replace(settings, clips_per_shard=settings.clips_per_shard or fitting)


def _shards(clips: Sequence[SourceClip], settings: ShardSettings) -> tuple[list[str], list[list[SourceClip]]]:
    by_split = {split: shuffled([clip for clip in clips if clip.split == split], settings.seed) for split in SPLITS}
    if settings.format == "zarr":
        by_split = {"clips": [clip for split in SPLITS for clip in by_split[split]]}
    names, shards = [], []
    for name, ordered in by_split.items():
        for number in range(ceil_div(len(ordered), settings.clips_per_shard)):
            first = number * settings.clips_per_shard
            names.append(f"{name}-{number:06d}")
            shards.append(ordered[first : first + settings.clips_per_shard])
    return names, shards


def _check_size(entries: int, clips: int, settings: ShardSettings) -> None:
    """Refuse more shards than the list of them may have bytes, before hours of work end in one nobody reads."""
    most = _ENTRIES_BYTES // ENTRY_BYTES
    if entries > most:
        rule = f"{clips} clips make {entries} files, and a manifest has room for {most}"
        fix = f"set clips_per_shard to {ceil_div(settings.clips_per_shard * entries, most)} or more"
        raise DataError(Problem("clips_per_shard", settings.clips_per_shard, rule, fix))


def shuffled(clips: Sequence[SourceClip], seed: int) -> list[SourceClip]:
    """Return clips in the order they are sharded in."""
    # By key first: the source's own order must not leak in through equal hashes.
    clips = sorted(clips, key=lambda clip: clip.key)
    uids = np.array([uid(clip.key) for clip in clips], np.uint64)
    return [clips[row] for row in np.argsort(mix64(uids, seed), kind="stable")]


def _provenance(source: SourceProvenance, kind: str, tokens: int) -> Provenance:
    grid = source.grid or likely_grid(tokens)
    if grid[0] * grid[1] != tokens:
        rule = f"a frame of the source has {tokens} tokens"
        raise DataError(Problem("provenance.grid", list(grid), rule, "correct it, or leave it out"))
    return Provenance(
        encoder=source.encoder,
        weights_sha256=source.weights_sha256,
        encode_mode=source.encode_mode,
        preprocessing=source.preprocessing,
        grid=grid,
        pixels_digest=source.pixels_digest,
        features_digest=source.features_digest,
        source=kind,
    )


def plan_digest(plan: Plan) -> str:
    """Return a sha256 over what decides bytes: not where the source lies, nor what was left out."""
    parts = asdict(replace(plan, clips=()))
    for name in ("digest", "source", "bad"):
        del parts[name]
    digest = hashlib.sha256(json.dumps([SHARD_VERSION, parts], sort_keys=True).encode())
    for key, known in plan.clips:
        digest.update(f"{key} {known}\n".encode())
    return digest.hexdigest()
