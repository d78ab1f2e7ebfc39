"""Members of a tar somebody else may have made: headers alone, bounded, nothing extracted, nothing followed.

Python's tarfile reads streams of unknown compression, stops silently at a damaged header and trusts sizes; a data set
needs the opposite. Formats: POSIX.1-1988 ustar and POSIX.1-2001 pax, GNU long names and sizes.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK = 512
MAX_EXTENDED_HEADER = 1 << 20
MAX_NAME = 1024
MAX_PADDING = 1 << 20
"""Empty bytes after the end: the largest record tools pad to. More would be a hole, or a file without an end."""

_REGULAR = (b"0", b"\0")
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}
_PAX_RECORD = re.compile(rb"([0-9]{1,7}) ([^=\n]{1,255})=")
_OCTAL = re.compile(rb" *([0-7]*) *(?:\0.*)?", re.DOTALL)
_NUMBER = re.compile(rb"[\x80\xff].*| *[0-7]* *(?:\0.*)?", re.DOTALL)
_SIZE, _CHECKSUM = (124, 136), (148, 156)
# Mode, owner, group, time, and of devices their numbers: not used, but tarfile ends a tar without a word at a bad one.
_OTHER_NUMBERS = ((100, 108), (108, 116), (116, 124), (136, 148), (329, 337), (337, 345))
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    """One regular file of a tar."""

    name: str
    header: int
    """Offset of its own header block."""
    offset: int
    """Offset of its content."""
    size: int
    """Bytes of its content."""


class BadTar(ValueError):
    """What is wrong with a tar, and at which offset."""


def open_regular(path: Path) -> int:
    """Open a file for reading if it is one: no link at its end, no pipe, no device.

    Raises:
        OSError: It cannot be opened.
        BadTar: It is something else than a regular file.
    """
    # Without O_NONBLOCK a pipe in place of a shard would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadTar("it is not a regular file")
    return descriptor


def walk(descriptor: int) -> Iterator[Member]:
    """Yield the regular files of an open tar, in order.

    Folders are passed over; links, devices, pipes and names that leave the folder are refused.

    Args:
        descriptor: Of an open regular file.

    Raises:
        BadTar: The file is compressed, damaged, truncated, or holds what a shard must not.
    """
    total = os.fstat(descriptor).st_size
    _check_plain(os.pread(descriptor, 8, 0))
    at, extended = 0, _Extended()
    while True:
        block = os.pread(descriptor, BLOCK, at)
        if len(block) < BLOCK:
            raise BadTar(f"it ends at byte {total} without the two empty blocks that end a tar")
        if not any(block):
            _check_end(descriptor, at, total, extended)
            return
        kind, size, name = _header(block, at)
        start = at + BLOCK
        if kind in (b"x", b"g", b"L", b"K"):
            if size > MAX_EXTENDED_HEADER or start + size > total:
                raise BadTar(f"the extended header at byte {at} claims {size} bytes")
            content = os.pread(descriptor, size + -size % BLOCK, start)
            if any(content[size:]):
                raise BadTar(f"the extended header at byte {at} claims {size} bytes, and is longer")
            extended.read(kind, content[:size], at)
        else:
            name = name if extended.name is None else extended.name
            size = size if extended.size is None else extended.size
            extended = _Extended()
            # Tars older than 1988 mark a folder by its name alone.
            kind = b"5" if kind in _REGULAR and name.endswith("/") else kind
            if kind in _REGULAR:
                _check_name(name, at)
                if start + size > total:
                    raise BadTar(f"member {name} at byte {at} claims {size} bytes, the file ends at byte {total}")
                yield Member(name, at, start, size)
            elif kind == b"5":
                size = 0
            else:
                raise BadTar(f"member {name} at byte {at} is {_KINDS.get(kind, 'not a regular file')}")
        at = start + size + -size % BLOCK


class _Extended:
    """What pax and GNU headers say of the member after them."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.size: int | None = None
        self.pending = False

    def read(self, kind: bytes, content: bytes, at: int) -> None:
        if kind == b"L":
            self._rename(content.split(b"\0", 1)[0], at)
        elif kind == b"x":
            for name, value in _pax_records(content, at):
                self._take(name, value, at)
        elif kind == b"g":
            for name, _ in _pax_records(content, at):
                if name in (b"path", b"size") or name.startswith(b"GNU.sparse"):
                    raise BadTar(f"the global header at byte {at} changes every member")
        # A global header speaks of no member in particular, but does not replace the one before it either.
        self.pending = self.pending or kind != b"g"

    def _take(self, name: bytes, value: bytes, at: int) -> None:
        if name == b"path":
            self._rename(value, at)
        elif name == b"size":
            if self.size is not None or not value.isdigit() or len(value) > 18:
                raise BadTar(f"the extended header at byte {at} claims the size {value[:30]!r}, or a second one")
            self.size = int(value)
        elif name.startswith(b"GNU.sparse"):
            raise BadTar(f"the member at byte {at} is a sparse file")

    def _rename(self, name: bytes, at: int) -> None:
        # Of two names readers take different ones.
        if self.name is not None:
            raise BadTar(f"the extended header at byte {at} names its member a second time")
        self.name = _text(name, at)


