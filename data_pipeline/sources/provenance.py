"""Where features come from: as the user says, as the source says, and both together."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, get_args

from data_pipeline.alignment import ALIGNMENTS
from data_pipeline.errors import DataError, Problem, nearest
from data_pipeline.schema import EncodeMode
from data_pipeline.sources.base import SourceProvenance

STATED = ("encoder", "encode_mode", "action_alignment")
"""What clips may say of themselves."""

_CHOICES = {"encode_mode": get_args(EncodeMode), "action_alignment": ALIGNMENTS}
_HEX = re.compile(r"[0-9a-f]{64}|")
_GRID = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
_MAX_TEXT = 200


def checked(given: Mapping[str, object]) -> dict[str, Any]:
    """Return a user's entries of `SourceProvenance`; the grid may be written as `16x16`.

    Raises:
        DataError: Unknown entries or values; all problems at once.
    """
    names = [field.name for field in dataclasses.fields(SourceProvenance)]
    problems: list[Problem] = []
    entries: dict[str, Any] = {}
    for name, value in given.items():
        field = f"provenance.{name}"
        if name not in names:
            problems.append(Problem(field, value, "there is no such entry", nearest(name, names)))
        elif name == "grid":
            entries[name] = _grid(value)
            if entries[name] is None:
                problems.append(Problem(field, value, "must be rows and columns of tokens", "write e.g. 16x16"))
        elif name in _CHOICES and value not in _CHOICES[name]:
            problems.append(Problem(field, value, "there is no such thing", nearest(str(value), _CHOICES[name])))
        elif not isinstance(value, str):
            problems.append(Problem(field, value, "must be a text", "correct it"))
        elif name.endswith(("sha256", "digest")) and not _HEX.fullmatch(value):
            problems.append(Problem(field, value, "must be 64 hex digits", "correct it"))
        else:
            entries[name] = value
    if problems:
        raise DataError(problems)
    return entries


def stated_by(document: Mapping[str, Any]) -> dict[str, str]:
    """Return what a clip or group says of itself, the entries of `STATED` that are there.

    Raises:
        ValueError: An entry is none that can be.
    """
    found: dict[str, str] = {}
    for name in STATED:
        value = document.get(name)
        if value is None:
            continue
        is_text = isinstance(value, str) and value.isprintable() and len(value) <= _MAX_TEXT
        if not is_text or value not in _CHOICES.get(name, (value,)):
            wanted = f"one of {', '.join(_CHOICES[name])}" if name in _CHOICES else "a short text"
            raise ValueError(f"{name} is {str(value)[:_MAX_TEXT]!r}, not {wanted}")
        found[name] = value
    return found


def likely_grid(tokens: int) -> tuple[int, int]:
    """Return the rows and columns of tokens where nobody states them: a square if it can be one."""
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else (1, tokens)


def combined(stated: Mapping[str, Any], given: SourceProvenance, where: object) -> SourceProvenance:
    """Return what a user gave, completed by what the source states.

    Args:
        stated: Entries of `SourceProvenance`.
        given: Of the user; an entry with its default value says nothing.
        where: What states it, for errors.

    Raises:
        DataError: They contradict each other.
    """
    unset = SourceProvenance()
    problems: list[Problem] = []
    entries: dict[str, Any] = {}
    for name, value in stated.items():
        own, default = getattr(given, name), getattr(unset, name)
        if own == default:
            entries[name] = value
        elif value not in (own, default):
            rule = f"{where} says {value}"
            problems.append(Problem(f"provenance.{name}", own, rule, "leave it out, or correct the source"))
    if problems:
        raise DataError(problems)
    return dataclasses.replace(given, **entries)


def _grid(value: object) -> tuple[int, int] | None:
    found = _GRID.fullmatch(value) if isinstance(value, str) else None
    sides = found.groups() if found else value
    if not isinstance(sides, tuple | list) or len(sides) != 2:
        return None
    rows, columns = (int(side) if isinstance(side, str) or type(side) is int else 0 for side in sides)
    return (rows, columns) if rows > 0 and columns > 0 else None
