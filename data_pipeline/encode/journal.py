"""What is done of a features folder, so that an interrupted encoding goes on and several parts make one folder.

`parts/plan.json` says what everything in the folder was made with. Each part appends to `parts/INDEX-of-COUNT.journal`
once clips are safe on disk, and ends with `parts/INDEX-of-COUNT.json`; whoever finds all of those completes the folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from data_pipeline.cache import sync_path, write_bytes, write_json
from data_pipeline.encode.documents import FEATURES_FILE
from data_pipeline.errors import DataError, Problem

PARTS = "parts"
_PLAN = "plan.json"
_FLUSH_CLIPS = 64
_FLUSH_SECONDS = 5.0

Record = dict[str, Any]


def plan_digest(plan: Mapping[str, object]) -> str:
    """Return the sha256 of a plan in hex."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def check_free(out: Path) -> None:
    """Check that a folder is new, empty, or begun by this command.

    Raises:
        DataError: It holds something else.
    """
    if out.is_dir() and not (out / PARTS / _PLAN).is_file() and any(path.name != PARTS for path in out.iterdir()):
        raise DataError(Problem("out", out, "the folder must be new or empty", "name another one"))


def begin(out: Path, plan: Mapping[str, object]) -> None:
    """Write the plan into a new folder, or compare it with the one that is there.

    Raises:
        DataError: The folder was begun with other settings, encoder or clips; each difference is named.
    """
    with _writing(out):
        (out / PARTS).mkdir(parents=True, exist_ok=True)
    with _writing(out), locked(out):
        check_free(out)
        path = out / PARTS / _PLAN
        if not path.is_file():
            write_json(path, dict(plan))
            return
        begun = json.loads(path.read_text(encoding="utf-8"))
    problems = []
    for name in sorted({**begun, **plan}):
        if begun.get(name) != plan.get(name):
            clips = f"the clips have changed since {out} was begun"
            rule = clips if name == "input" else f"{out} was begun with {name}={begun.get(name)}"
            fix = "repeat the command as it was, or name another folder"
            problems.append(Problem(name, plan.get(name), rule, fix))
    if problems:
        raise DataError(problems)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the lock of a features folder; it ends with the process, however that ends."""
    with (out / PARTS / "lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Part:
    """One part's share of a features folder, held by one process at a time."""

    def __init__(self, out: Path, index: int, count: int) -> None:
        """Take the part and read what was finished before, by whatever parts.

        Args:
            out: Folder with a plan.
            index: Of the part, from 0.
            count: Parts in all.

        Raises:
            DataError: Another process works on this part.
        """
        self.name = f"{index}-of-{count}"
        self.done: dict[str, Record] = {}
        self._out = out
        self._path = out / PARTS / f"{self.name}.journal"
        self._pending: list[Record] = []
        self._flushed = time.monotonic()
        self._lock = (out / PARTS / f"{self.name}.lock").open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            rule = f"another process is encoding part {self.name} into this folder"
            raise DataError(Problem("out", out, rule, "wait for it, or give this one another part")) from error
        for path in sorted((out / PARTS).glob("*.journal")):
            self.done.update(_finished(out, path))
        own = _finished(out, self._path).values()
        with _writing(self._path):
            write_bytes(self._path, "".join(map(_line, own)).encode())
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND)

    def __enter__(self) -> Self:
        """Start working."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep what is finished, also after an error, and let go of the part."""
        try:
            self._flush()
        finally:
            os.close(self._file)
            self._lock.close()

    def write(self, partition: str, key: str, content: bytes) -> None:
        """Write a clip's file so that its final name means all of it; from any thread."""
        path = clip_path(self._out, partition, key)
        temporary = path.with_name(f"{path.name}.{self.name}.tmp")
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._check_inside(path.parent)
            try:
                # A link in place of the file would lead out of the folder.
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
                with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
                    file.write(content)
                temporary.rename(path)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise

    def _check_inside(self, folder: Path) -> None:
        """Refuse folders of clips that lie elsewhere.

        Raises:
            DataError: A folder between the output and the clip is a link.
        """
        inside = folder.relative_to(self._out)
        for each in (inside, *inside.parents[:-1]):
            if (self._out / each).is_symlink():
                rule = "it is a link, and clips are written inside the output folder only"
                raise DataError(Problem("out", self._out / each, rule, "remove the link, or name another folder"))

    def add(self, record: Record) -> None:
        """Note that a clip is written; it is in the journal once a batch of them is safe on disk."""
        self.done[record["key"]] = record
        self._pending.append(record)
        if len(self._pending) >= _FLUSH_CLIPS or time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._flush()

    def finish(self, plan: str, keys: list[str], skipped: list[Record]) -> Record:
        """Declare the part complete.

        Args:
            plan: Digest of the plan.
            keys: Of the part's clips that are written.
            skipped: The others, each with its reason.

        Returns:
            The content of the part's document.
        """
        self._flush()
        document = {"part": self.name, "plan": plan, "clips": [self.done[key] for key in keys], "skipped": skipped}
        path = self._out / PARTS / f"{self.name}.json"
        with _writing(path):
            write_json(path, document)
        return document

    def _flush(self) -> None:
        with _writing(self._path):
            self._sync()

    def _sync(self) -> None:
        folders = set()
        for record in self._pending:
            path = clip_path(self._out, record["partition"], record["key"])
            sync_path(path)
            folders.add(path.parent)
        for folder in sorted(folders):
            sync_path(folder)
        _append(self._file, "".join(map(_line, self._pending)).encode())
        self._pending.clear()
        self._flushed = time.monotonic()


def clip_path(out: Path, partition: str, key: str) -> Path:
    """Return where a clip's features are."""
    return out / partition / f"{key}.npz"


def finished_parts(out: Path, count: int, plan: str) -> list[Record] | None:
    """Return the documents of all parts in order, or None while one is missing."""
    documents = []
    for index in range(count):
        path = out / PARTS / f"{index}-of-{count}.json"
        if not path.is_file():
            return None
        documents.append(json.loads(path.read_text(encoding="utf-8")))
    return documents if all(document["plan"] == plan for document in documents) else None


def complete(out: Path, document: Record) -> None:
    """Write features.json, under the lock, and clear away what killed processes left."""
    folders = {clip_path(out, record["partition"], record["key"]).parent for record in document["clips"]}
    for path in (path for folder in folders for path in folder.glob("*.tmp")):
        path.unlink(missing_ok=True)
    with _writing(out):
        write_json(out / FEATURES_FILE, document)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say of a full disk or a missing permission what it is, and that the work can go on.

    Raises:
        DataError: Something could not be written.
    """
    try:
        yield
    except OSError as error:
        fix = "make room, or correct the permissions, and repeat the command: it goes on where it was"
        raise DataError(Problem("out", path, f"it cannot be written ({error.strerror})", fix)) from error


def _append(descriptor: int, content: bytes) -> None:
    """Add to a file and make it safe against a power cut; what a full disk cuts short is taken back."""
    length = os.fstat(descriptor).st_size
    left = memoryview(content)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except OSError:
        os.ftruncate(descriptor, length)
        raise
    os.fsync(descriptor)


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def _finished(out: Path, journal: Path) -> dict[str, Record]:
    """Return the clips of a journal whose files are there in full, by key."""
    if not journal.is_file():
        return {}
    done = {}
    for line in journal.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            # A line that was being written when its process was killed.
            continue
        path = clip_path(out, record["partition"], record["key"])
        if path.is_file() and path.stat().st_size == record["bytes"]:
            done[record["key"]] = record
    return done
