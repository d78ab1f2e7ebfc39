"""Arrays inside .npz archives: stored or deflated, their sizes bounded before anything is allocated."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import IO

import numpy as np

from data_pipeline.sources.npy_file import (
    HEADER_BYTES,
    BadArray,
    NpyHeader,
    check_extent,
    in_c_order,
    parse_header,
)

MAX_READ = 1 << 20
"""Longest single read; also bounds the archive's directory, which zipfile reads at once."""
MAX_INFLATED = 4 << 30
"""Bytes a deflated array may have."""
MAX_RATIO = 1040
"""Deflate cannot shrink anything to less than a 1032nd; a higher claim is a lie."""

_PIECE = 1 << 18
_METHODS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError)


class Npz:
    """An open .npz archive. Close the descriptor yourself."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        """Read the directory of an archive.

        Args:
            descriptor: Of an open file.
            start: Where the archive begins in it.
            size: Bytes of the archive.

        Raises:
            BadArray: It is no zip archive, or one with more than `MAX_READ` bytes of names, or equal names.
        """
        self._size = size
        try:
            self._zip = zipfile.ZipFile(_Window(descriptor, start, size))
        except (*_ZIP_ERRORS, ValueError) as error:
            raise BadArray(f"it is not a .npz archive, or truncated ({error})") from error
        self._members: Mapping[str, zipfile.ZipInfo] = {
            info.filename.removesuffix(".npy"): info for info in self._zip.infolist()
        }
        if len(self._members) != len(self._zip.infolist()):
            raise BadArray("two of its arrays have the same name")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the arrays, as `numpy.savez` was given them."""
        return tuple(self._members)

    def header(self, name: str) -> NpyHeader:
        """Return the checked header of an array.

        Raises:
            BadArray: There is no such array, it is encrypted, or none that is taken here.
        """
        return self._read(name, header_only=True)[0]

    def read(self, name: str) -> np.ndarray:
        """Return an array, C-ordered; its checksum is checked.

        Raises:
            BadArray: As for `header`, or its bytes are damaged.
        """
        return self._read(name, header_only=False)[1]

    def _read(self, name: str, *, header_only: bool) -> tuple[NpyHeader, np.ndarray]:
        info = self._checked(name)
        try:
            with self._zip.open(info) as file:
                head = _read_up_to(file, min(info.file_size, HEADER_BYTES))
                header = parse_header(head)
                check_extent(header, info.file_size)
                if header_only:
                    return header, np.empty(0)
                values = np.empty(header.nbytes, np.uint8)
                _fill(file, values.data, head[header.start :])
        except _ZIP_ERRORS as error:
            raise BadArray(f"its bytes are damaged ({error})") from error
        return header, in_c_order(header, values)

    def _checked(self, name: str) -> zipfile.ZipInfo:
        info = self._members.get(name)
        if info is None:
            raise BadArray(f"the archive has no such array, only {', '.join(self.names[:8]) or 'none'}")
        if info.flag_bits & 1:
            raise BadArray("it is encrypted")
        if info.compress_type not in _METHODS:
            raise BadArray(f"it is compressed by method {info.compress_type}, neither stored nor deflated")
        if info.header_offset < 0 or info.header_offset + info.compress_size > self._size:
            raise BadArray(f"it claims {info.compress_size} bytes of an archive of {self._size}")
        stored = info.compress_type == zipfile.ZIP_STORED
        limit = info.compress_size if stored else min(MAX_INFLATED, MAX_RATIO * info.compress_size)
        if info.file_size > limit or (stored and info.file_size != limit):
            raise BadArray(
                f"it claims {info.file_size} bytes, {_METHODS[info.compress_type]} in {info.compress_size}; "
                f"at most {limit} are possible or allowed"
            )
        return info


def _read_up_to(file: IO[bytes], size: int) -> bytes:
    content = b""
    while len(content) < size:
        piece = file.read(size - len(content))
        if not piece:
            break
        content += piece
    return content


def _fill(file: IO[bytes], values: memoryview, first: bytes) -> None:
    values[: len(first)] = first
    at = len(first)
    while at < len(values):
        piece = file.read(min(_PIECE, len(values) - at))
        if not piece:
            raise EOFError(f"{len(values) - at} bytes are missing")
        values[at : at + len(piece)] = piece
        at += len(piece)


class _Window(io.RawIOBase):
    """A part of an open file, as zipfile wants it, that refuses to read much at once."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        super().__init__()
        self._descriptor, self._start, self._size, self._at = descriptor, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if at < 0:
            raise OSError("a place before the start of the archive")
        self._at = at
        return at

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._size - self._at, 0)
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > MAX_READ:
            raise zipfile.BadZipFile(f"its directory claims {wanted} bytes")
        content = os.pread(self._descriptor, wanted, self._start + self._at)
        self._at += len(content)
        return content
