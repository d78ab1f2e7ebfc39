"""The folder in which all processes of one user on one node share copies: what is there, who needs it, who copies it.

    FOLDER/hopescale-UID/
      accounts              locked while files appear, disappear or are counted
      shards/SHA256.tar     a copy, named by its content, so that runs and data sets share it
      shards/SHA256.json    what the copy was when somebody last hashed it
      shards/SHA256.*.part  a copy being made; its size is reserved, and its maker holds a lock on it
      locks/SHA256          held while a copy is made or hashed
      readers/*             sha256 of the shards a process needs, next one first; the process holds a lock on it
      datasets/             manifest and index of remote data sets

Every lock is a flock, which the kernel gives back however its holder ends: what a dead process left is known by its
lock being free, in containers with other process ids too. Nothing is synced: after a power cut copies are hashed again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import secrets
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.errors import DataError, Problem
from data_pipeline.reader.fetching import StoreClosed, reason
from data_pipeline.shard.walk import BadTar, open_regular

FIELD = "data.staging.folder"
NEVER = math.inf
"""Next use of a copy that no living process has said it needs."""

_POLL = 0.05
_MAX_RECORD = 512
_MAX_ORDER = 64 << 20
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Mark:
    """What a file was like when its content was known; another size, time or inode means another content.

    Attributes:
        nbytes: Size.
        mtime_ns: Time of the last change.
        inode: Number of the file.
    """

    nbytes: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, descriptor: int) -> Mark:
        """Return the mark of an open file."""
        found = os.fstat(descriptor)
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)


@dataclass(frozen=True)
class _Copy:
    sha256: str
    nbytes: int
    last_use: int


class NoRoom(Exception):
    """A copy does not fit now.

    Attributes:
        others: Bytes of copies being made, which can be evicted once they are complete.
        needed: Bytes that were asked for.
    """

    def __init__(self, needed: int, others: int) -> None:
        super().__init__(f"there is no room for {needed} bytes")
        self.needed = needed
        self.others = others


class Part:
    """A copy being made, unknown to readers, its space reserved; leaving the block gives it up unless committed."""

    def __init__(self, folder: NodeFolder, sha256: str, path: Path, descriptor: int) -> None:
        self.descriptor = descriptor
        self._folder = folder
        self._sha256 = sha256
        self._path = path

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *_: object) -> None:
        with self._folder.accounts():
            self._path.unlink(missing_ok=True)
        os.close(self.descriptor)

    def commit(self) -> int:
        """Make the complete copy known, and return a descriptor to read it by: it may be evicted at once."""
        os.fchmod(self.descriptor, 0o400)
        # Under another name so far: no eviction can come between.
        reading = open_regular(self._path)
        try:
            with self._folder.accounts():
                os.replace(self._path, self._folder.path_of(self._sha256))
                self._folder.write_record(self._sha256, Mark.of(reading))
        except BaseException:
            os.close(reading)
            raise
        return reading


class NodeFolder:
    """One process's view of the folder. Safe to use from several threads."""

    def __init__(self, folder: Path, max_bytes: int | None) -> None:
        """Open the folder, or make it.

        Args:
            folder: `data.staging.folder`.
            max_bytes: Bytes of shards it may hold, counting those being copied; None sets no limit.

        Raises:
            DataError: It cannot be made, is open to other users, or lies on a file system without locks.
        """
        self.max_bytes = max_bytes
        self.evictions = 0
        self._reader: tuple[Path, int] | None = None
        self._announced: tuple[str, ...] = ()
        self._boot = _boot_id()
        try:
            self.root = _private_folder(folder.expanduser().absolute())
            self._shards, self._locks, self._readers, self.datasets = (
                self.root / name for name in ("shards", "locks", "readers", "datasets")
            )
            for part in (self._shards, self._locks, self._readers, self.datasets):
                part.mkdir(mode=0o700, exist_ok=True)
            with self.accounts():
                self._scan()
        except OSError as error:
            fix = "name a folder of the node's own disk or memory that you may write to"
            raise DataError(Problem(FIELD, folder, f"it cannot be used ({reason(error)})", fix)) from error

    def path_of(self, sha256: str) -> Path:
        """Return where the complete copy with some content is, if there is one."""
        return self._shards / f"{sha256}.tar"

    @contextmanager
    def accounts(self) -> Iterator[None]:
        """Hold the right to add and remove files; never for longer than that takes."""
        descriptor = _open_lock(self.root / "accounts")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            _unlock(descriptor)

    @contextmanager
    def exclusive(self, name: str, stop: threading.Event, *, wait: bool = True) -> Iterator[bool]:
        """Hold a lock by name; yields whether it is held.

        Args:
            name: File name of the lock.
            stop: Ends the wait.
            wait: Until the lock is free; else take it only if it is.

        Raises:
            StoreClosed: `stop` was set while waiting.
        """
        descriptor = _open_lock(self._locks / name)
        try:
            held = _try_lock(descriptor)
            while wait and not held:
                # A blocking flock could not be told to stop.
                if stop.wait(_POLL):
                    raise StoreClosed
                held = _try_lock(descriptor)
            yield held
        finally:
            _unlock(descriptor)

    def open_copy(self, sha256: str) -> int | None:
        """Return a descriptor of the copy with some content, or None where no regular file is."""
        try:
            return open_regular(self.path_of(sha256))
        except (FileNotFoundError, BadTar):
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                return None
            raise

    def record(self, sha256: str) -> Mark | None:
        """Return what the copy was when it was last hashed, if that was since the node was started."""
        try:
            with self._record_path(sha256).open("rb") as file:
                found = json.loads(file.read(_MAX_RECORD))
            if self._boot is None or found.pop("boot") != self._boot:
                return None
            return Mark(**found)
        except (FileNotFoundError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
            return None

    def write_record(self, sha256: str, mark: Mark) -> None:
        """Note that a copy has been hashed; while holding `accounts`."""
        temporary = self._shards / f"{sha256}.{secrets.token_hex(4)}.json.tmp"
        temporary.write_text(json.dumps(asdict(mark) | {"boot": self._boot}), encoding="ascii")
        os.replace(temporary, self._record_path(sha256))

    def forget(self, sha256: str) -> None:
        """Let processes that have not opened a copy yet hash it first."""
        with self.accounts():
            self._record_path(sha256).unlink(missing_ok=True)

    def used(self, sha256: str) -> None:
        """Note that a copy has just been used, for the order in which those that nobody needs are evicted."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._record_path(sha256))

    def remove(self, sha256: str) -> None:
        """Remove a copy; who has it open keeps it."""
        with self.accounts():
            self._remove(sha256)

    def announce(self, order: Sequence[str]) -> bool:
        """Tell all processes of the node which copies this one needs, and return whether that is news.

        Args:
            order: sha256 of the shards, next use first.
        """
        if tuple(order) == self._announced:
            return False
        with self.accounts():
            if self._reader is None:
                path = self._readers / f"{os.getpid()}-{secrets.token_hex(4)}"
                self._reader = path, _locked_file(path)
            # In place: another file under this name would not be locked.
            self._reader[0].write_text("\n".join(order), encoding="ascii")
        self._announced = tuple(order)
        return True

    def reserve(self, sha256: str, nbytes: int, *, needed_at: float) -> Part:
        """Make room for a copy, evicting those whose next use is farthest, and return the file for it.

        Args:
            sha256: Of its content.
            nbytes: Of the copy.
            needed_at: Its place in the order of use; only copies needed later than that are evicted.

        Raises:
            NoRoom: It does not fit, and nothing may be evicted.
            OSError: The folder cannot be written to.
        """
        with self.accounts():
            copies, others = self._scan()
            used = sum(copy.nbytes for copy in copies) + others
            victims: list[_Copy] | None = None
            while True:
                if self.max_bytes is None or used + nbytes <= self.max_bytes:
                    part = self._make_part(sha256, nbytes)
                    if part is not None:
                        return part
                if victims is None:
                    victims = self._victims(copies, needed_at)
                    freed = sum(copy.nbytes for copy in victims)
                    if self.max_bytes is not None and used - freed + nbytes > self.max_bytes:
                        raise NoRoom(nbytes, others)
                if not victims:
                    raise NoRoom(nbytes, others)
                used -= self._evict(victims.pop())

    def evict(self, nbytes: int, *, needed_at: float) -> bool:
        """Remove copies needed later than some place in the order of use, up to some bytes; return whether any was."""
        with self.accounts():
            victims = self._victims(self._scan()[0], needed_at)
            evicted = 0
            while victims and evicted < nbytes:
                evicted += self._evict(victims.pop())
            return evicted > 0

    def cached(self) -> Mapping[str, int]:
        """Return the bytes of every complete copy, by sha256."""
        with self.accounts():
            return {copy.sha256: copy.nbytes for copy in self._scan()[0]}

    def free_bytes(self) -> int:
        """Return what the file system has left."""
        found = os.statvfs(self.root)
        return found.f_bavail * found.f_frsize

    def close(self) -> None:
        """Take back what this process said it needs; the copies stay."""
        if self._reader is not None:
            with self.accounts():
                self._reader[0].unlink(missing_ok=True)
            _unlock(self._reader[1])
            self._reader = None

    def _record_path(self, sha256: str) -> Path:
        return self._shards / f"{sha256}.json"

    def _remove(self, sha256: str) -> None:
        self.path_of(sha256).unlink(missing_ok=True)
        self._record_path(sha256).unlink(missing_ok=True)

    def _evict(self, copy: _Copy) -> int:
        self._remove(copy.sha256)
        self.evictions += 1
        return copy.nbytes

    def _make_part(self, sha256: str, nbytes: int) -> Part | None:
        """Return a file of full size, or None when the disk is full."""
        path = self._shards / f"{sha256}.{secrets.token_hex(4)}.part"
        try:
            descriptor = _locked_file(path)
        except OSError as error:
            if is_full(error):
                return None
            raise
        try:
            _allocate(descriptor, nbytes)
        except OSError as error:
            path.unlink()
            os.close(descriptor)
            if is_full(error):
                return None
            raise
        return Part(self, sha256, path, descriptor)

    def _scan(self) -> tuple[list[_Copy], int]:
        """Return the complete copies, and the bytes of those being made; clear what dead processes left."""
        sizes: dict[str, int] = {}
        used: dict[str, int] = {}
        others = 0
        for entry in list(os.scandir(self._shards)):
            path, (name, _, kind) = Path(entry.path), entry.name.rpartition(".")
            found = entry.stat(follow_symlinks=False)
            if kind == "tar":
                sizes[name] = found.st_size
            elif kind == "json":
                used[name] = found.st_mtime_ns
            elif kind == "part" and not _is_abandoned(path):
                others += found.st_size
            else:
                path.unlink()
        for name in set(used) - set(sizes):
            self._record_path(name).unlink()
        return [_Copy(name, nbytes, used.get(name, 0)) for name, nbytes in sizes.items()], others

    def _victims(self, copies: list[_Copy], needed_at: float) -> list[_Copy]:
        """Return what may be evicted, first one last."""
        next_use = self._next_use()
        able = [copy for copy in copies if next_use.get(copy.sha256, NEVER) > needed_at]
        return sorted(able, key=lambda copy: (next_use.get(copy.sha256, NEVER), -copy.last_use))

    def _next_use(self) -> dict[str, int]:
        """Return how soon some living process needs each copy, as a place in that process's order."""
        soonest: dict[str, int] = {}
        for path in self._readers.iterdir():
            if _is_abandoned(path):
                path.unlink()
                continue
            with path.open("rb") as file:
                order = file.read(_MAX_ORDER).decode("ascii", "replace").split("\n")
            for place, sha256 in enumerate(order):
                soonest[sha256] = min(place, soonest.get(sha256, place))
        return soonest


def is_full(error: OSError) -> bool:
    """Return whether a disk or a quota has no space left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _private_folder(folder: Path) -> Path:
    """Return a sub-folder of one's own: /dev/shm and scratch disks are everybody's."""
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / f"hopescale-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    found = own.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        rule = "it is not a folder that only you can read and write, so that others could change what is read"
        raise DataError(Problem(FIELD, own, rule, "remove it, or name another folder"))
    return own


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(descriptor: int) -> None:
    # Said aloud: a child forked meanwhile holds the same lock by its copy of the descriptor.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _locked_file(path: Path) -> int:
    """Return a descriptor of a new file that this process holds until it ends; while holding `accounts`."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _is_abandoned(path: Path) -> bool:
    """Return whether the process that made a file has ended; while holding `accounts`."""
    descriptor = _open_lock(path)
    try:
        return _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _allocate(descriptor: int, nbytes: int) -> None:
    """Give a file its size and its space, so that a full disk is met before the copy and not within it."""
    os.ftruncate(descriptor, nbytes)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise


def _boot_id() -> str | None:
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return None
