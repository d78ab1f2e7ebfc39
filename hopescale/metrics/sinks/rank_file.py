"""One memory-mapped file per rank, through which a rank hands its latest numbers to the node's Prometheus sidecar.

The writer never blocks and needs no reader; a reader never sees half a record, also when the writer was killed in the
middle of one. Layout (native byte order, both sides run on one node):

    magic [16 bytes] | slot 0 | slot 1        slot: version u64 | length u32 | crc32 u32 | JSON [length bytes]

Records alternate between the slots with a growing version. A slot under construction has version 0, and the checksum
covers version and payload, so a reader takes the valid slot with the highest version.

Imports the standard library only: the sidecar must start fast.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import time as clock
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAGIC = b"hopescale-rank-1"
SLOT_BYTES = 64 * 1024
FILE_BYTES = len(MAGIC) + 2 * SLOT_BYTES
_VERSION = struct.Struct("@Q")
_SIZES = struct.Struct("@II")
_HEADER_BYTES = _VERSION.size + _SIZES.size

Sample = tuple[str, dict[str, str], float]
"""Catalog key, Prometheus labels, value."""


class RankFile:
    """The writing side, owned by one rank.

    Args:
        folder: the node's folder, created when missing; see `hopescale.metrics.sinks.prometheus.rank_folder`.
        rank: global rank.

    Raises:
        OSError: the file cannot be created or its disk is full.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank-{rank:05d}.bin"
        self.rank = rank
        temporary = self.path.with_suffix(".tmp")
        file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            # Without reserved blocks a full disk would kill the trainer by SIGBUS at some later write.
            os.posix_fallocate(file, 0, FILE_BYTES)
            self._map = mmap.mmap(file, FILE_BYTES)
        finally:
            os.close(file)
        self._map[: len(MAGIC)] = MAGIC
        os.replace(temporary, self.path)
        self._version = 0

    def write(self, samples: Sequence[Sample], *, time: float) -> None:
        """Replaces the record.

        Args:
            samples: all numbers the rank wants to show.
            time: Unix seconds they belong to.

        Raises:
            ValueError: the record is longer than a slot.
        """
        payload = json.dumps({"rank": self.rank, "time": time, "samples": samples}).encode()
        if len(payload) > SLOT_BYTES - _HEADER_BYTES:
            raise ValueError(f"record of {len(payload)} bytes does not fit into {SLOT_BYTES - _HEADER_BYTES}")
        self._version += 1
        offset = _slot_offset(self._version % 2)
        version = _VERSION.pack(self._version)
        body = offset + _HEADER_BYTES
        self._map[offset : offset + _VERSION.size] = bytes(_VERSION.size)
        self._map[body : body + len(payload)] = payload
        sizes = _SIZES.pack(len(payload), zlib.crc32(payload, zlib.crc32(version)))
        self._map[offset + _VERSION.size : body] = sizes
        self._map[offset : offset + _VERSION.size] = version

    def close(self) -> None:
        """Releases the mapping; the record stays on disk and stays readable."""
        self._map.close()


def read_rank_file(path: Path, *, attempts: int = 50) -> dict[str, Any] | None:
    """The last complete record `{"rank", "time", "samples"}` of a rank, or None when it has written none.

    Args:
        path: a file made by `RankFile`.
        attempts: how often to look again when the writer overtook the reader in both slots.

    Raises:
        OSError: the file cannot be read.
    """
    for _ in range(attempts):
        content = path.read_bytes()
        if not content.startswith(MAGIC) or len(content) != FILE_BYTES:
            return None
        newest = max(_valid_slots(content), default=None)
        if newest is not None:
            return json.loads(newest[1])
        if not any(content[len(MAGIC) :]):
            return None
        clock.sleep(0.001)
    return None


def _slot_offset(slot: int) -> int:
    return len(MAGIC) + slot * SLOT_BYTES


def _valid_slots(content: bytes) -> list[tuple[int, bytes]]:
    """(version, payload) of the slots whose checksum holds."""
    found = []
    for offset in (_slot_offset(0), _slot_offset(1)):
        (version,) = _VERSION.unpack_from(content, offset)
        length, checksum = _SIZES.unpack_from(content, offset + _VERSION.size)
        payload = content[offset + _HEADER_BYTES : offset + min(_HEADER_BYTES + length, SLOT_BYTES)]
        if version > 0 and zlib.crc32(payload, zlib.crc32(_VERSION.pack(version))) == checksum:
            found.append((version, payload))
    return found
