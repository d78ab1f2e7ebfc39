"""The files of a zarr group with their sizes and sha256, so that a chunk that is lost is missed.

zarr takes a chunk that is not there for zeros; only a list from the time of writing tells one from the other.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from data_pipeline.cache import write_bytes
from data_pipeline.dataset.consistency import GROUP_FILES, MAX_GROUP_FILES, SHARD_FOLDER
from data_pipeline.shard.walk import open_regular

GROUP = "clips.zarr"
_BLOCK = 1 << 20


class GroupFile(NamedTuple):
    """A file of the group."""

    name: str
    """Below the folder of the shards, e.g. `clips.zarr/features/c/0/0/0/0`."""
    bytes: int
    sha256: str


class Loss(NamedTuple):
    """What is not as it was written."""

    name: str
    text: str
    expected: str | int | None = None
    actual: str | int | None = None


def write_group_files(out: Path, known: Mapping[str, tuple[int, str]]) -> list[GroupFile]:
    """Write and return the list of a group's files, sorted by name.

    Args:
        out: Folder of the data set.
        known: Bytes and sha256 of files that were hashed when they were written; all others are read.
    """
    content = []
    for name in _present(out):
        path = out / SHARD_FOLDER / name
        content.append(GroupFile(name, *(known.get(name) or (path.stat().st_size, _sha256(path)[1]))))
    lines = ",\n".join(json.dumps(each) for each in content)
    write_bytes(out / GROUP_FILES, f"[\n{lines}\n]\n".encode())
    return content


def group_digest(files: Iterable[GroupFile]) -> str:
    """Return one sha256, in hex, for all files of a group."""
    digest = hashlib.sha256()
    for each in files:
        digest.update(f"{each.name} {each.sha256}\n".encode())
    return digest.hexdigest()


def read_group_files(folder: Path) -> list[GroupFile]:
    """Read the list of a group's files.

    Args:
        folder: Of the data set.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no such list, or names files outside the group.
    """
    descriptor = open_regular(folder / GROUP_FILES)
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(MAX_GROUP_FILES + 1)
    if len(content) > MAX_GROUP_FILES:
        raise ValueError(f"it has more than {MAX_GROUP_FILES} bytes")
    try:
        listed = json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(listed, list) or not all(_is_entry(each) for each in listed):
        raise ValueError("it is not a list of files of the group with their bytes and sha256")
    files = [GroupFile(*each) for each in listed]
    if len({each.name for each in files}) != len(files):
        raise ValueError("it lists a file twice")
    return files


def group_losses(folder: Path, files: Iterable[GroupFile], *, every_byte: bool) -> Iterator[tuple[int, list[Loss]]]:
    """Yield for each file how many bytes were read, and what is not as the list says; files that are too many last.

    Args:
        folder: Of the data set.
        files: As listed.
        every_byte: Compare the sha256 of files too, not only their sizes.
    """
    listed = set()
    for each in files:
        listed.add(each.name)
        yield _checked(folder / SHARD_FOLDER / each.name, each, every_byte=every_byte)
    yield (
        0,
        [Loss(name, "a file that was not written with the group") for name in _present(folder) if name not in listed],
    )


def _checked(path: Path, wanted: GroupFile, *, every_byte: bool) -> tuple[int, list[Loss]]:
    try:
        info = path.lstat()
        if not stat.S_ISREG(info.st_mode):
            return 0, [Loss(wanted.name, "not a regular file")]
        if info.st_size != wanted.bytes:
            return 0, [Loss(wanted.name, "it has another size", wanted.bytes, info.st_size)]
        if not every_byte:
            return 0, []
        size, sha256 = _sha256(path)
    except FileNotFoundError:
        return 0, [Loss(wanted.name, "the file is missing")]
    except OSError as error:
        return 0, [Loss(wanted.name, f"the file cannot be read ({error.strerror})")]
    return size, [] if sha256 == wanted.sha256 else [Loss(wanted.name, "it has another sha256", wanted.sha256, sha256)]


def _present(folder: Path) -> list[str]:
    """Return the names of everything in the group but folders, sorted; links are not followed."""
    shards, found = folder / SHARD_FOLDER, []
    for place, folders, names in os.walk(shards / GROUP):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [Path(place, name).relative_to(shards).as_posix() for name in [*names, *links]]
    return sorted(found)


def _sha256(path: Path) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    descriptor = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def _is_entry(each: object) -> bool:
    if not isinstance(each, list) or [type(part) for part in each] != [str, int, str]:
        return False
    name, size, sha256 = each
    parts = name.split("/")
    return parts[0] == GROUP and len(parts) > 1 and not {"", ".", ".."} & set(parts) and size >= 0 and len(sha256) == 64