def _pax_records(content: bytes, at: int) -> Iterator[tuple[bytes, bytes]]:
    place = 0
    while place < len(content):
        record = _PAX_RECORD.match(content, place)
        length = int(record[1]) if record else 0
        end = place + length
        if record is None or end > len(content) or record.end() >= end or content[end - 1 : end] != b"\n":
            raise BadTar(f"the extended header at byte {at} is damaged")
        yield record[2], content[record.end() : end - 1]
        place = end


def _check_plain(start: bytes) -> None:
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise BadTar(f"it is compressed ({name}); unpack it first")


def _check_end(descriptor: int, at: int, total: int, extended: _Extended) -> None:
    if extended.pending:
        raise BadTar(f"it ends at byte {at} after a header that announces another member")
    rest = os.pread(descriptor, BLOCK, at + BLOCK)
    if len(rest) < BLOCK or any(rest):
        # Zeros in place of one header would hide every member after it.
        raise BadTar(f"an empty block at byte {at} is not followed by a second one")
    at += 2 * BLOCK
    if total - at > MAX_PADDING:
        raise BadTar(f"{total - at} bytes follow the end of the tar at byte {at}")
    while at < total:
        rest = os.pread(descriptor, 1 << 16, at)
        if any(rest) or not rest:
            raise BadTar(f"there is data after the end of the tar, at byte {at}" if rest else "it has become shorter")
        at += len(rest)


def _header(block: bytes, at: int) -> tuple[bytes, int, str]:
    start, end = _CHECKSUM
    if _number(block, *_CHECKSUM) != sum(block) - sum(block[start:end]) + (end - start) * ord(" "):
        raise BadTar(f"the header at byte {at} is damaged: its checksum does not fit")
    size = _number(block, *_SIZE)
    if size is None:
        raise BadTar(f"the header at byte {at} has a size that is no number")
    for place in _OTHER_NUMBERS:
        if _NUMBER.fullmatch(block, *place) is None:
            raise BadTar(f"the header at byte {at} has a mode, owner or time that is no number")
    name = _text(block[:100].split(b"\0", 1)[0], at)
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    if prefix:
        name = f"{_text(prefix, at)}/{name}"
    return block[156:157], size, name


def _number(block: bytes, start: int, end: int) -> int | None:
    """Return the number in a field, octal or (GNU) binary, or None if there is none below 2**62."""
    if block[start] == 0x80:
        value = int.from_bytes(block[start + 1 : end], "big")
        return value if value < 1 << 62 else None
    octal = _OCTAL.fullmatch(block, start, end)
    return None if octal is None else int(octal[1] or b"0", 8)


def _text(raw: bytes, at: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise BadTar(f"the name in the header at byte {at} is not UTF-8") from None


def _check_name(name: str, at: int) -> None:
    parts = name.split("/")
    if not name or len(name) > MAX_NAME or name.startswith("/") or ".." in parts or not name.isprintable():
        raise BadTar(f"the name {name[:100]!r} at byte {at} is not one inside a folder")
