"""What all clips of a source must have in common: keys of their own, and the same fields, types and widths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

from data_pipeline.errors import DataError, Problem
from data_pipeline.order import uid
from data_pipeline.schema import row_shape
from data_pipeline.shard.tar import KEY_RULE, is_valid_key
from data_pipeline.sources.base import ArraySpec, SkippedClip, SourceClip
from data_pipeline.sources.layout import Grid

_MAX_SUGGESTION = 60


def key_problem(key: str) -> str:
    """Return what is wrong with a clip's key and what it could be instead, or an empty text."""
    if key.isascii() and is_valid_key(key):
        return ""
    return f"the key {key[:200]!r} cannot be used: a key has {KEY_RULE}; {suggested_key(key)} would do"


def suggested_key(key: str) -> str:
    """Return a key that may be used, made from one that may not."""
    ascii_key = key.encode("ascii", "replace").decode()
    parts = ("".join(sign if is_valid_key(sign) else "_" for sign in part) for part in ascii_key.split("/"))
    text = "/".join(part for part in parts if part.strip("_")) or "clip"
    if len(text) > _MAX_SUGGESTION:
        digest = uid(key.encode("utf-8", "backslashreplace").decode()) >> 32
        text = f"{text[:_MAX_SUGGESTION].rstrip('/')}-{digest:08x}"
    return text


def check_keys(keys: Iterable[tuple[str, str]], field: str, source: object) -> None:
    """Check that no two clips have the same key.

    Args:
        keys: Key and place of each clip.
        field: Setting to name in the error.
        source: The source, for the error.

    Raises:
        DataError: Names the first keys that occur twice and where.
    """
    first: dict[str, str] = {}
    problems = []
    for key, where in keys:
        if key not in first:
            first[key] = where
            continue
        rule = f"two clips of {source} have this key: at {first[key]} and at {where}"
        problems.append(Problem(f"{field}.key", key, rule, "rename one of them"))
        if len(problems) == 20:
            break
    if problems:
        raise DataError(problems)


class Traits(NamedTuple):
    """What a clip says beside its arrays."""

    grid: Grid | None = None
    """Rows and columns of its tokens."""
    stated: tuple[tuple[str, str], ...] = ()
    """Entries of its provenance, by name and sorted."""


def agreeing(
    clips: Sequence[SourceClip], traits: Mapping[str, Traits]
) -> tuple[list[SourceClip], list[SkippedClip], Traits]:
    """Set apart the clips whose fields, types, widths or origin are not those of most clips.

    Args:
        clips: All usable clips.
        traits: Of each clip, by key.

    Returns:
        The clips that agree; the others, each with the reason; and the traits of those that agree.
    """
    kinds = [(_kind(clip.arrays), traits[clip.key]) for clip in clips]
    if not kinds:
        return [], [], Traits()
    # Of kinds equally frequent, Counter names the one it met first.
    common, count = Counter(kinds).most_common(1)[0]
    chosen = next(clip for clip, kind in zip(clips, kinds, strict=True) if kind == common)
    good, bad = [], []
    for clip, kind in zip(clips, kinds, strict=True):
        if kind == common:
            good.append(clip)
        else:
            text = _difference(clip, chosen) or _other_traits(traits[clip.key], common[1])
            text = f"{text}, as in {chosen.key} and {count} of {len(clips)} clips in all"
            bad.append(SkippedClip(clip.key, clip.where, text))
    return good, bad, common[1]


def _kind(arrays: Mapping[str, ArraySpec]) -> Hashable:
    return tuple((name, arrays[name].dtype, row_shape(name, arrays[name].shape)) for name in sorted(arrays))


def _difference(clip: SourceClip, like: SourceClip) -> str:
    for field in sorted({*clip.arrays, *like.arrays}):
        mine, theirs = clip.arrays.get(field), like.arrays.get(field)
        if mine is None:
            return f"it has no {field}"
        if theirs is None:
            return f"it has {field}; there should be none"
        if (mine.dtype, row_shape(field, mine.shape)) != (theirs.dtype, row_shape(field, theirs.shape)):
            return f"{field} are {_text(field, mine)}, not {_text(field, theirs)}"
    return ""


def _other_traits(mine: Traits, theirs: Traits) -> str:
    if mine.grid != theirs.grid:
        return f"the tokens of a frame lie in {_grid_text(mine.grid)}, not {_grid_text(theirs.grid)}"
    own, other = dict(mine.stated), dict(theirs.stated)
    name = next(name for name in sorted({*own, *other}) if own.get(name) != other.get(name))
    return f"it says {name}={own.get(name, 'nothing')}, not {other.get(name, 'nothing')}"


def _text(field: str, spec: ArraySpec) -> str:
    sizes = [*([] if field == "features_scale" else ["rows"]), *map(str, row_shape(field, spec.shape))]
    return f"{spec.dtype} [{', '.join(sizes)}]"


def _grid_text(grid: Grid | None) -> str:
    return "no stated grid" if grid is None else f"{grid[0]} x {grid[1]}"
