"""Reading the whole of a shard, or nearly all of it, once and in order, through one buffer that is used again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

READ_BYTES = 1 << 20
"""Read at once: small enough to be checked before it leaves the processor's cache, large for any file system."""

_SKIPPED_GAP = 1 << 16


class Span(NamedTuple):
    """A run of bytes of a file that is looked at in one piece."""

    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """First byte after it."""
        return self.offset + self.nbytes


class Digest(Protocol):
    """What hashlib's objects offer."""

    def update(self, data: memoryview, /) -> None:
        """Take more bytes."""
        ...


class _Block(NamedTuple):
    """Bytes that one system call reads, and the first and last of the spans that lie in them, as a range."""

    start: int
    end: int
    first: int
    last: int


class SpanReader:
    """Reads spans of files in order; one for each thread, so that each has its own buffer."""

    def __init__(self) -> None:
        """Start without a buffer."""
        self._buffer = np.empty(0, np.uint8)

    def read(
        self, descriptor: int, spans: Sequence[Span], *, size: int, digest: Digest | None = None
    ) -> Iterator[tuple[int, NDArray[np.uint8] | None]]:
        """Yield each span's number and bytes; None for bytes that the disk does not give.

        The bytes are valid until the next step. Memory is that of the longest span, or `READ_BYTES`.

        Args:
            descriptor: Of an open file.
            spans: In order of their offsets, none overlapping another, all inside the file.
            size: Of the file.
            digest: Given every byte of the file, in order, those between the spans included.

        Raises:
            OSError: With a digest, when any byte cannot be read: the digest would be one of something else.
        """
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        for block in _blocks(spans, size, whole=digest is not None):
            content = self._room(block.end - block.start)
            try:
                _fill(descriptor, content, block.start)
            except OSError:
                if digest is not None:
                    raise
                yield from self._alone(descriptor, spans, block)
                continue
            if digest is not None:
                digest.update(content.data)
            for number in range(block.first, block.last):
                at = spans[number].offset - block.start
                yield number, content[at : at + spans[number].nbytes]

    def _alone(
        self, descriptor: int, spans: Sequence[Span], block: _Block
    ) -> Iterator[tuple[int, NDArray[np.uint8] | None]]:
        for number in range(block.first, block.last):
            content: NDArray[np.uint8] | None = self._room(spans[number].nbytes)
            try:
                _fill(descriptor, content, spans[number].offset)
            except OSError:
                content = None
            yield number, content

    def _room(self, nbytes: int) -> NDArray[np.uint8]:
        if nbytes > len(self._buffer):
            self._buffer = np.empty(0, np.uint8)
            self._buffer = np.empty(max(nbytes, READ_BYTES), np.uint8)
        return self._buffer[:nbytes]


def _blocks(spans: Sequence[Span], size: int, *, whole: bool) -> Iterator[_Block]:
    """Cut a file into reads, between spans; all of it, or only where spans are."""
    at, first = 0, 0
    for number, span in enumerate(spans):
        if number > first:
            before = spans[number - 1].end
            if span.end - at > READ_BYTES or (not whole and span.offset - before > _SKIPPED_GAP):
                yield _Block(at, before, first, number)
                at, first = before, number
        if number == first:
            at = at if whole else span.offset
            while span.offset - at > READ_BYTES:
                yield _Block(at, at + READ_BYTES, number, number)
                at += READ_BYTES
    if first < len(spans):
        yield _Block(at, spans[-1].end, first, len(spans))
        at = spans[-1].end
    while whole and at < size:
        yield _Block(at, min(at + READ_BYTES, size), len(spans), len(spans))
        at += READ_BYTES


def _fill(descriptor: int, content: NDArray[np.uint8], offset: int) -> None:
    left = content.data
    while left:
        done = os.preadv(descriptor, [left], offset)
        if not done:
            raise OSError(f"the file ends at byte {offset}")
        left, offset = left[done:], offset + done
