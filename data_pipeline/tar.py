"""Plain USTAR shards whose bytes depend on their content alone, written so that a final name means a complete file.

The large member of a clip starts on a page boundary: its .npy header is padded with spaces, which every reader of the
format accepts, so no extra member is needed.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.cache import sync_folder

BLOCK = 512
PAGE = 4096
ALIGNED_FIELD = "features"
KEY_RULE = "letters, digits, _, - and / only, at most 80 bytes, no dots"
_KEY = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")


def is_valid_key(key: str) -> bool:
    """Return whether `key` may name a clip: a dot would make WebDataset readers merge two clips."""
    return len(key.encode()) <= 80 and _KEY.fullmatch(key) is not None


@dataclass(frozen=True)
class Payload:
    """Where the values of one field lie inside a shard.

    Attributes:
        offset: First byte of the values, after the .npy header.
        nbytes: Number of bytes.
        crc32: zlib.crc32 of these bytes.
    """

    offset: int
    nbytes: int
    crc32: int


class ShardWriter:
    """Writes one tar file: `add` clips in order, then `finish`, before which the final name does not exist."""

    def __init__(self, path: Path) -> None:
        """Start a shard whose final path is `path`."""
        self.path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._file = self._temporary.open("wb")
        self._sha256 = hashlib.sha256()
        self.num_bytes = 0
        self.num_clips = 0

    def add(self, key: str, arrays: dict[str, np.ndarray], meta: bytes) -> dict[str, Payload]:
        """Append the members of one clip, sorted by name.

        Args:
            key: Clip key.
            arrays: Values by field name.
            meta: Content of `KEY.meta.json`.

        Returns:
            Where the values of each array were put.
        """
        payloads: dict[str, Payload] = {}
        for field in sorted([*arrays, "meta"]):
            if field == "meta":
                self._write_member(f"{key}.meta.json", meta)
                continue
            array = np.ascontiguousarray(arrays[field])
            start = self.num_bytes + BLOCK
            header = npy_header(array, start if field == ALIGNED_FIELD else None)
            values = array.tobytes()
            payloads[field] = Payload(start + len(header), len(values), zlib.crc32(values))
            self._write_member(f"{key}.{field}.npy", header, values)
        self.num_clips += 1
        return payloads

    def finish(self) -> str:
        """Complete the shard under its final name, safe against a power cut, and return its sha256 in hex."""
        self._write(bytes(2 * BLOCK))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.rename(self.path)
        sync_folder(self.path.parent)
        return self._sha256.hexdigest()

    def discard(self) -> None:
        """Remove an unfinished shard."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write_member(self, name: str, *parts: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = sum(len(part) for part in parts)
        info.mode = 0o444
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        for part in parts:
            self._write(part)
        self._write(bytes(-info.size % BLOCK))

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._sha256.update(content)
        self.num_bytes += len(content)


def npy_header(array: np.ndarray, start: int | None = None) -> bytes:
    """Return the .npy header (format 1.0) of a C-ordered array.

    Args:
        array: Its type and shape are described.
        start: Offset of the header in the file when the values shall begin on a page boundary.
    """
    description = np.lib.format.header_data_from_array_1_0(array)
    text = "{" + "".join(f"'{name}': {description[name]!r}, " for name in sorted(description)) + "}"
    length = 10 + len(text) + 1
    if start is None:
        length += -length % 64
    else:
        length += -(start + length) % PAGE
    text = text.ljust(length - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1")
