"""One sharder at a time for each part of a data set, over processes and machines that share its folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

from data_pipeline.errors import DataError, Problem

PLAN_LOCK = ".sharder-plan.lock"
_NAME = re.compile(r"\.sharder-([0-9]+)-of-([0-9]+)\.lock")
_ORPHAN_SECONDS = 10.0
_WAIT_SECONDS = 60.0
_UNNAMED_SECONDS = 2.0
_PROBE_SECONDS = 0.02


def is_lock(name: str) -> bool:
    """Return whether a file name is one of a lock."""
    return _NAME.fullmatch(name) is not None


class PartLock:
    """The right to write the shards of part `i/n`; the kernel takes it back however its holders end.

    Worker processes hold it too, so that what a killed sharder leaves running cannot meet its successor.
    """

    def __init__(self, out: Path, part: str) -> None:
        """Take it.

        Args:
            out: Folder of the data set, which exists.
            part: `i/n`, as `plan.part_of` accepts it.

        Raises:
            DataError: Somebody works on shards of this part; names host and process.
        """
        number, parts = part.split("/")
        self.path = out / f".sharder-{int(number)}-of-{int(parts)}.lock"
        self._part = part
        descriptor = _taken(self.path)
        if descriptor is None:
            raise _busy(self.path, part)
        self._descriptor = descriptor
        os.ftruncate(descriptor, 0)
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "part": part}
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        try:
            self._check_others(out)
        except BaseException:
            self.release()
            raise

    def fileno(self) -> int:
        """Return the descriptor that holds it."""
        return self._descriptor

    def release(self) -> None:
        """Give it back and remove its file."""
        if self._descriptor >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1

    def _check_others(self, out: Path) -> None:
        # Ours is held before we look: of two that start at once, at least one sees the other.
        others = [path for path in out.glob(".sharder-*.lock") if path != self.path]
        others = sorted(path for path in others if _overlap(path.name, self.path.name))
        for path in others:
            _wait_for_orphans(path)
            if _is_held(path):
                raise _busy(path, self._part)
        number, parts = self._part.split("/")
        if int(number) == 0 and int(parts) == 1:
            # Whoever holds everything is in nobody's way: any other part would be refused because of it anyhow.
            for path in others:
                remove_unheld(path)

    def __enter__(self) -> PartLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Hold a lock for a moment, and wait for others who do.

    Raises:
        DataError: Somebody holds it for a minute.
    """
    started = time.monotonic()
    while (descriptor := _locked(path)) is None:
        if time.monotonic() - started > _WAIT_SECONDS:
            raise _busy(path, "")
        time.sleep(0.05)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _taken(path: Path) -> int | None:
    """Return the descriptor of a lock, or None if somebody holds it; workers of a dead sharder get a moment to end."""
    while (descriptor := _locked(path)) is None:
        _wait_for_orphans(path)
        if _is_held(path):
            return None
        # Somebody merely looked at it; of several who look, no two shall do it in step.
        time.sleep(_PROBE_SECONDS * (0.5 + random.random()))
    return descriptor


def _wait_for_orphans(path: Path) -> None:
    """Wait while workers of a dead sharder hold a lock, or somebody who has not written a name into it yet."""
    started = time.monotonic()
    while _is_held(path):
        waited = time.monotonic() - started
        limit = _ORPHAN_SECONDS if _holder_is_dead(path) else 0.0 if _holder(path) else _UNNAMED_SECONDS
        if waited >= limit:
            return
        time.sleep(_PROBE_SECONDS)


def _is_held(path: Path) -> bool:
    """Return whether somebody holds a lock; looking neither makes the file nor keeps out others who look."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        return not _flock(descriptor, fcntl.LOCK_SH, path)
    finally:
        os.close(descriptor)


def remove_unheld(path: Path) -> None:
    """Remove what a killed sharder left."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        if _flock(descriptor, fcntl.LOCK_EX, path) and _is_same(descriptor, path):
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _flock(descriptor: int, kind: int, path: Path) -> bool:
    """Return whether a lock was to be had at once."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        rule = f"the file system offers no locks ({error.strerror})"
        fix = "mount it with locks (Lustre: flock), or write to another one"
        raise DataError(Problem("out", path.parent, rule, fix)) from error
    return True


def _locked(path: Path) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        taken = False
        try:
            if not _flock(descriptor, fcntl.LOCK_EX, path):
                return None
            if taken := _is_same(descriptor, path):
                return descriptor
        finally:
            # If it is not the same, its last holder removed the file between our opening and locking it.
            if not taken:
                os.close(descriptor)


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _holder_is_dead(path: Path) -> bool:
    holder = _holder(path)
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _overlap(name: str, other: str) -> bool:
    spans = []
    for each in (name, other):
        match = _NAME.fullmatch(each)
        if match is None:
            return False
        number, parts = int(match[1]), max(int(match[2]), 1)
        spans.append((Fraction(number, parts), Fraction(number + 1, parts)))
    return spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]


def _busy(path: Path, part: str) -> DataError:
    holder = _holder(path)
    who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'unknown')}"
    theirs = f" (part {holder['part']})" if "part" in holder else ""
    rule = f"{who} is writing there{theirs}"
    field = f"out, part {part}" if part else "out"
    return DataError(Problem(field, path.parent, rule, "wait for it, or end it and run this again"))
