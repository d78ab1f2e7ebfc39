"""From a sample of somebody else's tar to a clip that can be read where it lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from data_pipeline.alignment import ALIGNMENTS, ActionAlignment
from data_pipeline.dataset.samples import Sample, read_header, read_meta
from data_pipeline.dtypes import STORED_TYPES
from data_pipeline.schema import FIELDS, SPLITS, EncodeMode, row_shape
from data_pipeline.shard.npy import NpyHeader
from data_pipeline.shard.walk import Member
from data_pipeline.sources.agreement import key_problem
from data_pipeline.sources.base import ArraySpec
from data_pipeline.sources.labels import PARTITION_RULE, is_valid_partition
from data_pipeline.sources.layout import FEATURES_DTYPES, REQUIRED, Grid, Layout
from data_pipeline.sources.stored import Seen

RESHARD = "pack them anew: `hopescale data shard FOLDER OUT` reads what cannot be indexed where it lies"
_RENAME = "rename its members, or re-shard: `hopescale data shard FOLDER OUT`"
_MAX_SHOWN = 6

DESCRIBED: Mapping[str, tuple[Callable[[str], bool], str]] = {
    "partition": (is_valid_partition, PARTITION_RULE),
    "split": (SPLITS.__contains__, f"one of {', '.join(SPLITS)}"),
    "encode_mode": (get_args(EncodeMode).__contains__, f"one of {', '.join(get_args(EncodeMode))}"),
    "action_alignment": (ALIGNMENTS.__contains__, f"one of {', '.join(ALIGNMENTS)}"),
    "encoder": (str.isprintable, "printable text"),
}
"""Entries of a sample's meta.json that are used, with what holds for them, and that as a sentence."""


@dataclass(frozen=True)
class TarClip:
    """One clip inside a tar.

    Attributes:
        key: Of the sample.
        specs: Type and shape of each field, features as `[F, N, E]`.
        places: First byte of each field's values in the tar, and their number.
        names: Of the members.
        grid: Rows and columns of the tokens where the features say them.
        description: What its meta.json says of itself, those entries of `DESCRIBED` that are there.
    """

    key: str
    specs: Mapping[str, ArraySpec]
    places: Mapping[str, tuple[int, int]]
    names: Mapping[str, str]
    grid: Grid | None
    description: Mapping[str, str]

    @property
    def length(self) -> int:
        """Stored frames, F."""
        return self.specs["features"].shape[0]

    @property
    def rows(self) -> int:
        """Recorded rows of actions."""
        return self.specs["actions"].shape[0]

    def difference(self, other: TarClip) -> str:
        """Return what the first difference of kind to another clip is, or an empty text."""
        for name in sorted({*self.specs, *other.specs}):
            if name not in self.specs:
                return f"it has no {name}, which {other.key} has"
            if name not in other.specs:
                return f"it has {name}, which {other.key} has not"
            mine, theirs = ((clip.specs[name].dtype, row_shape(name, clip.specs[name].shape)) for clip in (self, other))
            if mine != theirs:
                shown = [f"{dtype} with widths {list(width)}" for dtype, width in (mine, theirs)]
                return f"its {name} are {shown[0]}, those of {other.key} {shown[1]}"
        return "" if self.grid == other.grid else f"its tokens lie in {self.grid}, those of {other.key} in {other.grid}"


class Unusable(ValueError):
    """Why a sample cannot be indexed where it lies, and what to do."""

    def __init__(self, reason: str, fix: str = RESHARD) -> None:
        """Take both."""
        super().__init__(reason)
        self.fix = fix


