"""The .npy files of other people: read without evaluating anything, and never more than the file holds.

The format is numpy's (NEP 1). Shards, whose types and layout are known, are read by `shard/npy.py`; here every number
type that can become a feature is taken, in either order of the axes, and everything else is refused by name.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shard.npy import MAGIC, MAX_HEADER
from data_pipeline.shard.walk import open_regular

MAX_DIMENSIONS = 8
HEADER_BYTES = MAX_HEADER + 12
"""A file's first bytes, as many as `parse_header` can ask for."""

_LENGTH_BYTES = {1: 2, 2: 4, 3: 4}
_TOKEN = re.compile(
    r"[ \t\r\n\f]*(?:'(?P<single>[^'\\]{0,64})'|\"(?P<double>[^\"\\]{0,64})\"|(?P<word>True|False)"
    r"|(?P<number>0|[1-9][0-9]{0,17})(?P<long>L?)|(?P<mark>[{}()\[\],:]))"
)
_NUMBER_TYPE = re.compile(r"(?P<order>[<>=|]?)(?P<name>f[248]|[iu][1248])")
_OTHER_TYPES = {
    "O": "Python objects, which could run code",
    "V": "a structured type or raw bytes",
    "S": "byte strings",
    "a": "byte strings",
    "U": "strings",
    "T": "strings",
    "c": "complex numbers",
    "M": "dates",
    "m": "time spans",
    "b": "truth values",
    "?": "truth values",
    "f": "floating-point numbers other than of 16, 32 or 64 bits",
}


class BadArray(ValueError):
    """What is wrong with a stored array; whoever knows its name puts it in front."""


