"""Whether a manifest agrees with itself and with the sizes of its files: what one pass over headers can tell."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from data_pipeline.dataset.index import COLUMNS, FIELD_COLUMNS, FRAME_COLUMN, INDEX_FOLDER, KEYS_FILE
from data_pipeline.dtypes import SCALED
from data_pipeline.schema import FIELDS, SPLITS, Manifest
from data_pipeline.shard.npy import MAX_HEADER, NpyHeader, parse_npy_header
from data_pipeline.shard.tar import BLOCK
from data_pipeline.shard.walk import open_regular

MEAN_FRAME_FILE = "mean_frame.npy"
STATISTICS_FILE = "stats.npz"
MAX_KEY = 80
MAX_STATISTICS = 1 << 30
SHARD_FOLDER = "shards"
GROUP_FILES = "group_files.json"
"""The files of a zarr group, which is one shard by name and thousands of files on disk."""
MAX_GROUP_FILES = 64 << 20

_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Disagreement(ValueError):
    """One entry of a manifest or one of its files, its value, and the rule it breaks."""

    def __init__(self, entry: str, value: object, rule: str) -> None:
        """Take entry, value and rule."""
        super().__init__(f"{entry}={value}: {rule}")
        self.entry, self.value, self.rule = entry, value, rule


def is_shard_name(name: str) -> bool:
    """Return whether `name` may be a shard's: a plain file name, which leads out of no folder."""
    return _SHARD_NAME.fullmatch(name) is not None


def index_columns(manifest: Manifest) -> dict[str, type]:
    """Return the number type of each column of a data set's index."""
    fields = {f"{name}_{part}": kind for name in manifest.dtypes for part, kind in FIELD_COLUMNS.items()}
    return {**COLUMNS, **fields, FRAME_COLUMN: np.uint32}


def manifest_files(manifest: Manifest) -> list[str]:
    """Return the relative paths of all files a data set has beside its shards."""
    columns = sorted(f"{INDEX_FOLDER}/{column}.npy" for column in index_columns(manifest))
    return [*columns, KEYS_FILE, MEAN_FRAME_FILE, STATISTICS_FILE]


def most_bytes(manifest: Manifest, name: str) -> int:
    """Return how many bytes one of `manifest_files` may have at most."""
    if name == KEYS_FILE:
        return (MAX_KEY + 1) * manifest.num_clips
    if name == STATISTICS_FILE:
        return MAX_STATISTICS
    if name == GROUP_FILES:
        return MAX_GROUP_FILES
    head = MAX_HEADER + 12
    if name == MEAN_FRAME_FILE:
        return head + 4 * manifest.tokens * manifest.encoder_dim
    column = Path(name).stem
    values = manifest.num_clips * (manifest.frames if column == FRAME_COLUMN else 1)
    return head + values * np.dtype(index_columns(manifest)[column]).itemsize


def manifest_disagreements(manifest: Manifest) -> Iterator[Disagreement]:
    """Yield what is wrong with the entries of a manifest, without looking at any file."""
    yield from _sizes(manifest)
    yield from _fields(manifest)
    yield from _counts(manifest)
    yield from _shards(manifest)
    needed, listed = set(manifest_files(manifest)), set(manifest.files)
    for name in sorted(needed - listed):
        yield Disagreement("files", name, "the manifest does not list this file")
    for name in sorted(listed - needed - ({GROUP_FILES} if manifest.container == "zarr" else set())):
        yield Disagreement("files", name, "not a file of a data set")
    for name, sha256 in sorted(manifest.files.items()):
        if not _SHA256.fullmatch(sha256):
            yield Disagreement(f"files.{name}", sha256, "must be a sha256 of 64 hex digits")


def _sizes(manifest: Manifest) -> Iterator[Disagreement]:
    least = {"num_clips": 1, "frames": 2, "tokens": 1, "encoder_dim": 1, "action_dim": 1}
    for name, smallest in (least | {"state_dim": 0, "extrinsics_dim": 0}).items():
        value = getattr(manifest, name)
        if not smallest <= value < 1 << 31:
            yield Disagreement(name, value, f"must be at least {smallest}, and less than 2**31")
    if not 0 <= manifest.statistics_share <= 1:
        yield Disagreement("statistics_share", manifest.statistics_share, "must lie between 0 and 1")
    if not _SHA256.fullmatch(manifest.fingerprint):
        yield Disagreement("fingerprint", manifest.fingerprint, "must be a sha256 of 64 hex digits")
    rows, columns = manifest.provenance.grid
    if rows < 1 or columns < 1 or rows * columns != manifest.tokens:
        yield Disagreement("provenance.grid", [rows, columns], f"does not have {manifest.tokens} places")


def _fields(manifest: Manifest) -> Iterator[Disagreement]:
    for name in manifest.dtypes:
        if name not in FIELDS:
            yield Disagreement("dtypes", name, f"not a field; fields are {', '.join(FIELDS)}")
        elif name != "features" and manifest.dtypes[name] != "float32":
            yield Disagreement(f"dtypes.{name}", manifest.dtypes[name], "must be float32")
    wanted = {
        "features": True,
        "actions": True,
        "states": manifest.state_dim > 0,
        "extrinsics": manifest.extrinsics_dim > 0,
        "features_scale": manifest.dtypes.get("features") == SCALED,
    }
    for name, there in wanted.items():
        if there != (name in manifest.dtypes):
            rule = "has no place here, by the other entries" if name in manifest.dtypes else "is missing"
            yield Disagreement("dtypes", list(manifest.dtypes), f"the field {name} {rule}")


