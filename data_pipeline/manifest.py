"""Opening a data set: everything that can be wrong with it is said before the first clip is read."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pydantic import TypeAdapter, ValidationError

from data_pipeline.errors import DataError, Problem, nearest
from data_pipeline.schema import LEAKY_ENCODE_MODES, MANIFEST_FORMAT, DataConfig, Manifest

MANIFEST_FILE = "manifest.json"
INDEX_FOLDER = "index"
SHARD_FOLDER = "shards"
KEYS_FILE = "keys.txt"
MEAN_FRAME_FILE = "mean_frame.npy"

_SHARD_NAME = re.compile(r"[a-z]+-[0-9]{6,}\.tar")
_LISTED_FILE = re.compile(rf"{INDEX_FOLDER}/[a-z0-9_]+\.npy|{re.escape(KEYS_FILE)}|{re.escape(MEAN_FRAME_FILE)}")
_MAKE = "make it with `hopescale data shard`"
_MAKE_AGAIN = "copy the data set again, or make it again with `hopescale data shard`"


def dataset_folder(config: DataConfig) -> Path:
    """Return the local folder that `data.path` names.

    Raises:
        DataError: No path, or a scheme that is not allowed or not supported.
    """
    if config.path is None:
        raise DataError(Problem("data.path", None, "no data set is named", f"set data.path, or {_MAKE}"))
    if "://" not in config.path:
        return Path(config.path).expanduser()
    parts = urlsplit(config.path)
    if parts.scheme not in config.allowed_schemes:
        rule = f"scheme {parts.scheme} is not one of data.allowed_schemes={list(config.allowed_schemes)}"
        raise DataError(Problem("data.path", config.path, rule, "name a local folder, or allow the scheme"))
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        rule = "only local files can be read"
        raise DataError(Problem("data.path", config.path, rule, "copy the data set to a local disk"))
    return Path(unquote(parts.path))


def load_manifest(folder: Path, *, field: str = "data.path") -> Manifest:
    """Read manifest.json and check that all files it lists are there: shards by size, index files by sha256.

    Args:
        folder: Folder of the data set.
        field: Setting to name in errors.

    Raises:
        DataError: Missing folder or manifest, unknown format, missing or changed files; all problems at once.
    """
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise DataError(Problem(field, folder, "the folder does not exist", f"correct the path, or {_MAKE}"))
    if not path.is_file():
        rule = f"the folder has no {MANIFEST_FILE}: not a data set, or an interrupted one"
        raise DataError(Problem(field, folder, rule, _MAKE))
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(Problem(field, path, f"not readable as JSON ({error})", _MAKE_AGAIN)) from error
    version = document.get("format") if isinstance(document, dict) else None
    if version != MANIFEST_FORMAT:
        rule = f"{path}: this release reads format {MANIFEST_FORMAT}"
        raise DataError(Problem(f"{field}: format", version, rule, _MAKE_AGAIN))
    try:
        manifest = TypeAdapter(Manifest).validate_python(document)
    except ValidationError as error:
        raise DataError(
            [
                Problem(f"{field}: {'.'.join(map(str, e['loc']))}", e.get("input"), f"{path}: {e['msg']}", _MAKE_AGAIN)
                for e in error.errors()[:10]
            ]
        ) from error
    problems = _shard_problems(folder, manifest, field) + _file_problems(folder, manifest, field)
    if problems:
        raise DataError(problems[:20])
    return manifest


def check_use(manifest: Manifest, config: DataConfig, splits: tuple[str, ...]) -> None:
    """Check that the settings fit the data set.

    Args:
        manifest: The data set.
        config: The settings.
        splits: Splits that will be read.

    Raises:
        DataError: Unknown or empty partitions in the view, leaky features that are not allowed, too many frames.
    """
    problems: list[Problem] = []
    view = tuple(manifest.partitions) if config.view is None else config.view
    if not view or len(set(view)) != len(view):
        problems.append(
            Problem("data.view", list(view), "must name each partition once", "remove repeats, or set null")
        )
    for name in view:
        if name not in manifest.partitions:
            problems.append(Problem("data.view", name, "no such partition", nearest(name, manifest.partitions)))
            continue
        for split in splits:
            if manifest.partitions[name].get(split, 0) == 0:
                rule = f"the partition has no {split} clips"
                problems.append(Problem("data.view", name, rule, "take it out of data.view, or make such clips"))
    mode = manifest.provenance.encode_mode
    if mode in LEAKY_ENCODE_MODES and not config.allow_leaky_features:
        rule = f"the features have encode_mode {mode}, so earlier frames may know later ones"
        fix = "encode per-frame or prefix, or set data.allow_leaky_features=true and distrust the errors"
        problems.append(Problem("data.allow_leaky_features", False, rule, fix))
    if config.frames is not None and config.frames > manifest.frames:
        rule = f"the longest clip has {manifest.frames} frames"
        problems.append(Problem("data.frames", config.frames, rule, f"use at most {manifest.frames}"))
    if problems:
        raise DataError(problems)


def _shard_problems(folder: Path, manifest: Manifest, field: str) -> list[Problem]:
    problems = []
    for entry in manifest.shards:
        path = folder / SHARD_FOLDER / entry.name
        # Names come from a file that may have been downloaded: nothing outside the folder may be opened.
        if not _SHARD_NAME.fullmatch(entry.name):
            problems.append(Problem(f"{field}: shards", entry.name, "not a shard's file name", _MAKE_AGAIN))
        elif not path.is_file():
            problems.append(Problem(field, path, "the shard is missing", _MAKE_AGAIN))
        elif (size := path.stat().st_size) != entry.bytes:
            rule = f"the shard has {size} bytes, the manifest says {entry.bytes}"
            problems.append(Problem(field, path, rule, _MAKE_AGAIN))
    return problems


def _file_problems(folder: Path, manifest: Manifest, field: str) -> list[Problem]:
    columns = ["uid", "shard", "length", "partition", "split"]
    columns += [f"{name}_{part}" for name in manifest.dtypes for part in ("offset", "nbytes", "crc32")]
    needed = {*(f"{INDEX_FOLDER}/{column}.npy" for column in columns), KEYS_FILE, MEAN_FRAME_FILE}
    problems = [
        Problem(f"{field}: files", name, "the manifest does not list this file", _MAKE_AGAIN)
        for name in sorted(needed - set(manifest.files))
    ]
    for name, sha256 in manifest.files.items():
        path = folder / name
        if not _LISTED_FILE.fullmatch(name):
            problems.append(Problem(f"{field}: files", name, "not a file of a data set", _MAKE_AGAIN))
        elif not path.is_file():
            problems.append(Problem(field, path, "the file is missing", _MAKE_AGAIN))
        elif hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            problems.append(Problem(field, path, "its sha256 differs from the manifest", _MAKE_AGAIN))
    return problems
