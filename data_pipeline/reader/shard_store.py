"""What readers ask of the place that shards come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class StorageStats:
    """What a store has done since it was opened; all zero where shards are read in place.

    Attributes:
        hits: Shards that were on the node when they were opened.
        misses: Shards that had to be waited for.
        fetched_bytes: Bytes this process copied to the node, ahead of need or not.
        evictions: Copies this process removed to make room.
        cached_bytes: Bytes of all copies on the node now.
    """

    hits: int = 0
    misses: int = 0
    fetched_bytes: int = 0
    evictions: int = 0
    cached_bytes: int = 0


class ShardStore(Protocol):
    """The shards of one data set, by their place in the manifest. Safe to use from several threads."""

    def open(self, shard: int) -> int:
        """Return a descriptor of a shard, waiting until the shard is on the node. The caller closes it.

        It reads a regular file with as many bytes as the manifest says. A copy that was evicted since keeps its space
        until its last descriptor is closed: do not hold on to shards that are not needed soon.

        Raises:
            DataError: The shard cannot be had; names it, where it lies, and what is wrong.
            RuntimeError: The store is closed.
        """
        ...

    def expect(self, shards: Sequence[int]) -> None:
        """Say which shards are used from now on: the first ones are copied ahead, the last ones evicted first.

        Call it again as reading goes on; an order that did not change costs next to nothing.

        Args:
            shards: Distinct, in the order of their next use.
        """
        ...

    def recheck(self, shard: int) -> None:
        """Doubt the copy of a shard, after a checksum inside it did not fit.

        The next `open` hashes it, and copies it again where it is damaged. Does nothing for shards read in place.
        """
        ...

    def where(self, shard: int) -> str:
        """Return the path or URL a shard comes from, for messages; without secrets."""
        ...

    def stats(self) -> StorageStats:
        """Return what has been done so far."""
        ...

    def close(self) -> None:
        """Stop copying ahead. Descriptors stay valid, and so do the copies, for other processes and later runs."""
        ...
