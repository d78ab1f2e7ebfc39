"""What all sources made of stored arrays share: from arrays found to clips listed, and from clips back to arrays."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from data_pipeline.errors import DataError, Problem, nearest
from data_pipeline.schema import SPLITS, Split
from data_pipeline.sources.agreement import Traits, agreeing, check_keys, key_problem
from data_pipeline.sources.base import Listing, SkippedClip, SourceClip, SourceProvenance
from data_pipeline.sources.labels import PARTITION_RULE, Labels, is_valid_partition
from data_pipeline.sources.layout import REQUIRED, BadClip, Grid, Layout, normalised
from data_pipeline.sources.provenance import combined, likely_grid
from data_pipeline.sources.stored import Seen, StoredArray, printable, reason

FIX = "copy or encode the clip again, or leave it out"
FeaturesDtype = Literal["bfloat16", "float8_e4m3fn", "float8_e5m2", "uint16", "uint8"]
ExtrinsicsRows = Literal["exact", "first"]
_MAX_SHOWN = 200


@dataclass(frozen=True)
class FoundClip:
    """One clip of a source before any of its arrays was looked at.

    Attributes:
        key: As the source spells it.
        where: Of the clip inside the source.
        arrays: Where its arrays lie, by field.
        partition: As the source says, or None.
        split: As the source says, or None.
        frames: Stored frames as the source says beside the arrays, or None.
        stamp: As the source says, or None: then it comes from the files.
        features_dtype: What unsigned integers in place of features are, as the source says, or None.
        stated: Entries of its provenance, as the source says.
        places: See `SourceClip`.
        problem: Why it cannot be used, or empty.
    """

    key: str
    where: str
    arrays: Mapping[str, StoredArray] = field(default_factory=dict)
    partition: str | None = None
    split: str | None = None
    frames: int | None = None
    stamp: str | None = None
    features_dtype: str | None = None
    stated: Mapping[str, str] = field(default_factory=dict)
    places: tuple[int, ...] = ()
    problem: str = ""


@dataclass(kw_only=True)
class ClipSource(ABC):
    """A source whose clips are made of stored arrays.

    Attributes:
        path: Of the source.
        provenance: Of its features. `listing` completes it by what clips say: the grid of features `[F, H, W, E]`, and
            what is written beside them.
        labels: Rules for partitions and splits.
        features_dtype: What unsigned integers in place of features are.
        tokens: Tokens of a frame, N: needed for features `[F * N, E]`, checked for others.
        extrinsics_rows: exact wants F - 1 rows of extrinsics, first takes the first F - 1 of more.
    """

    path: Path
    provenance: SourceProvenance = field(default_factory=SourceProvenance)
    labels: Labels = field(default_factory=Labels)
    features_dtype: FeaturesDtype | None = None
    tokens: int | None = None
    extrinsics_rows: ExtrinsicsRows = "exact"

    _given: SourceProvenance = field(init=False, repr=False, compare=False)

    kind = ""
    flat_tokens: ClassVar[int | None] = None
    """Tokens of a frame in features `[F * N, E]` where the option says nothing."""

    def __post_init__(self) -> None:
        """Check what can be checked without looking."""
        if self.tokens is not None and self.tokens < 1:
            raise DataError(Problem("source.tokens", self.tokens, "a frame has at least one token", "correct it"))
        self._given = self.provenance

    @abstractmethod
    def found(self) -> Iterable[FoundClip]:
        """Yield every clip in a fixed order, those with a problem too.

        Raises:
            DataError: The source as a whole cannot be used.
        """

    @abstractmethod
    def again(self, clip: SourceClip) -> Mapping[str, StoredArray]:
        """Return where the arrays of a listed clip lie, perhaps in another process than the one that listed it."""

    def listing(self) -> Listing:
        """Return every clip, from headers alone.

        Raises:
            DataError: No clips, equal keys, rules that do not fit, or a source that cannot be used at all.
        """
        keys: list[tuple[str, str]] = []
        clips: list[SourceClip] = []
        bad: list[SkippedClip] = []
        traits: dict[str, Traits] = {}
        for found in self._found():
            if found.key:
                keys.append((found.key, found.where))
            try:
                clip, grid = self._listed(found)
            except BadClip as error:
                bad.append(_skipped(found, str(error)))
                continue
            clips.append(clip)
            traits[clip.key] = Traits(grid, tuple(sorted(found.stated.items())))
        if not clips and not bad:
            raise DataError(
                Problem("source", self.path, f"it has no clips of the kind {self.kind}", "name another one")
            )
        check_keys(keys, "source", self.path)
        good, others, common = agreeing(clips, traits)
        self._complete_provenance(good, common)
        return self.labels.apply(Listing(good, [*bad, *others]))

    def read(self, clip: SourceClip) -> dict[str, np.ndarray]:
        """Return the arrays of a listed clip, by field.

        Raises:
            DataError: A file is missing, damaged or has changed since the listing; it is named.
        """
        stored = self.again(clip)
        arrays, stamps = {}, {}
        for name, spec in clip.arrays.items():
            if name not in stored:
                raise self._unreadable(clip, f"{name} is gone since the clip was listed")
            try:
                array, stamps[name] = stored[name].read()
                arrays[name] = normalised(name, array, spec)
            except (OSError, ValueError) as error:
                raise self._unreadable(clip, f"{stored[name]}: {reason(error)}") from error
        if not self._is_same(clip, stamps):
            raise self._unreadable(clip, "its files have changed since it was listed")
        return arrays

    def _found(self) -> Iterator[FoundClip]:
        try:
            yield from self.found()
        except OSError as error:
            raise DataError(Problem("source", self.path, reason(error), "correct the path")) from error

    def _listed(self, found: FoundClip) -> tuple[SourceClip, Grid | None]:
        problem = found.problem or key_problem(found.key) or _label_problem(found)
        if problem:
            raise BadClip(problem)
        for name in REQUIRED:
            if name not in found.arrays:
                raise BadClip(f"{found.where}: it has no {name}")
        seen: dict[str, Seen] = {}
        for name, stored in sorted(found.arrays.items()):
            try:
                seen[name] = stored.look()
            except (OSError, ValueError) as error:
                raise BadClip(f"{stored}: {reason(error)}") from error
        specs, grid = self._layout(found).specs(seen, {name: str(stored) for name, stored in found.arrays.items()})
        frames = specs["features"].shape[0]
        if found.frames is not None and found.frames != frames:
            raise BadClip(f"{found.arrays['features']}: it has {frames} frames, the clip's entry says {found.frames}")
        stamp = found.stamp or stamp_of({name: array.stamp for name, array in seen.items()})
        split, partition = as_split(found.split), found.partition or ""
        return SourceClip(found.key, partition, split, specs, stamp, found.where, found.places), grid

    def _is_same(self, clip: SourceClip, stamps: Mapping[str, str]) -> bool:
        return clip.stamp == stamp_of(stamps)

    def _layout(self, found: FoundClip) -> Layout:
        if None not in (self.features_dtype, found.features_dtype) and self.features_dtype != found.features_dtype:
            rule = f"it says that its features are {found.features_dtype}, the option features_dtype says"
            raise BadClip(f"{found.where}: {rule} {self.features_dtype}")
        return Layout(
            features_dtype=self.features_dtype or found.features_dtype,
            tokens=self.tokens,
            flat_tokens=self.flat_tokens,
            first_extrinsics=self.extrinsics_rows == "first",
            action_alignment=combined(found.stated, self._given, found.where).action_alignment,
        )

    def _complete_provenance(self, clips: list[SourceClip], common: Traits) -> None:
        if not clips:
            return
        self.provenance = combined(dict(common.stated), self._given, clips[0].where)
        tokens, stated = clips[0].arrays["features"].shape[1], self.provenance.grid
        if stated is None:
            self.provenance = replace(self.provenance, grid=common.grid)
        elif stated[0] * stated[1] != tokens or common.grid not in (None, stated):
            shown = f"{tokens} tokens" if common.grid is None else f"a grid of {list(common.grid)}"
            rule = f"the features of {self.path} have {shown}"
            rows, columns = common.grid or likely_grid(tokens)
            fix = f"leave it out, or write rows x columns of a frame's tokens, such as {rows}x{columns}"
            raise DataError(Problem("provenance.grid", list(stated), rule, fix))

    def _unreadable(self, clip: SourceClip, rule: str) -> DataError:
        return DataError(Problem("source", f"{self.path}, clip {clip.key}", rule, FIX))


def stamp_of(stamps: Mapping[str, str]) -> str:
    """Return the stamp of a clip from those of its arrays, by field."""
    text = "".join(f"{name} {stamps[name]}\n" for name in sorted(stamps))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def as_split(text: str | None) -> Split | None:
    """Return a split of `SPLITS` as its type."""
    return next((split for split in ("train", "heldout") if split == text), None)


def _label_problem(found: FoundClip) -> str:
    if found.partition is not None and not is_valid_partition(found.partition):
        return f"{found.where}: the partition {found.partition[:_MAX_SHOWN]!r} has other signs than {PARTITION_RULE}"
    if found.split is not None and found.split not in SPLITS:
        return f"{found.where}: unknown split {found.split[:_MAX_SHOWN]!r}: {nearest(found.split[:_MAX_SHOWN], SPLITS)}"
    return ""


def _skipped(found: FoundClip, text: str) -> SkippedClip:
    return SkippedClip(printable(found.key[:_MAX_SHOWN]), printable(found.where[:_MAX_SHOWN]), printable(text))