def _counts(manifest: Manifest) -> Iterator[Disagreement]:
    for name, counts in manifest.partitions.items():
        if not name or len(name) > MAX_KEY or not name.isprintable():
            yield Disagreement("partitions", name[:MAX_KEY], f"a name has 1 to {MAX_KEY} printable characters")
        if not set(counts) <= set(SPLITS) or any(count < 0 for count in counts.values()):
            yield Disagreement(f"partitions.{name}", counts, f"must count the clips of {' and '.join(SPLITS)}")
    counted = sum(sum(counts.values()) for counts in manifest.partitions.values())
    if counted != manifest.num_clips:
        yield Disagreement("num_clips", manifest.num_clips, f"the partitions have {counted} clips")


def _shards(manifest: Manifest) -> Iterator[Disagreement]:
    if manifest.shard_folder not in (SHARD_FOLDER, "."):
        yield Disagreement("shard_folder", manifest.shard_folder, f"must be {SHARD_FOLDER} or .")
    seen: set[str] = set()
    for entry in manifest.shards:
        if not is_shard_name(entry.name) or entry.name in seen:
            yield Disagreement("shards", entry.name[:200], "not a shard's file name, or one named twice")
        seen.add(entry.name)
    if manifest.container != "tar":
        return
    for entry in manifest.shards:
        if entry.num_clips < 1 or not 2 * BLOCK <= entry.bytes < 1 << 62 or not _SHA256.fullmatch(entry.sha256):
            value = [entry.bytes, entry.num_clips, entry.sha256]
            yield Disagreement(f"shards.{entry.name}", value, "these bytes, clips and sha256 are not possible")
    held = sum(entry.num_clips for entry in manifest.shards)
    if held != manifest.num_clips:
        yield Disagreement("num_clips", manifest.num_clips, f"the shards have {held} clips")


def header_disagreements(folder: Path, manifest: Manifest) -> Iterator[Disagreement]:
    """Yield what is wrong with the types and sizes of a data set's index and mean frame, from their headers alone.

    Args:
        folder: Of the data set, whose files are there.
        manifest: Without disagreements of its own.
    """
    shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(index_columns(manifest), (manifest.num_clips,))
    shapes[FRAME_COLUMN] = None
    headers: dict[str, NpyHeader] = {}
    for column, kind in index_columns(manifest).items():
        name = f"{INDEX_FOLDER}/{column}.npy"
        try:
            headers[column] = _header(folder / name, np.dtype(kind).str, shapes[column])
        except (OSError, ValueError) as error:
            yield Disagreement(f"files.{name}", "damaged", str(error))
    try:
        _header(folder / MEAN_FRAME_FILE, "<f4", (manifest.tokens, manifest.encoder_dim))
    except (OSError, ValueError) as error:
        yield Disagreement(f"files.{MEAN_FRAME_FILE}", "damaged", str(error))
    if len(headers) == len(shapes):
        yield from _length_disagreements(folder, manifest, headers)


def _length_disagreements(folder: Path, manifest: Manifest, headers: Mapping[str, NpyHeader]) -> Iterator[Disagreement]:
    lengths = np.load(folder / INDEX_FOLDER / "length.npy", mmap_mode="r", allow_pickle=False)
    frames, (stored,) = int(lengths.sum(dtype=np.int64)), headers[FRAME_COLUMN].shape
    if int(lengths.min()) < 2 or int(lengths.max()) != manifest.frames:
        rule = f"clips have {lengths.min()} to {lengths.max()} frames"
        yield Disagreement("frames", manifest.frames, rule)
    elif frames != stored:
        yield Disagreement(f"files.{INDEX_FOLDER}/{FRAME_COLUMN}.npy", stored, f"the clips have {frames} frames")
    ends = np.load(folder / INDEX_FOLDER / "key_end.npy", mmap_mode="r", allow_pickle=False)
    size = (folder / KEYS_FILE).stat().st_size
    if size != int(ends[-1]) + 1:
        yield Disagreement(f"files.{KEYS_FILE}", size, f"the keys end at byte {int(ends[-1])} by the index")


def _header(path: Path, descr: str, shape: tuple[int, ...] | None) -> NpyHeader:
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        header = parse_npy_header(os.pread(descriptor, MAX_HEADER + 12, 0), (descr,))
    finally:
        os.close(descriptor)
    if header.shape != shape and (shape is not None or len(header.shape) != 1):
        wanted = "one dimension" if shape is None else list(shape)
        raise ValueError(f"it has the shape {list(header.shape)}, not {wanted}")
    expected = header.nbytes + int(np.prod(header.shape, dtype=object)) * np.dtype(descr).itemsize
    if size != expected:
        raise ValueError(f"it has {size} bytes, its header says {expected}")
    return header
