"""Opening a data set: everything that can be wrong with it is said before the first clip is read."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data_pipeline.cache import file_sha256, write_json
from data_pipeline.dataset.consistency import (
    GROUP_FILES,
    MEAN_FRAME_FILE,
    SHARD_FOLDER,
    STATISTICS_FILE,
    header_disagreements,
    manifest_disagreements,
    most_bytes,
)
from data_pipeline.errors import DataError, Problem, nearest
from data_pipeline.schema import MANIFEST_FORMAT, Manifest
from data_pipeline.sources.stored import printable

__all__ = [
    "MANIFEST_FILE",
    "MAX_MANIFEST",
    "MEAN_FRAME_FILE",
    "SHARD_FOLDER",
    "STATISTICS_FILE",
    "file_problems",
    "load_manifest",
    "manifest_digest",
    "parse_manifest",
    "read_manifest",
    "shard_problems",
    "write_manifest",
]

MANIFEST_FILE = "manifest.json"
DIGEST_ENTRY = "digest"
MAX_MANIFEST = 64 << 20
_MAX_SHOWN = 200

_MANIFEST = TypeAdapter(Manifest)
_MAKE = "make it with `hopescale data shard`"
_MAKE_AGAIN = "copy the data set again, or make it again with `hopescale data shard`"


def load_manifest(folder: Path, *, field: str = "data.path", shards: bool = True) -> Manifest:
    """Read manifest.json and check the files it lists: those beside the shards by sha256, shards by size.

    Args:
        folder: Folder of the data set.
        field: Setting to name in errors.
        shards: Also look at the shards; without, for data sets whose shards are elsewhere.

    Raises:
        DataError: Missing folder or manifest, unknown format, missing or changed files; all problems at once.
    """
    manifest = read_manifest(folder, field)
    problems = file_problems(folder, manifest, field)
    if shards:
        problems += shard_problems(folder, manifest, field)
    if problems:
        raise DataError(problems[:20])
    return manifest


def read_manifest(folder: Path, field: str = "data.path") -> Manifest:
    """Read manifest.json and check it by itself, without looking at the files it lists.

    Raises:
        DataError: Missing folder or manifest, unknown format, or entries that cannot be those of a data set.
    """
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise DataError(Problem(field, folder, "the folder does not exist", f"correct the path, or {_MAKE}"))
    if not path.is_file():
        rule = f"the folder has no {MANIFEST_FILE}: not a data set, or an interrupted one"
        raise DataError(Problem(field, folder, rule, f"{_MAKE}; `hopescale data index` takes tars as they are"))
    return parse_manifest(_read_bounded(path, field), path, field)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json with a digest of itself, after everything it speaks of: its presence means complete.

    Raises:
        DataError: It has more bytes than anybody reads, for too many shards or partitions.
    """
    document = asdict(manifest)
    document = {**document, DIGEST_ENTRY: manifest_digest(document)}
    size = len(json.dumps(document, indent=1)) + 1
    if size > MAX_MANIFEST:
        rule = f"it would have {size} bytes, a manifest has at most {MAX_MANIFEST}"
        raise DataError(Problem("manifest", folder / MANIFEST_FILE, rule, "pack more clips into a shard"))
    write_json(folder / MANIFEST_FILE, document)


def manifest_digest(document: Mapping[str, Any]) -> str:
    """Return the sha256, in hex, of a manifest's entries without their digest, however they are laid out as text."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse_manifest(content: bytes, path: Path | str, field: str = "data.path") -> Manifest:
    """Return the manifest in some JSON.

    Args:
        content: At most `MAX_MANIFEST` bytes.
        path: Or URL, to name in errors.
        field: Setting to name in errors.

    Raises:
        DataError: Not JSON, another format version, fields that are missing, unknown or of the wrong type, entries that
            contradict each other, or a digest of other entries.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(Problem(field, path, f"not readable as JSON ({error})", _MAKE_AGAIN)) from error
    version = document.get("format") if isinstance(document, dict) else None
    if version != MANIFEST_FORMAT:
        rule = f"{path}: this release reads format {MANIFEST_FORMAT}"
        raise DataError(Problem(f"{field}: format", _shown(version), rule, "make it again with `hopescale data shard`"))
    digest = document.pop(DIGEST_ENTRY, None)
    try:
        # Strictly, and from text: in Python's types a manifest has tuples, which JSON does not.
        manifest = _MANIFEST.validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        raise DataError(
            [
                Problem(f"{field}: {_place(e['loc'])}", _shown(e.get("input")), f"{path}: {e['msg']}", _MAKE_AGAIN)
                for e in error.errors()[:10]
            ]
        ) from error
    problems = [
        Problem(f"{field}: {_shown(wrong.entry)}", _shown(wrong.value), f"{path}: {_shown(wrong.rule)}", _MAKE_AGAIN)
        for wrong in manifest_disagreements(manifest)
    ]
    if document != json.loads(json.dumps(asdict(manifest))):
        rule = f"has entries that are not a manifest's: {_unknown(document)}"
        problems.append(Problem(field, path, rule, _MAKE_AGAIN))
    if digest is not None and digest != manifest_digest(document):
        fix = f"copy the data set again; if you changed the manifest on purpose, remove its entry {DIGEST_ENTRY}"
        problems.append(
            Problem(f"{field}: {DIGEST_ENTRY}", _shown(digest), f"{path} was changed after it was written", fix)
        )
    if problems:
        raise DataError(problems[:20])
    return manifest


