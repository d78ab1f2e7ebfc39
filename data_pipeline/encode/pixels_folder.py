"""A folder of pixels as it is read again: its document checked entry by entry, its clips opened with care."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.encode.documents import read_document
from data_pipeline.errors import DataError, Problem
from data_pipeline.pixels.simulate import PIXELS_FILE
from data_pipeline.schema import SPLITS, Split
from data_pipeline.shard.tar import KEY_RULE, is_valid_key
from data_pipeline.sources.clip_source import as_split
from data_pipeline.sources.labels import PARTITION_RULE, is_valid_partition
from data_pipeline.sources.stored import NpzArray, npz_names, reason

_MAX_PROBLEMS = 20
_MAX_SHOWN = 80
_AGAIN = "make the pixels folder again with `hopescale data simulate`"


@dataclass(frozen=True)
class PixelsClip:
    """An entry of pixels.json.

    Attributes:
        key: Unique name.
        partition: Group that views select by.
        split: train or heldout.
        length: Frames.
        path: Of its .npz, inside the folder.
    """

    key: str
    partition: str
    split: Split
    length: int
    path: Path


@dataclass(frozen=True)
class PixelsFolder:
    """What pixels.json says: the digest of all clips, and the clips in their order."""

    digest: str
    clips: tuple[PixelsClip, ...]


def read_pixels_folder(folder: Path) -> PixelsFolder:
    """Read pixels.json.

    Raises:
        DataError: It is missing, or entries are missing, of other types, given twice, or lead out of the folder.
    """
    document = read_document(folder, PIXELS_FILE, "pixels", "hopescale data simulate")
    digest, entries = document.get("digest"), document.get("clips")
    if not isinstance(digest, str) or not isinstance(entries, list) or not entries:
        rule = "it lacks the digest, a text, or the list of clips"
        raise DataError(Problem("pixels", folder / PIXELS_FILE, rule, _AGAIN))
    problems: list[Problem] = []
    clips: dict[str, PixelsClip] = {}
    for number, entry in enumerate(entries):
        rule = _entry_rule(entry) or (f"the key {entry['key']} is there twice" if entry["key"] in clips else "")
        if rule:
            problems.append(Problem(f"pixels.clips[{number}]", folder / PIXELS_FILE, rule, _AGAIN))
            continue
        key, partition = entry["key"], entry["partition"]
        split = as_split(entry["split"]) or "train"
        clips[key] = PixelsClip(key, partition, split, entry["length"], folder / partition / f"{key}.npz")
    if problems:
        raise DataError(problems[:_MAX_PROBLEMS])
    return PixelsFolder(digest, tuple(clips.values()))


def read_pixels(path: Path, field: str) -> NDArray[Any]:
    """Return one array of a clip's file.

    Raises:
        DataError: The file is missing, a link, damaged, or lacks the array; it is named.
    """
    return _read(path, (field,))[field]


def read_clip(clip: PixelsClip) -> tuple[NDArray[np.uint8], Mapping[str, NDArray[np.float32]]]:
    """Return frames u8 `[F, H, W, 3]` of a clip, and f32 `[rows, numbers]` of its actions, states and extrinsics.

    Raises:
        DataError: The file is missing, a link, damaged, lacks an array, or has arrays of another form; it is named.
    """
    try:
        there = set(npz_names(clip.path))
    except (OSError, ValueError) as error:
        raise _unreadable(clip.path, reason(error)) from error
    fields = ["actions", *(name for name in ("extrinsics", "states") if name in there)]
    arrays = _read(clip.path, ("frames", *fields))
    frames = arrays["frames"]
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or len(frames) != clip.length:
        rule = f"frames are {frames.dtype} {list(frames.shape)}, not uint8 [{clip.length}, H, W, 3]"
        raise DataError(Problem("pixels", clip.path, rule, "store such frames"))
    rows = {}
    for name in fields:
        rows[name] = finite_rows(arrays[name])
        if rows[name] is None:
            rule = f"{name} are {arrays[name].dtype} {list(arrays[name].shape)}, not finite numbers [rows, numbers]"
            raise DataError(Problem("pixels", clip.path, rule, "store such rows"))
    return frames, rows


def finite_rows(array: NDArray[Any]) -> NDArray[np.float32] | None:
    """Return f32 `[rows, numbers]`, or None for anything but some finite numbers of two axes."""
    if array.dtype.kind not in "fiu" or array.ndim != 2 or not array.size:
        return None
    # What f32 cannot hold becomes an infinity, which the next line finds.
    with np.errstate(over="ignore"):
        rows = array.astype(np.float32)
    return rows if np.isfinite(rows).all() else None


def _read(path: Path, fields: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    try:
        return {field: NpzArray(path, path.name, field).read()[0] for field in fields}
    except (OSError, ValueError) as error:
        raise _unreadable(path, reason(error)) from error


def _unreadable(path: Path, rule: str) -> DataError:
    return DataError(Problem("pixels", path, f"clip file cannot be read ({rule})", _AGAIN))


def _entry_rule(entry: Any) -> str:
    """Return what is wrong with a clip's entry, or nothing."""
    if not isinstance(entry, dict):
        return "it is not an object"
    for name, kind in {"key": str, "partition": str, "split": str, "length": int}.items():
        if not isinstance(entry.get(name), kind) or isinstance(entry[name], bool):
            return f"{name} is {str(entry.get(name))[:_MAX_SHOWN]!r}, not of type {kind.__name__}"
    if not is_valid_key(entry["key"]):
        return f"a key has {KEY_RULE}, and {entry['key'][:_MAX_SHOWN]!r} has not"
    if not is_valid_partition(entry["partition"]):
        return f"a partition has {PARTITION_RULE}, and {entry['partition'][:_MAX_SHOWN]!r} has not"
    if entry["split"] not in SPLITS or entry["length"] < 1:
        return f"split {entry['split'][:_MAX_SHOWN]!r} and length {entry['length']} are not possible"
    return ""
