"""A file written in pieces under a temporary name, hashed on the way, and complete once it has its final name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.cache import sync_path

Piece = bytes | NDArray[np.uint8]
_MAX_WRITEV = 512
_WORTH_A_THREAD = 1 << 16


class HashedFile:
    """Writes without copies; the hash of one write is computed beside the preparation of the next."""

    def __init__(self, path: Path, temporary: Path, *, sha256: bool = True) -> None:
        """Start the file.

        Args:
            path: Its final path.
            temporary: Its path until it is complete, on the same file system.
            sha256: Hash it; without, `finish` returns an empty digest.
        """
        self.path = path
        self.num_bytes = 0
        self._temporary = temporary
        self._sha256 = hashlib.sha256() if sha256 else None
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="sha256") if sha256 else None
        self._hashing: Future[None] | None = None
        self._descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)

    def write(self, pieces: Sequence[Piece]) -> None:
        """Append pieces; they must not change before the next call returns."""
        views = [memoryview(piece) for piece in pieces if len(piece)]  # pyright: ignore[reportArgumentType]
        self._hash(views)
        for first in range(0, len(views), _MAX_WRITEV):
            some = views[first : first + _MAX_WRITEV]
            while some:
                written = os.writev(self._descriptor, some)
                self.num_bytes += written
                # A full disk or a signal may take less than all.
                while some and written >= len(some[0]):
                    written -= len(some.pop(0))
                if some:
                    some[0] = some[0][written:]

    def finish(self) -> str:
        """Give it its final name, safe against a power cut, and return its sha256 in hex."""
        self._wait()
        os.fsync(self._descriptor)
        self._close()
        self._temporary.rename(self.path)
        sync_path(self.path.parent)
        return self._sha256.hexdigest() if self._sha256 else ""

    def discard(self) -> None:
        """Remove it unfinished."""
        self._close()
        self._temporary.unlink(missing_ok=True)

    def _hash(self, views: list[memoryview]) -> None:
        self._wait()
        if self._hasher is None:
            return
        # Handing little to a thread would cost more than hashing it.
        if sum(len(view) for view in views) < _WORTH_A_THREAD:
            self._update(tuple(views))
        else:
            self._hashing = self._hasher.submit(self._update, tuple(views))

    def _update(self, views: tuple[memoryview, ...]) -> None:
        if self._sha256 is not None:
            for view in views:
                self._sha256.update(view)

    def _wait(self) -> None:
        if self._hashing is not None:
            self._hashing.result()
            self._hashing = None

    def _close(self) -> None:
        if self._hasher is not None:
            self._hasher.shutdown()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