@dataclass(frozen=True)
class TarLayout:
    """How samples are to be understood.

    Attributes:
        members: Names of the members of each field, without the key; the first that a sample has.
        tokens: Tokens of a frame, N: needed for features `[F * N, E]`, checked for others.
        features_dtype: What unsigned integers in place of features are; None asks the sample's meta.json.
        action_alignment: Decides how many rows of actions a clip needs; None asks the sample's meta.json, else `as-is`.
    """

    members: Mapping[str, tuple[str, ...]]
    tokens: int | None = None
    features_dtype: str | None = None
    action_alignment: ActionAlignment | None = None

    def clip(self, descriptor: int, sample: Sample) -> TarClip:
        """Return the clip that a sample is.

        Raises:
            OSError: The tar cannot be read.
            Unusable: It lacks a field, or has one of another form than shards have.
        """
        problem = key_problem(sample.key)
        if problem:
            raise Unusable(problem, _RENAME)
        seen, places, names = {}, {}, {}
        for name in FIELDS:
            found = next((member for member in self.members[name] if member in sample.members), None)
            if found is not None:
                member = sample.members[found]
                names[name] = f"member {member.name}"
                header = _header(descriptor, member)
                places[name] = (member.offset + header.nbytes, member.size - header.nbytes)
                seen[name] = Seen(np.dtype(header.descr).name, header.shape, "")
            elif name in REQUIRED:
                raise self._missing(sample, self.members[name])
        meta = _meta(descriptor, sample)
        description = _description(sample, meta)
        specs, grid = self._specs(seen, names, description, meta)
        return TarClip(sample.key, specs, places, names, grid, description)

    def _missing(self, sample: Sample, wanted: tuple[str, ...]) -> Unusable:
        text = f"there is no member {sample.key}.{' or '.join(wanted)}"
        known = {name for names in self.members.values() for name in names}
        ends = tuple(f".{name}" for name in known if "." in name)
        dotted = next((rest for rest in sample.members if rest not in known and rest.endswith(ends)), None)
        if dotted is not None:
            name = sample.members[dotted].name
            return Unusable(f"{text}, but {name}: a key ends at its first dot, and keys with dots are merged", _RENAME)
        text += f"; it has {', '.join(list(sample.members)[:_MAX_SHOWN])}"
        return Unusable(text, "name the members with fields=features:NAME,actions:NAME, or complete the sample")

    def _specs(
        self,
        seen: Mapping[str, Seen],
        names: Mapping[str, str],
        description: Mapping[str, Any],
        meta: Mapping[str, Any],
    ) -> tuple[dict[str, ArraySpec], Grid | None]:
        shapes = Layout(
            features_dtype=self.features_dtype or _stated_dtype(seen["features"].dtype, meta),
            tokens=self.tokens,
            flat_tokens=None,
            first_extrinsics=False,
            action_alignment=self.action_alignment or description.get("action_alignment", "as-is"),
        )
        try:
            specs, grid = shapes.specs(seen, names)
        except ValueError as error:
            raise Unusable(str(error)) from error
        for name, spec in specs.items():
            if spec.dtype != "float32" and (name != "features" or spec.dtype not in STORED_TYPES):
                wanted = "float32" if name != "features" else f"one of {', '.join(STORED_TYPES)}"
                raise Unusable(f"{names[name]}: {name} are {spec.dtype}, and must be {wanted}")
            if min(spec.shape) < 1:
                raise Unusable(f"{names[name]}: {name} have the shape {list(spec.shape)}")
        return specs, grid


def _header(descriptor: int, member: Member) -> NpyHeader:
    try:
        header = read_header(descriptor, member)
    except ValueError as error:
        raise Unusable(f"member {member.name}: {error}") from error
    start = member.offset + header.nbytes
    if start % np.dtype(header.descr).itemsize:
        raise Unusable(f"member {member.name}: its values start at byte {start}, not on a number's boundary")
    return header


def _meta(descriptor: int, sample: Sample) -> dict[str, Any]:
    if sample.meta is None:
        return {}
    try:
        return read_meta(descriptor, sample.meta)
    except ValueError as error:
        raise Unusable(f"member {sample.meta.name}: {error}", "correct it, or leave it out") from error


def _description(sample: Sample, meta: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for entry, (holds, rule) in DESCRIBED.items():
        value = meta.get(entry)
        if value is None:
            continue
        if not isinstance(value, str) or len(value) > 200 or not holds(value):
            name = "" if sample.meta is None else sample.meta.name
            text = f"member {name}: {entry} is {str(value)[:200]!r}, not {rule}"
            raise Unusable(text, "correct it, or leave it out")
        found[entry] = value
    return found


def _stated_dtype(stored: str, meta: Mapping[str, Any]) -> str | None:
    """Return what a sample says its unsigned integers are, as our own shards do."""
    dtypes = meta.get("dtypes")
    stated = dtypes.get("features") if isinstance(dtypes, dict) else None
    return stated if stored in ("uint8", "uint16") and stated in FEATURES_DTYPES else None
