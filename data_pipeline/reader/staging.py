"""Copies of shards on the node: made once for all its processes, ahead of need, evicted by the order of use."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from data_pipeline.errors import DataError, Problem
from data_pipeline.reader.fetching import (
    CHUNK,
    FetchFailed,
    FileSource,
    FolderFull,
    StoreClosed,
    copy_checked,
    reason,
    retried,
)
from data_pipeline.reader.node_folder import FIELD, Mark, NodeFolder, NoRoom, Part, is_full
from data_pipeline.reader.shard_store import StorageStats
from data_pipeline.schema import Manifest, ShardEntry

COPIES_AHEAD = 2
"""Shards each process copies at once while nobody waits for them."""

_NOW = -1
_WAIT = 0.05
_CLOSING = 5.0
_RIGHT_AGAIN = "check the place the data set is read from, or copy the data set there again"


class StagedShards:
    """Copies of a data set's shards in a folder that all processes of the node share.

    A copy is trusted when its size, time and inode are those it had when it was last hashed since the node was
    started, by whichever process.
    """

    def __init__(self, manifest: Manifest, source: FileSource, node: NodeFolder, *, ahead: int = COPIES_AHEAD) -> None:
        """Take a data set whose manifest `parse_manifest` has read: copies are named by the sha256 it lists.

        Args:
            manifest: The data set.
            source: Its `shard_folder`.
            node: Where the copies go; closed with this store.
            ahead: Copies made at once in the background, see `expect`.

        Raises:
            DataError: A shard is larger than all copies together may be.
        """
        _check_largest(manifest, node.max_bytes)
        self._entries = manifest.shards
        self._source = source
        self._node = node
        self._ahead = ahead
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._trusted: dict[str, Mark] = {}
        self._hits = self._misses = self._fetched_bytes = 0
        self._turn = threading.Lock()
        self._work = threading.Condition()
        self._queue: deque[tuple[int, int]] = deque()
        self._threads: list[threading.Thread] = []

    def open(self, shard: int) -> int:
        """Return a descriptor of a node-local copy, making it where there is none. The caller closes it.

        Raises:
            DataError: The shard cannot be copied; names it, its source, and each reason.
            RuntimeError: The store is closed.
        """
        entry = self._entries[shard]
        try:
            if self._stop.is_set():
                raise StoreClosed
            descriptor = self._trusted_copy(entry)
            with self._lock:
                self._hits += descriptor is not None
                self._misses += descriptor is None
            if descriptor is None:
                with self._node.exclusive(entry.sha256, self._stop):
                    descriptor = self._checked_copy(entry)
                    if descriptor is None:
                        descriptor = retried(lambda: self._copy(entry, _NOW), self._stop)
            self._node.used(entry.sha256)
            return descriptor
        except StoreClosed as error:
            raise RuntimeError("the shards were closed") from error
        except FolderFull as error:
            raise DataError(self._folder_problem(entry, str(error))) from error
        except FetchFailed as error:
            where = self._source.where(entry.name)
            raise DataError(Problem(f"data.path: shard {entry.name}", where, str(error), _RIGHT_AGAIN)) from error
        except OSError as error:
            raise DataError(self._folder_problem(entry, f"it cannot be used ({reason(error)})")) from error

    def expect(self, shards: Sequence[int]) -> None:
        """Say which shards are used from now on; see `ShardStore.expect`.

        As many of the first ones as there is room for are copied in the background. A copy that fails there is tried
        again, and the failure told, when somebody opens the shard.
        """
        with self._folder_errors():
            if not self._node.announce([self._entries[shard].sha256 for shard in shards]):
                return
        with self._work:
            self._queue = deque(enumerate(shards))
            self._work.notify_all()
            while len(self._threads) < self._ahead and not self._stop.is_set():
                thread = threading.Thread(target=self._work_ahead, name=f"stage-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def recheck(self, shard: int) -> None:
        """Doubt the copy of a shard: the next `open` hashes it, and copies it again where it is damaged."""
        sha256 = self._entries[shard].sha256
        with self._lock:
            self._trusted.pop(sha256, None)
        with self._folder_errors():
            self._node.forget(sha256)

    def where(self, shard: int) -> str:
        """Return the path or URL a shard was copied from."""
        return self._source.where(self._entries[shard].name)

    def stats(self) -> StorageStats:
        """Return what this process has done so far, and the bytes of all copies on the node."""
        with self._folder_errors():
            cached = sum(self._node.cached().values())
        with self._lock:
            return StorageStats(self._hits, self._misses, self._fetched_bytes, self._node.evictions, cached)

    def close(self) -> None:
        """Stop copying ahead and let others evict; what is copied stays."""
        self._stop.set()
        with self._work:
            self._work.notify_all()
        for thread in self._threads:
            # One may hang in a request for longer; it ends there by itself.
            thread.join(_CLOSING)
        self._node.close()

    def _trusted_copy(self, entry: ShardEntry) -> int | None:
        """Return a descriptor of the copy if its content is known to be right."""
        descriptor = self._node.open_copy(entry.sha256)
        if descriptor is None:
            return None
        mark = Mark.of(descriptor)
        known = mark.nbytes == entry.bytes
        if known and self._trusted.get(entry.sha256) != mark:
            known = self._node.record(entry.sha256) == mark
        if not known:
            os.close(descriptor)
            return None
        self._trust(entry, mark)
        return descriptor

    def _checked_copy(self, entry: ShardEntry) -> int | None:
        """Return a descriptor of the copy, hashed if need be; remove a damaged one. Holds the shard's lock."""
        descriptor = self._trusted_copy(entry)
        if descriptor is not None:
            return descriptor
        descriptor = self._node.open_copy(entry.sha256)
        if descriptor is None:
            self._node.remove(entry.sha256)
            return None
        mark = Mark.of(descriptor)
        if mark.nbytes == entry.bytes and self._sha256(descriptor) == entry.sha256:
            with self._node.accounts():
                self._node.write_record(entry.sha256, mark)
            self._trust(entry, mark)
            return descriptor
        os.close(descriptor)
        self._node.remove(entry.sha256)
        return None

    def _copy(self, entry: ShardEntry, needed_at: int, reserved: Callable[[], None] = lambda: None) -> int:
        """Make a copy, and return a descriptor of it. Holds the shard's lock.

        Args:
            entry: Shard.
            needed_at: Its place in the order of use.
            reserved: Called when there is room for it.

        Raises:
            FetchFailed: The source or the folder failed.
            NoRoom: There is no room, and the copy is not needed now.
        """
        with self._room(entry, needed_at) as part:
            reserved()
            try:
                copy_checked(
                    self._source,
                    entry.name,
                    part.descriptor,
                    limit=entry.bytes,
                    exact=True,
                    sha256=entry.sha256,
                    stop=self._stop,
                )
                descriptor = part.commit()
            except OSError as error:
                # Not every file system keeps the space that was reserved.
                if is_full(error) and self._node.evict(entry.bytes, needed_at=needed_at):
                    raise FetchFailed(reason(error)) from error
                raise FolderFull(reason(error)) from error
        self._trust(entry, Mark.of(descriptor))
        with self._lock:
            self._fetched_bytes += entry.bytes
        return descriptor

    def _room(self, entry: ShardEntry, needed_at: int) -> Part:
        while True:
            try:
                return self._node.reserve(entry.sha256, entry.bytes, needed_at=needed_at)
            except NoRoom as error:
                if needed_at != _NOW:
                    raise
                if not error.others:
                    free = self._node.free_bytes()
                    raise FolderFull(f"{free} bytes are free, and nothing is left to evict") from error
            # Copies that others are making can be evicted once they are complete.
            if self._stop.wait(_WAIT):
                raise StoreClosed

    def _work_ahead(self) -> None:
        while not self._stop.is_set():
            pause = 0.0
            # One at a time reserves, in the order of use: what is needed sooner shall not find the room taken.
            with ExitStack() as turn:
                turn.enter_context(self._turn)
                try:
                    queue, place, shard = self._next_expected()
                except StoreClosed:
                    return
                try:
                    self._copy_ahead(place, self._entries[shard], reserved=turn.close)
                except NoRoom as error:
                    if error.others:
                        queue.appendleft((place, shard))
                        pause = _WAIT
                    else:
                        queue.clear()
                except (FetchFailed, OSError):
                    # Who opens the shard meets the same, tries again, and is told; the others are still wanted.
                    pause = _WAIT
                except StoreClosed:
                    return
            self._stop.wait(pause)

    def _next_expected(self) -> tuple[deque[tuple[int, int]], int, int]:
        """Wait for the next shard to copy ahead, and return the queue it is from, its place and the shard."""
        with self._work:
            while not self._queue:
                if self._stop.is_set():
                    raise StoreClosed
                self._work.wait()
            return self._queue, *self._queue.popleft()

    def _copy_ahead(self, place: int, entry: ShardEntry, reserved: Callable[[], None]) -> None:
        """Copy a shard unless it is there or somebody else copies it."""
        if entry.sha256 in self._trusted and self._node.path_of(entry.sha256).exists():
            return
        with self._node.exclusive(entry.sha256, self._stop, wait=False) as held:
            if held:
                descriptor = self._checked_copy(entry)
                os.close(self._copy(entry, place, reserved) if descriptor is None else descriptor)

    def _sha256(self, descriptor: int) -> str:
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(CHUNK))
        at = 0
        while count := os.preadv(descriptor, [buffer], at):
            if self._stop.is_set():
                raise StoreClosed
            digest.update(buffer[:count])
            at += count
        return digest.hexdigest()

    def _trust(self, entry: ShardEntry, mark: Mark) -> None:
        with self._lock:
            self._trusted[entry.sha256] = mark

    @contextmanager
    def _folder_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            fix = "leave the folder alone while it is in use, and start again"
            raise DataError(Problem(FIELD, self._node.root, f"it cannot be used ({reason(error)})", fix)) from error

    def _folder_problem(self, entry: ShardEntry, what: str) -> Problem:
        rule = f"no copy of shard {entry.name}, {entry.bytes} bytes, can be made there: {what}"
        fix = "free space there, set data.staging.max_bytes, or name a folder on a larger disk"
        return Problem(FIELD, self._node.root, rule, fix)


def _check_largest(manifest: Manifest, max_bytes: int | None) -> None:
    largest = max(manifest.shards, key=lambda entry: entry.bytes)
    if max_bytes is not None and largest.bytes > max_bytes:
        rule = f"shard {largest.name} alone has {largest.bytes} bytes"
        raise DataError(Problem("data.staging.max_bytes", max_bytes, rule, f"allow at least {largest.bytes}"))
