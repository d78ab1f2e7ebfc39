"""Headers of .npy members: written so that values start on a page, and read without ever evaluating them.

The format is numpy's (NEP 1). What is read here comes from shards, whose types and layout are known; files of other
people are read by `sources/npy_file.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

PAGE = 4096
MAGIC = b"\x93NUMPY"
MAX_HEADER = 10_000
"""Longest header text numpy itself reads without being told to trust it."""

_PREFIX = {1: 2, 2: 4, 3: 4}
_SIZE = "(?:0|[1-9][0-9]{0,14})"
# One size alone needs its comma: (3) is a number, which numpy refuses.
_SHAPE = rf"(?:{_SIZE},|{_SIZE}(?:, ?{_SIZE}){{1,7}},?)?"
_ITEM = re.compile(
    r"'(?P<name>descr|fortran_order|shape)': "
    rf"(?:'(?P<descr>[^'\\]{{1,16}})'|(?P<order>True|False)|\((?P<shape>{_SHAPE})\))(?:, ?|(?=}}))"
)
DESCRS = ("<f4", "<f2", "<u2", "|i1", "|u1")
"""Types that members of a shard may have."""


class NpyHeader(NamedTuple):
    """What a .npy header says."""

    descr: str
    """Type, e.g. `<f2`."""
    shape: tuple[int, ...]
    """Of the values, C-ordered."""
    nbytes: int
    """Of the header: the values start here."""


def npy_header(descr: str, shape: tuple[int, ...], start: int | None = None) -> bytes:
    """Return the .npy header (format 1.0) of C-ordered values.

    Args:
        descr: Type, e.g. `<f2`.
        shape: Of the values.
        start: Offset of the header in the file when the values shall begin on a page boundary.
    """
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    length = 10 + len(text) + 1
    if start is None:
        length += -length % 64
    else:
        length += -(start + length) % PAGE
    text = text.ljust(length - 11) + "\n"
    return MAGIC + b"\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1")


def parse_npy_header(content: bytes, descrs: Collection[str] = DESCRS) -> NpyHeader:
    """Return what the header of a shard's member says.

    Args:
        content: The member's first bytes; `MAX_HEADER + 12` of them always suffice.
        descrs: Types that are taken.

    Raises:
        ValueError: Anything but a plain header of one of the types in C order, with at most 8 dimensions.
    """
    if content[:6] != MAGIC:
        raise ValueError("it does not start like a .npy file")
    if len(content) < 12 or content[6] not in _PREFIX or content[7] != 0:
        raise ValueError("it has an unknown .npy version, or ends within the header")
    size = _PREFIX[content[6]]
    length = int.from_bytes(content[8 : 8 + size], "little")
    if length > MAX_HEADER:
        raise ValueError(f"its header has {length} bytes, more than {MAX_HEADER}")
    raw = content[8 + size : 8 + size + length]
    if len(raw) < length:
        raise ValueError("it ends within the header")
    descr, order, shape = _items(raw.decode("latin1"))
    if descr not in descrs:
        raise ValueError(f"its type {descr!r} is none of {', '.join(descrs)}")
    if order != "False":
        raise ValueError("it is in Fortran order")
    return NpyHeader(descr, tuple(int(size) for size in re.findall("[0-9]+", shape)), 8 + size + length)


def _items(text: str) -> tuple[str, str, str]:
    body = text.removesuffix("\n").rstrip(" ")
    if not (body.startswith("{") and body.endswith("}")):
        raise ValueError("its header is not a dictionary")
    found: dict[str, str | None] = {}
    at = 1
    while at < len(body) - 1:
        item = _ITEM.match(body, at)
        if item is None or item["name"] in found:
            raise ValueError("its header has more or other entries than descr, fortran_order and shape")
        group = {"descr": "descr", "fortran_order": "order", "shape": "shape"}[item["name"]]
        found[item["name"]] = item[group]
        at = item.end()
    descr, order, shape = (found.get(name) for name in ("descr", "fortran_order", "shape"))
    if descr is None or order is None or shape is None:
        raise ValueError("its header lacks descr, fortran_order or shape, or gives one of them another form")
    return descr, order, shape
