"""Opening a source: which layout a path has, and what the user's options mean to it."""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from data_pipeline.dataset.manifest import MANIFEST_FILE
from data_pipeline.encode.documents import FEATURES_FILE
from data_pipeline.encode.journal import PARTS
from data_pipeline.errors import DataError, Problem, nearest
from data_pipeline.pixels.simulate import PIXELS_FILE
from data_pipeline.shard.journal import JOURNAL_FOLDER, PLAN_FILE
from data_pipeline.sources.base import Source
from data_pipeline.sources.callable import ENTRY_POINT, PythonClips
from data_pipeline.sources.clip_source import ClipSource
from data_pipeline.sources.features_folder import FeaturesFolder
from data_pipeline.sources.flat import FlatFolder, NpzFolder
from data_pipeline.sources.labels import labels
from data_pipeline.sources.listing import SUFFIXES, ListedFiles
from data_pipeline.sources.provenance import checked
from data_pipeline.sources.tars import TarShards
from data_pipeline.sources.thesis import FEATURES_FOLDER, ThesisTree
from data_pipeline.sources.zarr_groups import ZarrClips, ZarrStacked
from data_pipeline.sources.zarr_metadata import is_array, is_group

Option = str | int | bool
_CLASSES: tuple[type[ClipSource], ...] = (
    FeaturesFolder,
    ThesisTree,
    FlatFolder,
    NpzFolder,
    ZarrStacked,
    ZarrClips,
    ListedFiles,
    TarShards,
    PythonClips,
)
KINDS: Mapping[str, type[ClipSource]] = {source.kind: source for source in _CLASSES}
"""Every kind of source by name; `callable` is never recognised, because it runs code."""

_NOT_SOURCES = {
    MANIFEST_FILE: (
        "it is a data set already",
        "name its folder of shards to make another one of them; kind=tars where tars lie in the folder itself",
    ),
    JOURNAL_FOLDER: ("it is an unfinished data set", "name the source it is made from"),
    f"{PARTS}/{PLAN_FILE}": (
        "they are unfinished features",
        "repeat `hopescale data encode`, which goes on where it was",
    ),
    PIXELS_FILE: ("they are pixels", "make features of them with `hopescale data encode`"),
}
_MAX_SHOWN = 200
_NOT_OPTIONS = {"path", "provenance", "labels"}
_TRUTH = {"true": True, "false": False}


def open_source(
    path: str | Path,
    *,
    kind: str | None = None,
    options: Mapping[str, Option] | None = None,
    provenance: Mapping[str, object] | None = None,
    partitions: Sequence[str] = (),
    split: str | None = None,
) -> Source:
    """Open a source of clips.

    Args:
        path: Folder or file of the source, or `module:function` of the kind callable.
        kind: A key of `KINDS`; None recognises it, see `recognise`.
        options: Of the kind, see `options_of`; numbers and truth values may be texts.
        provenance: Fields of `SourceProvenance` that the source does not know; the grid as (rows, columns) or `16x16`.
        partitions: Rules such as `base=clip_00000..clip_05000`, `base=0..5000` or `ice=ice_*`.
        split: `heldout=0.1` or `heldout_last=0.1`, the share of each partition that is held out.

    Raises:
        DataError: Nothing there, no kind or several, unknown or impossible settings.
    """
    text = str(path)
    if kind is not None and kind not in KINDS:
        raise DataError(Problem("kind", kind, "there is no such kind of source", nearest(kind, KINDS)))
    if "://" in text or text.startswith("pipe:"):
        raise DataError(Problem("source", text, "only local files are read", "copy the source to a local disk"))
    place = Path(text) if kind == PythonClips.kind else Path(text).expanduser()
    if kind is None:
        kind = recognise(place)[0]
    elif kind != PythonClips.kind:
        _check_place(place, kind)
    if kind == ListedFiles.kind and place.is_dir():
        place = place / _listings(place)[0]
    source = KINDS[kind]
    settings = _settings(kind, options or {})
    default = next(field for field in dataclasses.fields(source) if field.name == "provenance").default_factory
    assert default is not dataclasses.MISSING
    settings["provenance"] = dataclasses.replace(default(), **checked(provenance or {}))
    return source(path=place, labels=labels(partitions, split), **settings)


def recognise(path: Path) -> tuple[str, str]:
    """Return the kind of a source and the file or folder that shows it.

    Raises:
        DataError: Nothing there, or files of no kind or of several.
    """
    if not _exists(path):
        if ENTRY_POINT.fullmatch(str(path)):
            fix = f"set kind={PythonClips.kind} if it is a function, or correct the path"
        else:
            fix = "correct the path"
        raise DataError(Problem("source", path, "there is no such file or folder", fix))
    evidence = _evidence_in_folder(path) if path.is_dir() else _evidence_of_file(path)
    if len(evidence) == 1:
        return next(iter(evidence.items()))
    kinds = f"set kind to one of {', '.join(KINDS)}"
    if not evidence:
        rule = "it does not look like a source of clips of any kind"
        raise DataError(Problem("source", path, rule, f"correct the path, or {kinds}"))
    seen = ", ".join(f"{kind} ({shown})" for kind, shown in evidence.items())
    raise DataError(Problem("source", path, f"it could be of several kinds: {seen}", "set kind to one of them"))


def options_of(kind: str) -> dict[str, str]:
    """Return the options of a kind, with what they may be."""
    return {name: _described(hint) for name, hint in _hints(kind).items()}


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        text = str(path)[:_MAX_SHOWN]
        raise DataError(Problem("source", text, f"it cannot be read ({error.strerror})", "correct the path")) from error


