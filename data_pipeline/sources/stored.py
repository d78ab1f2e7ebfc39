"""One array of a clip where it lies: a .npy file, part of a tar, or a member of a .npz, looked at and read alike."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from data_pipeline.shard.walk import open_regular
from data_pipeline.sources.npy_file import BadArray, header_at, values_at
from data_pipeline.sources.npz_file import Npz


class Seen(NamedTuple):
    """What is known of a stored array without its values."""

    dtype: str
    """numpy's name of its type."""
    shape: tuple[int, ...]
    stamp: str
    """Changes whenever its file does."""
    fortran: bool = False
    """Its first axis varies fastest."""


class StoredArray(Protocol):
    """An array that has not been read yet. Its text names it for a user."""

    def look(self) -> Seen:
        """Return type and shape from its header.

        Raises:
            OSError: Its file cannot be opened.
            ValueError: It is not an array that can be taken.
        """
        ...

    def read(self) -> tuple[np.ndarray, str]:
        """Return the array, C-ordered, and its stamp.

        Raises:
            OSError: Its file cannot be read.
            ValueError: It is not an array that can be taken.
        """
        ...


@dataclass(frozen=True)
class NpyArray:
    """A .npy file, or one that is part of another file.

    Attributes:
        path: Of the file.
        shown: Name for a user.
        start: Where the .npy begins in the file.
        size: Its bytes; None means the whole file.
    """

    path: Path
    shown: str
    start: int = 0
    size: int | None = None

    def __str__(self) -> str:
        return self.shown

    def look(self) -> Seen:
        """See `StoredArray`."""
        with opened(self.path, self.start, self.size) as (descriptor, size, stamp):
            header = header_at(descriptor, self.start, size)
            return Seen(header.dtype, header.shape, stamp, header.fortran)

    def read(self) -> tuple[np.ndarray, str]:
        """See `StoredArray`."""
        with opened(self.path, self.start, self.size) as (descriptor, size, stamp):
            return values_at(descriptor, self.start, header_at(descriptor, self.start, size)), stamp


@dataclass(frozen=True)
class NpzArray:
    """An array inside a .npz archive, which may itself be part of another file.

    Attributes:
        path: Of the file.
        shown: Name of the archive for a user.
        name: Of the array.
        start: Where the archive begins in the file.
        size: Its bytes; None means the whole file.
    """

    path: Path
    shown: str
    name: str
    start: int = 0
    size: int | None = None

    def __str__(self) -> str:
        return f"{self.shown}, array {self.name}"

    def look(self) -> Seen:
        """See `StoredArray`."""
        with opened(self.path, self.start, self.size) as (descriptor, size, stamp):
            header = Npz(descriptor, self.start, size).header(self.name)
            return Seen(header.dtype, header.shape, stamp, header.fortran)

    def read(self) -> tuple[np.ndarray, str]:
        """See `StoredArray`."""
        with opened(self.path, self.start, self.size) as (descriptor, size, stamp):
            return Npz(descriptor, self.start, size).read(self.name), stamp


def npz_names(path: Path, start: int = 0, size: int | None = None) -> tuple[str, ...]:
    """Return the names of the arrays in an archive, which may be part of a file.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is not a regular file or not a .npz.
    """
    with opened(path, start, size) as (descriptor, extent, _):
        return Npz(descriptor, start, extent).names


@contextmanager
def opened(path: Path, start: int = 0, size: int | None = None) -> Iterator[tuple[int, int, str]]:
    """Open a regular file, or a part of one, and yield its descriptor, the part's bytes, and a stamp.

    Raises:
        OSError: It cannot be opened, or is a link.
        ValueError: It is not a regular file, or the part reaches beyond its end.
    """
    descriptor = open_regular(path)
    try:
        status = os.fstat(descriptor)
        extent = status.st_size - start if size is None else size
        if extent < 0 or start + extent > status.st_size:
            raise BadArray(f"it ends at byte {status.st_size}, before the array in it does")
        part = "" if start == 0 and size is None else f":{start}:{extent}"
        yield descriptor, extent, f"{status.st_size}:{status.st_mtime_ns}{part}"
    finally:
        os.close(descriptor)


def read_small(path: Path, limit: int, start: int = 0, size: int | None = None) -> bytes:
    """Return the bytes of a small regular file, or of a small part of one.

    Raises:
        OSError: It cannot be opened, or is a link.
        ValueError: It is not a regular file, or longer than `limit` bytes.
    """
    with opened(path, start, size) as (descriptor, extent, _):
        if extent > limit:
            raise BadArray(f"it has {extent} bytes, more than {limit}")
        content = b""
        # One read may return less than it was asked for.
        while piece := os.pread(descriptor, extent - len(content), start + len(content)):
            content += piece
        if len(content) < extent:
            raise BadArray(f"it was truncated while it was read: {extent - len(content)} bytes are missing")
        return content


def parse_json(content: bytes | str) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        ValueError: It is not readable, nested too deeply, or not an object.
    """
    try:
        document = json.loads(content)
    except RecursionError:
        raise BadArray("it is nested too deeply") from None
    except ValueError as error:
        raise BadArray(f"it is not readable as JSON ({error})") from None
    if not isinstance(document, dict):
        raise BadArray("it is not a JSON object")
    return document


def reason(error: OSError | ValueError) -> str:
    """Return what is wrong with a file, without its name."""
    if not isinstance(error, OSError):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "the file is missing"
    if error.errno == errno.ELOOP:
        return "it is a link, which is not followed; put the file itself there"
    return f"it cannot be read ({error.strerror or error})"


def printable(text: str) -> str:
    """Return a name from a file system or archive so that every terminal can show it."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
