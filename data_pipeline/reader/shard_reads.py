"""Byte ranges of shards, read straight to where they belong: neighbours in one call, short reads as errors."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.reader.storage import ShardStore

MAX_OPEN = 64
MAX_GAP = 64 << 10
"""Bytes between two ranges that are cheaper read and dropped than skipped by a second call."""
MAX_RUN = 4 << 20
"""Bytes after which a run of ranges ends: what was read is checked while it is still in the processor's cache."""
_MAX_VECTORS = 1000


class ByteRange(NamedTuple):
    """Bytes of a shard and the memory they go to."""

    shard: int
    offset: int
    target: NDArray[np.uint8]
    owner: int
    """Number of the clip in its batch."""

    @property
    def end(self) -> int:
        """Offset of the first byte after the range."""
        return self.offset + len(self.target)


class ShortRead(Exception):
    """A shard ends before a range does."""


class OpenShards:
    """The shards one thread has open: descriptors are never shared, so none is closed under a reader."""

    def __init__(self, store: ShardStore, max_open: int = MAX_OPEN) -> None:
        """Take the store that shards come from, and how many of them may be open at a time."""
        self._store = store
        self._max_open = max_open
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._gap = np.empty(MAX_GAP, np.uint8)
        self.calls = 0
        """Read calls made."""
        self.last_read = "nothing yet"
        """Shard and offset of the newest read, for whoever asks why it takes so long."""

    def read(self, run: list[ByteRange]) -> None:
        """Fill the targets of ranges of one shard that follow each other closely, as `runs` makes them.

        Raises:
            ShortRead: The shard ends too early.
            OSError: The system could not read.
            DataError: The shard could not be opened.
        """
        vectors: list[memoryview] = []
        at = run[0].offset
        for item in run:
            if item.offset > at:
                vectors.append(self._gap.data[: item.offset - at])
            vectors.append(item.target.data)
            at = item.end
        self.last_read = f"shard {run[0].shard} at byte {run[0].offset}"
        descriptor, at = self._descriptor(run[0].shard), run[0].offset
        while vectors:
            self.calls += 1
            got = os.preadv(descriptor, vectors[:_MAX_VECTORS], at)
            if got == 0:
                raise ShortRead(f"the shard ends at byte {at}, before byte {run[-1].end}")
            at += got
            while vectors and got >= len(vectors[0]):
                got -= len(vectors.pop(0))
            if got:
                vectors[0] = vectors[0][got:]

    def read_again(self, ranges: Iterable[ByteRange]) -> None:
        """Fill the targets of ranges from the disk, not from cached pages, through newly opened files.

        Copies of shards on the node are looked at again before they are used.
        """
        ranges = list(ranges)
        for shard in {item.shard for item in ranges}:
            self._close(shard)
            self._store.recheck(shard)
        for item in ranges:
            descriptor = self._descriptor(item.shard)
            # macOS has no such call, and no way to ask for the disk instead of its cache.
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, item.offset, len(item.target), os.POSIX_FADV_DONTNEED)
            self.read([item])

    def close(self) -> None:
        """Close all; reading opens them again."""
        for shard in list(self._descriptors):
            self._close(shard)

    def _descriptor(self, shard: int) -> int:
        if shard not in self._descriptors:
            if len(self._descriptors) >= self._max_open:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[shard] = self._store.open(shard)
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]

    def _close(self, shard: int) -> None:
        if shard in self._descriptors:
            os.close(self._descriptors.pop(shard))


def runs(ranges: Iterable[ByteRange]) -> Iterator[list[ByteRange]]:
    """Yield ranges in the order of the disk, those that follow each other closely together."""
    run: list[ByteRange] = []
    for item in sorted(ranges, key=lambda item: item[:2]):
        if run and not (
            item.shard == run[-1].shard
            and 0 <= item.offset - run[-1].end <= MAX_GAP
            and item.end - run[0].offset <= MAX_RUN
        ):
            yield run
            run = []
        run.append(item)
    if run:
        yield run