class NpyHeader(NamedTuple):
    """What a .npy header says."""

    dtype: str
    """Name of a number type in numpy, e.g. `float16`; little-endian."""
    shape: tuple[int, ...]
    fortran: bool
    """The first axis varies fastest."""
    start: int
    """Bytes of the header: the values start here."""

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def parse_header(content: bytes) -> NpyHeader:
    """Return what the header of a .npy file says.

    Args:
        content: The file's first bytes; `HEADER_BYTES` of them always suffice.

    Raises:
        BadArray: It is no .npy header of version 1 to 3 with at most `MAX_HEADER` bytes, or of another type.
    """
    if content[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        raise BadArray("it is a zip archive, as .npz files are: this is an npz")
    if content[:6] != MAGIC:
        raise BadArray("it does not start like a .npy file")
    if len(content) < 12 or content[6] not in _LENGTH_BYTES or content[7] != 0:
        raise BadArray("it has an unknown .npy version, or ends within the header")
    start = 8 + _LENGTH_BYTES[content[6]]
    length = int.from_bytes(content[8:start], "little")
    if length > MAX_HEADER:
        raise BadArray(f"its header has {length} bytes, more than {MAX_HEADER}")
    text = content[start : start + length]
    if len(text) < length:
        raise BadArray("it ends within the header")
    # Python 2 wrote its long integers as they look there.
    dtype, fortran, shape = _Entries(text.decode("latin1"), long_allowed=content[6] < 3).parse()
    return NpyHeader(number_type(dtype), shape, fortran, start + length)


def number_type(descr: str) -> str:
    """Return numpy's name of a number type as headers spell it, e.g. `float16` of `<f2`.

    Raises:
        BadArray: Big-endian, or not a number type that features, actions or states can have.
    """
    found = _NUMBER_TYPE.fullmatch(descr)
    if found is None:
        what = _OTHER_TYPES.get(descr.lstrip("<>=|")[:1], "of an unknown type")
        raise BadArray(f"its type {descr!r} is refused: {what}")
    big = found["order"] == ">" or (found["order"] in ("=", "") and sys.byteorder == "big")
    if big and found["name"][1] != "1":
        raise BadArray(f"its type {descr!r} is big-endian; store it with .astype('<{found['name']}')")
    return np.dtype(found["name"]).name


def check_extent(header: NpyHeader, size: int) -> None:
    """Check that a file has the bytes its header speaks of, no more and no fewer.

    Args:
        header: Of the file.
        size: Of the file, in bytes.

    Raises:
        BadArray: It is truncated, or something follows the values.
    """
    there = size - header.start
    if there != header.nbytes:
        what = "it is truncated" if there < header.nbytes else "something follows the values"
        text = f"{header.dtype} {list(header.shape)}"
        raise BadArray(f"{what}: it holds {there} bytes of values, its header says {text}, {header.nbytes} bytes")


def in_c_order(header: NpyHeader, values: NDArray[np.uint8]) -> np.ndarray:
    """Return the array whose bytes were read, without a copy unless the file is in Fortran order."""
    flat = values.view(header.dtype)
    return np.ascontiguousarray(flat.reshape(header.shape, order="F")) if header.fortran else flat.reshape(header.shape)


def header_at(descriptor: int, start: int, size: int) -> NpyHeader:
    """Return the checked header of a .npy file, or of one inside another file.

    Args:
        descriptor: Of an open file.
        start: Where the .npy begins in it.
        size: Bytes of the .npy.

    Raises:
        BadArray: See `parse_header` and `check_extent`.
    """
    header = parse_header(os.pread(descriptor, min(size, HEADER_BYTES), start))
    check_extent(header, size)
    return header


def values_at(descriptor: int, start: int, header: NpyHeader) -> np.ndarray:
    """Return the values of a .npy whose header `header_at` has checked, read into one new array.

    Raises:
        BadArray: The file has become shorter since.
    """
    values = np.empty(header.nbytes, np.uint8)
    left, at = values.data, start + header.start
    while left:
        done = os.preadv(descriptor, [left], at)
        if not done:
            raise BadArray(f"it was truncated while it was read: {len(left)} bytes are missing")
        left, at = left[done:], at + done
    return in_c_order(header, values)


def read_npy(path: Path) -> np.ndarray:
    """Return the array of a .npy file, C-ordered and little-endian.

    Raises:
        OSError: The file cannot be opened, or is a link.
        ValueError: It is not a regular file, or not a .npy that is taken here.
    """
    descriptor = open_regular(path)
    try:
        return values_at(descriptor, 0, header_at(descriptor, 0, os.fstat(descriptor).st_size))
    finally:
        os.close(descriptor)


class _Entries:
    """The dictionary in a header: descr, fortran_order and shape, each once."""

    def __init__(self, text: str, *, long_allowed: bool) -> None:
        self._long_allowed = long_allowed
        self._tokens = self._split(text)

    def parse(self) -> tuple[str, bool, tuple[int, ...]]:
        found: dict[str, str | bool | tuple[int, ...]] = {}
        self._expect("{")
        kind, name = next(self._tokens)
        while name != "}":
            if kind != "text" or name in found:
                raise BadArray("its header is not a dictionary of three different names")
            self._expect(":")
            found[name] = self._value(name)
            kind, name = next(self._tokens)
            if name == ",":
                kind, name = next(self._tokens)
            elif name != "}":
                raise BadArray("its header is not a dictionary")
        if next(self._tokens) != ("end", ""):
            raise BadArray("something follows the dictionary in its header")
        if len(found) != 3:
            raise BadArray("its header lacks descr, fortran_order or shape")
        descr, fortran, shape = found["descr"], found["fortran_order"], found["shape"]
        return str(descr), bool(fortran), shape if isinstance(shape, tuple) else ()

    def _value(self, name: str) -> str | bool | tuple[int, ...]:
        kind, text = next(self._tokens)
        if name == "descr":
            if text in ("[", "("):
                raise BadArray("it has a structured type; store each field as an array of its own")
            if kind == "text":
                return text
        elif name == "fortran_order":
            if kind == "word":
                return text == "True"
        elif name == "shape":
            if text == "(" and kind == "mark":
                return self._shape()
        else:
            raise BadArray(f"its header has an entry {name!r} beside descr, fortran_order and shape")
        raise BadArray(f"its header gives {name} another form than numpy does")

    def _shape(self) -> tuple[int, ...]:
        sizes: list[int] = []
        kind, text = next(self._tokens)
        while text != ")":
            if kind != "number" or len(sizes) == MAX_DIMENSIONS:
                raise BadArray(f"its shape is not one of at most {MAX_DIMENSIONS} sizes")
            sizes.append(int(text))
            kind, text = next(self._tokens)
            if text == ",":
                kind, text = next(self._tokens)
            elif len(sizes) < 2 or text != ")":
                raise BadArray("its shape is not a tuple")
        return tuple(sizes)

    def _expect(self, mark: str) -> None:
        if next(self._tokens) != ("mark", mark):
            raise BadArray("its header is not a dictionary")

    def _split(self, text: str) -> Iterator[tuple[str, str]]:
        at, end = 0, len(text.rstrip(" \t\r\n\f"))
        while at < end:
            token = _TOKEN.match(text, at, end)
            if token is None or (token["long"] and not self._long_allowed):
                raise BadArray(f"its header cannot be read at {text[at : at + 20]!r}")
            at = token.end()
            kind = next(name for name in ("single", "double", "word", "number", "mark") if token[name] is not None)
            yield ("text" if kind in ("single", "double") else kind, token[kind])
        while True:
            yield "end", ""
