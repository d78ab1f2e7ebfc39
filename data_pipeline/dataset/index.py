"""The index of a data set: one memory-mapped column a file, one row a clip, in the order of the shards.

| column | type | what |
|---|---|---|
| uid | u64 | identity of the clip, from its key |
| shard | i32 | row of the manifest's `shards` |
| length | i32 | stored frames |
| partition | i16 | row of the manifest's `partitions` |
| split | i8 | 0 train, 1 heldout |
| rows | i32 | recorded rows of actions |
| key_end | i64 | where the clip's key ends in keys.txt, before the newline |
| FIELD_offset, FIELD_nbytes | i64 | where the field's values lie in the shard |
| FIELD_checksum | u32 | of those bytes |
| frame_checksum | u32, one a frame | of each frame's features, all clips end to end |

In a zarr group, FIELD_offset is the clip's row in the arrays.
"""

from __future__ import annotations

import hashlib
import io
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.cache import write_bytes
from data_pipeline.order import uid
from data_pipeline.schema import SPLITS, Manifest
from data_pipeline.shard.tar import Payload

INDEX_FOLDER = "index"
KEYS_FILE = "keys.txt"
FRAME_COLUMN = "frame_checksum"
COLUMNS: Mapping[str, type] = {
    "uid": np.uint64,
    "shard": np.int32,
    "length": np.int32,
    "partition": np.int16,
    "split": np.int8,
    "rows": np.int32,
    "key_end": np.int64,
}
FIELD_COLUMNS: Mapping[str, type] = {"offset": np.int64, "nbytes": np.int64, "checksum": np.uint32}


@dataclass(frozen=True)
class Row:
    """One clip of the index."""

    key: str
    shard: int
    length: int
    partition: int
    split: str
    rows: int
    payloads: Mapping[str, Payload]


@dataclass
class IndexWriter:
    """Collects rows, in the order of the shards, and writes the columns."""

    fields: tuple[str, ...]
    _keys: list[str] = field(default_factory=list)
    _columns: dict[str, list[int]] = field(default_factory=dict)
    _frames: list[int] = field(default_factory=list)
    _key_end: int = -1

    def add(self, row: Row) -> None:
        """Append one clip."""
        self._keys.append(row.key)
        self._key_end += len(row.key) + 1
        values = {
            "uid": uid(row.key),
            "shard": row.shard,
            "length": row.length,
            "partition": row.partition,
            "split": SPLITS.index(row.split),
            "rows": row.rows,
            "key_end": self._key_end,
        }
        for name in self.fields:
            payload = row.payloads[name]
            values |= {
                f"{name}_offset": payload.offset,
                f"{name}_nbytes": payload.nbytes,
                f"{name}_checksum": payload.checksum,
            }
        for column, value in values.items():
            self._columns.setdefault(column, []).append(value)
        self._frames += row.payloads["features"].frame_checksums

    def write(self, out: Path) -> dict[str, str]:
        """Write columns and keys into a data set's folder, and return their sha256 by relative path."""
        (out / INDEX_FOLDER).mkdir(exist_ok=True)
        types = dict(COLUMNS) | {f"{n}_{part}": kind for n in self.fields for part, kind in FIELD_COLUMNS.items()}
        arrays = {column: np.array(self._columns.get(column, []), kind) for column, kind in types.items()}
        arrays[FRAME_COLUMN] = np.array(self._frames, np.uint32)
        digests = {}
        for column, array in arrays.items():
            name = f"{INDEX_FOLDER}/{column}.npy"
            digests[name] = save_array(out / name, array)
        text = "".join(f"{key}\n" for key in self._keys).encode("ascii")
        write_bytes(out / KEYS_FILE, text)
        return digests | {KEYS_FILE: hashlib.sha256(text).hexdigest()}


def save_array(path: Path, array: np.ndarray) -> str:
    """Write a .npy file so that it is all there or not at all, and return its sha256 in hex."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    content = buffer.getvalue()
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


class Index:
    """The columns of an opened data set, memory-mapped."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Open the index of a data set whose files `load_manifest` has checked."""
        self.folder = folder
        self._manifest = manifest

    def column(self, name: str) -> np.ndarray:
        """Return one column, `[num_clips]`."""
        column = np.load(self.folder / INDEX_FOLDER / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        # The same mapping, without what numpy's memmap does in Python for each number.
        return column.view(np.ndarray)

    @cached_property
    def frame_starts(self) -> NDArray[np.int64]:
        """Where each clip's frames start in `frame_checksum`: i64 `[num_clips + 1]`."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.column("length"), dtype=np.int64)])

    @cached_property
    def _keys(self) -> tuple[mmap.mmap | bytes, NDArray[np.int64]]:
        with (self.folder / KEYS_FILE).open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self._manifest.num_clips else b""
        return content, self.column("key_end")

    def key(self, row: int) -> str:
        """Return the key of one clip."""
        content, ends = self._keys
        return content[int(ends[row - 1]) + 1 if row else 0 : int(ends[row])].decode("ascii")

    def keys(self) -> list[str]:
        """Return all keys, in the order of the index."""
        return (self.folder / KEYS_FILE).read_bytes().decode("ascii").split("\n")[:-1]

    def rows(self) -> Iterator[Row]:
        """Yield every clip."""
        names = list(self._manifest.dtypes)
        columns = {name: self.column(name) for name in COLUMNS if name not in ("uid", "key_end")}
        payloads = {name: [self.column(f"{name}_{part}") for part in FIELD_COLUMNS] for name in names}
        frames = self.column(FRAME_COLUMN)
        for number, key in enumerate(self.keys()):
            own = tuple(frames[self.frame_starts[number] : self.frame_starts[number + 1]].tolist())
            yield Row(
                key,
                int(columns["shard"][number]),
                int(columns["length"][number]),
                int(columns["partition"][number]),
                SPLITS[columns["split"][number]],
                int(columns["rows"][number]),
                {
                    name: Payload(int(at[number]), int(size[number]), int(check[number]), own * (name == "features"))
                    for name, (at, size, check) in payloads.items()
                },
            )
