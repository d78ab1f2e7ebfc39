"""Folders named by what they hold, so that a stage runs once and a changed input is never mistaken for the old one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def content_key(*parts: object) -> str:
    """Return 12 hex digits that change whenever a part changes.

    Args:
        parts: JSON values, paths (by their text), or dataclass instances (by their fields).

    Raises:
        TypeError: A part has no canonical JSON form.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no canonical JSON form")


def cached_folder(root: Path, name: str, key: str, build: Callable[[Path], object]) -> tuple[Path, bool]:
    """Return the folder `root/name-key`, building it first if it is absent.

    The work happens in a temporary sibling that is renamed when `build` returns: a folder under its final name is
    complete, and an interrupted build leaves nothing there.

    Args:
        root: Folder of all cached results; created if absent.
        name: What is held, e.g. `features`.
        key: Content key of everything the result depends on.
        build: Fills the empty folder it is given.

    Returns:
        The folder, and whether it was there already.
    """
    final = root / f"{name}-{key}"
    if final.is_dir():
        return final, True
    root.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=root))
    # mkdtemp gives 0700; a cache on a shared disk follows the user's umask like any other folder.
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o777 & ~umask)
    try:
        build(temporary)
        try:
            temporary.rename(final)
        except OSError:
            # Another process finished the same key first: its content equals ours.
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final, False


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable JSON so that `path` either has the old content or all of the new one."""
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def write_bytes(path: Path, content: bytes, *, mode: int | None = None) -> None:
    """Write a file so that `path` either has the old content or all of the new one, also after a power cut.

    Args:
        path: Of the file.
        content: All of it.
        mode: Who may read it; None leaves that to the user's umask.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Make the content of a file, or the renames inside a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
