"""Getting the bytes of a file from where a data set lies: bounded, hashed on the way, and tried again."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Protocol, TypeVar

from data_pipeline.shard.walk import BadTar, open_regular

CHUNK = 4 << 20
"""Most bytes taken from a source at once."""

PAUSES = (0.5, 2.0)
"""Seconds before the second and the third try."""

T = TypeVar("T")


class FetchFailed(Exception):
    """Why a file could not be had; `again` says whether another try may help."""

    def __init__(self, what: str, *, again: bool = True) -> None:
        super().__init__(what)
        self.again = again


class FolderFull(FetchFailed):
    """The copy has no room, and nothing is left that may make room for it."""


class StoreClosed(Exception):
    """The store was closed while somebody waited for a file."""


class FileSource(Protocol):
    """A folder whose files can be streamed. Used by several threads."""

    def where(self, name: str) -> str:
        """Return the path or URL of a file as people may see it, without secrets."""
        ...

    def chunks(self, name: str, nbytes: int) -> Generator[bytes | memoryview, None, None]:
        """Yield the content of a file in order; each piece is valid until the next one is asked for.

        Args:
            name: Relative path.
            nbytes: Bytes that are expected.

        Raises:
            FetchFailed: The file cannot be opened or read.
        """
        ...


class LocalFiles:
    """The files of a folder that this machine has mounted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def where(self, name: str) -> str:
        """Return the path of a file."""
        return str(self._folder / name)

    def chunks(self, name: str, nbytes: int) -> Generator[memoryview, None, None]:
        """Yield the content of a regular file, never of what a link at its end leads to.

        Raises:
            FetchFailed: The file cannot be opened or read.
        """
        descriptor = open_source_file(self._folder / name)
        buffer = memoryview(bytearray(min(CHUNK, nbytes + 1)))
        try:
            while count := os.readv(descriptor, [buffer]):
                yield buffer[:count]
        except OSError as error:
            raise FetchFailed(reason(error)) from error
        finally:
            # Copied once, these pages are of no further use; and another try shall not meet the same bad ones.
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def open_source_file(path: Path) -> int:
    """Return a descriptor of a regular file of a data set.

    Raises:
        FetchFailed: It is missing, or something else than a regular file, or cannot be opened.
    """
    try:
        return open_regular(path)
    except (FileNotFoundError, PermissionError) as error:
        raise FetchFailed(reason(error), again=False) from error
    except BadTar as error:
        raise FetchFailed(str(error), again=False) from error
    except OSError as error:
        what = "it is a symbolic link" if path.is_symlink() else reason(error)
        raise FetchFailed(what) from error


def copy_checked(
    source: FileSource, name: str, descriptor: int, *, limit: int, exact: bool, sha256: str, stop: threading.Event
) -> int:
    """Write a file of a source to a descriptor, and return its size.

    The bytes that are hashed are those that are written: a copy made inside the kernel would have to be read once more.

    Args:
        source: Where the file is.
        name: Its relative path.
        descriptor: Of an open file.
        limit: Most bytes the file may have.
        exact: The file must have this many.
        sha256: What its sha256 must be, in hex.
        stop: Ends the copy early.

    Raises:
        FetchFailed: The source failed, or the bytes are not the right ones.
        OSError: The copy could not be written.
        StoreClosed: `stop` was set.
    """
    digest = hashlib.sha256()
    done = 0
    with closing(source.chunks(name, limit)) as chunks:
        for chunk in chunks:
            if stop.is_set():
                raise StoreClosed
            done += len(chunk)
            if done > limit:
                raise FetchFailed(f"it has more than {limit} bytes")
            digest.update(chunk)
            _write_all(descriptor, chunk)
    if exact and done != limit:
        raise FetchFailed(f"it ends after {done} of {limit} bytes")
    if digest.hexdigest() != sha256:
        raise FetchFailed(f"its sha256 is {digest.hexdigest()}, the manifest says {sha256}")
    return done


def retried(attempt: Callable[[], T], stop: threading.Event) -> T:
    """Return what `attempt` returns, trying twice more where that may help.

    Args:
        attempt: What to do.
        stop: Ends the pauses between the tries early.

    Raises:
        FetchFailed: Every try failed; each reason is named once.
        StoreClosed: `stop` was set.
    """
    failures: list[FetchFailed] = []
    for pause in (*PAUSES, None):
        try:
            return attempt()
        except FetchFailed as error:
            failures.append(error)
            if pause is None or not error.again:
                break
        if stop.wait(pause):
            raise StoreClosed
    tries = f" ({len(failures)} tries)" if len(failures) > 1 else ""
    raise type(failures[-1])("; ".join(dict.fromkeys(map(str, failures))) + tries) from failures[-1]


def reason(error: OSError) -> str:
    """Return what the operating system says, without the path that the message around it names anyway."""
    return error.strerror or str(error)


def _write_all(descriptor: int, chunk: bytes | memoryview) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(descriptor, view) :]
