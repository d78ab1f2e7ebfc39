"""Checksums of payloads: crc32c at the speed of memory where the C library is there, else zlib's crc32, by name."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError, Problem

ChecksumName = Literal["crc32c", "crc32"]
CHECKSUMS: tuple[str, ...] = get_args(ChecksumName)

_POLYNOMIALS = {"crc32c": 0x82F63B78, "crc32": 0xEDB88320}


def checksum_function(name: ChecksumName) -> Callable[[NDArray[np.uint8]], int]:
    """Return the function that maps contiguous u8 `[n]` to its checksum.

    Raises:
        DataError: crc32c without its C library, which in Python would be ten thousand times as slow.
    """
    if name == "crc32":
        return lambda content: zlib.crc32(content.data)
    import google_crc32c

    if google_crc32c.implementation != "c":
        rule = "the installed google-crc32c has no C library"
        fix = "pip install --force-reinstall google-crc32c, on a platform with a wheel"
        raise DataError(Problem("google_crc32c", google_crc32c.implementation, rule, fix))

    def crc32c(content: NDArray[np.uint8]) -> int:
        # The library takes no writable buffer.
        view = content.view()
        view.flags.writeable = False
        return google_crc32c.value(view)  # pyright: ignore[reportArgumentType]

    return crc32c


def best_checksum() -> ChecksumName:
    """Return the checksum that new data sets get on this machine."""
    import google_crc32c

    return "crc32c" if google_crc32c.implementation == "c" else "crc32"


def combined(name: ChecksumName, parts: Iterable[int], nbytes: int) -> int:
    """Return the checksum of equally long pieces laid end to end, from the checksums of the pieces.

    Appending a piece multiplies the state by a fixed power of x modulo the polynomial, as zlib's crc32_combine does.

    Args:
        name: Checksum.
        parts: Of each piece.
        nbytes: Of one piece.
    """
    columns = _appending(name, nbytes)
    total = 0
    for part in parts:
        total = _product(columns, total) ^ part
    return total


@lru_cache(maxsize=64)
def _appending(name: ChecksumName, nbytes: int) -> tuple[int, ...]:
    """Return the GF(2) matrix, by columns, that takes a checksum past `nbytes` zero bytes."""
    bit = (_POLYNOMIALS[name], *(1 << index for index in range(31)))
    power = bit
    for _ in range(3):
        power = _square(power)
    result = tuple(1 << index for index in range(32))
    while nbytes:
        if nbytes & 1:
            result = tuple(_product(power, column) for column in result)
        power = _square(power)
        nbytes >>= 1
    return result


def _square(columns: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(_product(columns, column) for column in columns)


def _product(columns: tuple[int, ...], vector: int) -> int:
    total, index = 0, 0
    while vector:
        if vector & 1:
            total ^= columns[index]
        vector >>= 1
        index += 1
    return total
