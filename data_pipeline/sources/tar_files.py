"""Which files in a folder are tars, at any depth, and which look like some but cannot be read as they are."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.sources.labels import natural

_COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tzst|tar\.[a-z0-9]+)$", re.IGNORECASE)


@dataclass(frozen=True)
class TarFiles:
    """What a folder holds.

    Attributes:
        tars: Relative paths of the files `NAME.tar`, digits sorted as numbers.
        unread: Relative paths of what may hold clips and is not read, with the reason.
    """

    tars: tuple[str, ...]
    unread: Mapping[str, str]


def find_tars(folder: Path) -> TarFiles:
    """Look for tars in a folder and everything below it; hidden files and folders are passed over.

    Raises:
        OSError: A folder cannot be read.
    """
    tars: list[str] = []
    unread: dict[str, str] = {}
    for place, folders, names in os.walk(folder, onerror=_raise):
        here = Path(place).relative_to(folder)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if (folder / here / name).is_symlink():
                unread[(here / name).as_posix()] = "it is a link to a folder, which is not followed"
        for name in sorted(names):
            if name.startswith("."):
                continue
            path = (here / name).as_posix()
            if name.endswith(".tar"):
                tars.append(path)
            elif name.lower().endswith(".tar"):
                unread[path] = "the names of tars end in .tar, in small letters"
            elif _COMPRESSED.search(name):
                unread[path] = "compressed tars cannot be read at any place; unpack it"
    return TarFiles(tuple(sorted(tars, key=natural)), unread)


def _raise(error: OSError) -> None:
    raise error
