"""Plain USTAR shards whose bytes depend on their content alone, written so that a final name means a complete file.

The large member of a clip starts on a page boundary: its .npy header is padded with spaces, which every reader of the
format accepts, so no extra member is needed.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.checksum import ChecksumName, checksum_function, combined
from data_pipeline.shard.npy import npy_header
from data_pipeline.shard.stream import HashedFile, Piece

BLOCK = 512
ALIGNED_FIELD = "features"
KEY_RULE = "letters, digits, _, - and / only, at most 80 bytes, no dots"
_KEY = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")


def is_valid_key(key: str) -> bool:
    """Return whether `key` may name a clip: a dot would make WebDataset readers merge two clips."""
    return len(key) <= 80 and _KEY.fullmatch(key) is not None


@dataclass(frozen=True)
class Payload:
    """Where the values of one field lie inside a shard.

    Attributes:
        offset: First byte of the values, after the .npy header.
        nbytes: Number of bytes.
        checksum: Of these bytes.
        frame_checksums: Of the bytes of each frame, for features; else empty.
    """

    offset: int
    nbytes: int
    checksum: int
    frame_checksums: tuple[int, ...] = ()


def measured(
    name: ChecksumName,
    checksum: Callable[[NDArray[np.uint8]], int],
    offset: int,
    field: str,
    array: np.ndarray,
) -> Payload:
    """Return where the values of one field lie and their checksums: of the whole, and of each frame of features.

    Args:
        name: Of the checksum.
        checksum: The checksum.
        offset: Of the values in their shard.
        field: The field.
        array: Its values, C-ordered.
    """
    values = array.reshape(-1).view(np.uint8)
    if field != "features":
        return Payload(offset, len(values), checksum(values))
    parts = tuple(checksum(frame) for frame in values.reshape(len(array), -1))
    return Payload(offset, len(values), combined(name, parts, len(values) // len(array)), parts)


class ShardWriter:
    """Writes one tar file: `add` clips in order, then `finish`, before which the final name does not exist."""

    def __init__(self, path: Path, checksum: ChecksumName, *, sha256: bool = True) -> None:
        """Start a shard.

        Args:
            path: Its final path.
            checksum: Of the payloads.
            sha256: Also hash the file as it is written; without, `finish` returns an empty digest.
        """
        self.path = path
        self.num_clips = 0
        self._checksum_name: ChecksumName = checksum
        self._checksum = checksum_function(checksum)
        self._file = HashedFile(path, path.with_name(path.name + ".tmp"), sha256=sha256)

    @property
    def num_bytes(self) -> int:
        """Bytes written so far."""
        return self._file.num_bytes

    def add(self, key: str, arrays: Mapping[str, np.ndarray], meta: bytes) -> dict[str, Payload]:
        """Append the members of one clip, sorted by name.

        Args:
            key: Clip key.
            arrays: C-ordered values by field name, as they are to be stored; bfloat16 and fp8 as unsigned integers.
                They must not change before the next call returns.
            meta: Content of `KEY.meta.json`.

        Returns:
            Where the values of each array were put.
        """
        payloads: dict[str, Payload] = {}
        pieces: list[Piece] = []
        start = self.num_bytes
        for field in sorted([*arrays, "meta"]):
            if field == "meta":
                start = self._lay(pieces, start, f"{key}.meta.json", b"", np.frombuffer(meta, np.uint8))
                continue
            array = arrays[field]
            values = array.reshape(-1).view(np.uint8)
            at = start + BLOCK
            header = npy_header(array.dtype.str, array.shape, at if field == ALIGNED_FIELD else None)
            payloads[field] = measured(self._checksum_name, self._checksum, at + len(header), field, array)
            start = self._lay(pieces, start, f"{key}.{field}.npy", header, values)
        self._file.write(pieces)
        self.num_clips += 1
        return payloads

    def finish(self) -> str:
        """Complete the shard under its final name, safe against a power cut, and return its sha256 in hex."""
        self._file.write([bytes(2 * BLOCK)])
        return self._file.finish()

    def discard(self) -> None:
        """Remove an unfinished shard."""
        self._file.discard()

    def _lay(self, pieces: list[Piece], start: int, name: str, head: bytes, body: NDArray[np.uint8]) -> int:
        info = tarfile.TarInfo(name)
        info.size = len(head) + len(body)
        info.mode = 0o444
        padding = -info.size % BLOCK
        pieces += [info.tobuf(tarfile.USTAR_FORMAT) + head, body, bytes(padding)]
        return start + BLOCK + info.size + padding