def _evidence_of_file(path: Path) -> dict[str, str]:
    if path.suffix in SUFFIXES:
        return {ListedFiles.kind: path.name}
    return {TarShards.kind: path.name} if path.suffix == ".tar" else {}


def _evidence_in_folder(path: Path) -> dict[str, str]:
    with os.scandir(path) as entries:
        names = {entry.name: entry.is_dir() for entry in entries if not entry.name.startswith(".")}
    if FEATURES_FILE in names:
        return {FeaturesFolder.kind: FEATURES_FILE}
    for name, (rule, fix) in _NOT_SOURCES.items():
        if (path / name).exists() and (name != JOURNAL_FOLDER or (path / PLAN_FILE).exists()):
            raise DataError(Problem("source", path, f"{rule}: it holds {name}", fix))
    if is_group(path):
        return _evidence_in_group(path, sorted(name for name, is_folder in names.items() if is_folder))
    evidence: dict[str, str] = {}
    for name in sorted(name for name, is_folder in names.items() if is_folder):
        if (path / name / FEATURES_FOLDER).is_dir():
            evidence[ThesisTree.kind] = f"{name}/{FEATURES_FOLDER}"
            break
    # Files inside the clips' folders belong to the tree.
    found = {} if evidence else _first_files(path)
    kinds = {".npy": FlatFolder.kind, ".npz": NpzFolder.kind, ".tar": TarShards.kind}
    evidence |= {kind: found[suffix] for suffix, kind in kinds.items() if suffix in found}
    if listings := _listings(path):
        evidence[ListedFiles.kind] = listings[0]
        if len(listings) > 1:
            rule = f"it holds {len(listings)} listings, {listings[0]} and {listings[1]}"
            raise DataError(Problem("source", path, rule, "name the one that counts"))
    return evidence


def _evidence_in_group(path: Path, names: Sequence[str]) -> dict[str, str]:
    if arrays := [name for name in names if is_array(path / name)]:
        return {ZarrStacked.kind: next((name for name in arrays if name == "features"), arrays[0])}
    if groups := [name for name in names if is_group(path / name)]:
        return {ZarrClips.kind: groups[0]}
    return {}


def _first_files(path: Path) -> dict[str, str]:
    """Return the first file with each suffix, in the folder itself or else below it."""
    found: dict[str, str] = {}
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            found.setdefault(Path(name).suffix, (Path(folder) / name).relative_to(path).as_posix())
    return found


def _listings(path: Path) -> list[str]:
    return sorted(name for name in os.listdir(path) if Path(name).suffix in SUFFIXES and not name.startswith("."))


def _check_place(path: Path, kind: str) -> None:
    is_folder = _exists(path) and path.is_dir()
    if not _exists(path):
        raise DataError(Problem("source", path, "there is no such file or folder", "correct the path"))
    if not is_folder and (kind not in (ListedFiles.kind, TarShards.kind) or not _evidence_of_file(path).get(kind)):
        wanted = {ListedFiles.kind: "a .jsonl or .csv file", TarShards.kind: "a .tar file or a folder of them"}
        raise DataError(
            Problem("source", path, f"the kind {kind} is {wanted.get(kind, 'a folder')}", "correct the path")
        )
    if kind == ListedFiles.kind and is_folder and len(_listings(path)) != 1:
        rule = f"it holds {len(_listings(path))} listings"
        raise DataError(Problem("source", path, rule, "name the .jsonl or .csv file itself"))


def _settings(kind: str, options: Mapping[str, Option]) -> dict[str, Any]:
    hints = _hints(kind)
    problems = []
    settings: dict[str, Any] = {}
    for name, value in options.items():
        if name not in hints:
            problems.append(
                Problem(f"source.{name}", value, f"the kind {kind} has no such option", nearest(name, hints))
            )
            continue
        try:
            settings[name] = _converted(value, hints[name])
        except ValueError:
            rule = f"must be {_described(hints[name])}"
            problems.append(Problem(f"source.{name}", value, rule, "correct it"))
    if problems:
        raise DataError(problems)
    return settings


def _hints(kind: str) -> dict[str, Any]:
    source = KINDS[kind]
    hints = typing.get_type_hints(source)
    names = [field.name for field in dataclasses.fields(source) if field.init and field.name not in _NOT_OPTIONS]
    return {name: hints[name] for name in names}


def _converted(value: Option, hint: Any) -> Option:
    for kind in _alternatives(hint):
        if get_origin(kind) is Literal and value in get_args(kind):
            return value
        if kind is bool and (isinstance(value, bool) or str(value).lower() in _TRUTH):
            return value if isinstance(value, bool) else _TRUTH[str(value).lower()]
        if kind is int and not isinstance(value, bool) and re.fullmatch("[0-9]{1,9}", str(value)):
            return int(value)
        if kind is str and isinstance(value, str) and value:
            return value
    raise ValueError


def _alternatives(hint: Any) -> tuple[Any, ...]:
    kinds = get_args(hint) if get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return tuple(kind for kind in kinds if kind is not types.NoneType)


def _described(hint: Any) -> str:
    words = {bool: "true or false", int: "a whole number", str: "a text"}
    kinds = _alternatives(hint)
    return " or ".join(", ".join(get_args(kind)) if get_origin(kind) is Literal else words[kind] for kind in kinds)