def file_problems(folder: Path, manifest: Manifest, field: str = "data.path") -> list[Problem]:
    """Return what is wrong with the files beside the shards: missing, too large, changed, or not of the right shape."""
    problems = []
    for name, sha256 in manifest.files.items():
        path = folder / name
        if not path.is_file():
            problems.append(Problem(field, path, "the file is missing", _MAKE_AGAIN))
        elif path.stat().st_size > most_bytes(manifest, name):
            rule = f"it has {path.stat().st_size} bytes, at most {most_bytes(manifest, name)} are possible"
            problems.append(Problem(field, path, rule, _MAKE_AGAIN))
        elif file_sha256(path) != sha256:
            problems.append(Problem(field, path, "its sha256 differs from the manifest", _MAKE_AGAIN))
    if not problems:
        problems = [
            Problem(f"{field}: {wrong.entry}", wrong.value, f"{folder}: {wrong.rule}", _MAKE_AGAIN)
            for wrong in header_disagreements(folder, manifest)
        ]
    return problems


def shard_problems(folder: Path, manifest: Manifest, field: str = "data.path") -> list[Problem]:
    """Return which shards are missing, are links or anything but files, or have another size than the manifest says.

    Of a zarr group every file counts.
    """
    if manifest.container == "zarr":
        return _group_problems(folder, manifest, field)
    problems = []
    for entry in manifest.shards:
        path = folder / manifest.shard_folder / entry.name
        if not os.path.lexists(path):
            problems.append(Problem(field, path, "the shard is missing", _MAKE_AGAIN))
        elif not stat.S_ISREG(path.lstat().st_mode):
            problems.append(Problem(field, path, "the shard is not a regular file", _MAKE_AGAIN))
        elif path.stat().st_size != entry.bytes:
            rule = f"the shard has {path.stat().st_size} bytes, the manifest says {entry.bytes}"
            problems.append(Problem(field, path, rule, _MAKE_AGAIN))
    return problems


def _group_problems(folder: Path, manifest: Manifest, field: str) -> list[Problem]:
    from data_pipeline.dataset.group_files import group_losses, read_group_files

    if GROUP_FILES not in manifest.files:
        return [Problem(field, folder / MANIFEST_FILE, f"the manifest lists no {GROUP_FILES}", _MAKE_AGAIN)]
    try:
        files = read_group_files(folder)
    except (OSError, ValueError) as error:
        return [Problem(field, folder / GROUP_FILES, f"cannot be used ({_shown(error)})", _MAKE_AGAIN)]
    return [
        Problem(field, folder / manifest.shard_folder / _shown(loss.name), loss.text, _MAKE_AGAIN)
        for _, losses in group_losses(folder, files, every_byte=False)
        for loss in losses
    ]


def _unknown(document: Mapping[str, Any]) -> str:
    names = {entry.name for entry in fields(Manifest)}
    unknown = sorted(set(document) - names)
    return nearest(_shown(unknown[0][:80]), names) if unknown else "below its first level"


def _place(location: tuple[int | str, ...]) -> str:
    return _shown(".".join(map(str, location)))


def _shown(value: object) -> str:
    """Return a value of somebody's file so that it can stand in one line of any terminal."""
    return printable(str(value)[:_MAX_SHOWN])


def _read_bounded(path: Path, field: str) -> bytes:
    size = path.stat().st_size
    if size > MAX_MANIFEST:
        rule = f"a manifest has at most {MAX_MANIFEST} bytes"
        raise DataError(Problem(field, path, f"has {size} bytes; {rule}", _MAKE_AGAIN))
    return path.read_bytes()
