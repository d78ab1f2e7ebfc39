"""Folders with one .npy of features a clip and sidecars beside it, or with one .npz a clip."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.schema import FIELDS
from data_pipeline.sources.base import SourceClip
from data_pipeline.sources.clip_source import ClipSource, FoundClip
from data_pipeline.sources.labels import natural
from data_pipeline.sources.layout import REQUIRED
from data_pipeline.sources.stored import NpyArray, NpzArray, StoredArray, npz_names, reason

_SUFFIXES = {name: (f".{name}.npy", f"_{name}.npy") for name in FIELDS}


@dataclass(kw_only=True)
class FlatFolder(ClipSource):
    """Features as `KEY.npy`, `KEY.features.npy` or `features/KEY.npy`, in folders of any depth, which keys begin with.

    Each other field is `KEY.FIELD.npy`, `KEY_FIELD.npy` or `FIELD/KEY.npy`.
    """

    kind = "npy"

    def found(self) -> Iterable[FoundClip]:
        """See `ClipSource`."""
        names, links = _files(self.path, ".npy")
        yield from _link_problems(links)
        keys = {_key(name) for name in names}
        for key in sorted(keys, key=natural):
            arrays, problem = self._arrays(key, names)
            missing = [name for name in REQUIRED if name not in arrays]
            if missing and not problem:
                places = " or ".join(_candidates(key, missing[0]))
                problem = f"{next(map(str, arrays.values()))}: there are no {missing[0]} with it, as {places}"
            yield FoundClip(key, key, arrays, problem=problem)

    def again(self, clip: SourceClip) -> Mapping[str, StoredArray]:
        """See `ClipSource`."""
        possible = {name for field in FIELDS for name in _candidates(clip.where, field)}
        return self._arrays(clip.where, {name for name in possible if os.path.lexists(self.path / name)})[0]

    def _arrays(self, key: str, names: set[str]) -> tuple[dict[str, StoredArray], str]:
        arrays: dict[str, StoredArray] = {}
        for field in FIELDS:
            there = [name for name in _candidates(key, field) if name in names]
            if len(there) > 1:
                return {}, f"{there[0]}: {there[1]} could be the {field} of the same clip; leave one of them"
            if there:
                arrays[field] = NpyArray(self.path / there[0], there[0])
        return arrays, ""


@dataclass(kw_only=True)
class NpzFolder(ClipSource):
    """One `KEY.npz` a clip, in folders of any depth, which keys begin with.

    Attributes:
        features: Name of the array; None means `features`. The same holds for the other fields.
        actions: See features.
        states: See features; an array named here must be in every clip.
        extrinsics: See states.
        features_scale: See states.
    """

    features: str | None = None
    actions: str | None = None
    states: str | None = None
    extrinsics: str | None = None
    features_scale: str | None = None

    kind = "npz"

    def found(self) -> Iterable[FoundClip]:
        """See `ClipSource`."""
        names, links = _files(self.path, ".npz")
        yield from _link_problems(links)
        for name in sorted(names, key=natural):
            key = name.removesuffix(".npz")
            try:
                yield FoundClip(key, name, self._arrays(name))
            except (OSError, ValueError) as error:
                yield FoundClip(key, name, problem=f"{name}: {reason(error)}")

    def again(self, clip: SourceClip) -> Mapping[str, StoredArray]:
        """See `ClipSource`."""
        chosen = self._chosen()
        return {name: NpzArray(self.path / clip.where, clip.where, chosen[name]) for name in clip.arrays}

    def _arrays(self, name: str) -> dict[str, StoredArray]:
        return archive_arrays(NpzArray(self.path / name, name, ""), self._chosen(), self._asked())

    def _chosen(self) -> dict[str, str]:
        return {field: getattr(self, field) or field for field in FIELDS}

    def _asked(self) -> set[str]:
        return {field for field in FIELDS if getattr(self, field) is not None}


def archive_arrays(archive: NpzArray, chosen: Mapping[str, str], asked: set[str]) -> dict[str, StoredArray]:
    """Return the arrays of a clip inside one .npz.

    Args:
        archive: Where it lies; its `name` does not matter.
        chosen: Name of each field's array.
        asked: Fields whose name the user gave: they must be there, as features and actions must.

    Raises:
        OSError: The archive cannot be opened.
        ValueError: It is not a .npz.
    """
    there = set(npz_names(archive.path, archive.start, archive.size))
    wanted = {"features", "actions", *asked}
    return {
        field: NpzArray(archive.path, archive.shown, name, archive.start, archive.size)
        for field, name in chosen.items()
        if name in there or field in wanted
    }


def _files(root: Path, suffix: str) -> tuple[set[str], list[str]]:
    """Return the relative paths of all files with a suffix, and of all links to folders, hidden ones left out."""
    files: set[str] = set()
    links: list[str] = []
    for folder, folders, names in os.walk(root, onerror=_raise):
        here = Path(folder).relative_to(root)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links += [(here / name).as_posix() for name in folders if (root / here / name).is_symlink()]
        files.update((here / name).as_posix() for name in names if name.endswith(suffix) and not name.startswith("."))
    return files, sorted(links)


def _raise(error: OSError) -> None:
    raise error


def _link_problems(links: list[str]) -> Iterator[FoundClip]:
    for link in links:
        yield FoundClip("", link, problem=f"{link}: it is a link to a folder, which is not followed")


def _key(name: str) -> str:
    """Return the key of the clip a file belongs to."""
    for field, suffixes in _SUFFIXES.items():
        if name.startswith(f"{field}/"):
            return name.removeprefix(f"{field}/").removesuffix(".npy")
        for suffix in suffixes:
            stem = name.removesuffix(suffix)
            # A file called `_actions.npy` belongs to no other.
            if stem not in (name, "") and not stem.endswith("/"):
                return stem
    return name.removesuffix(".npy")


def _candidates(key: str, field: str) -> list[str]:
    names = [f"{key}{suffix}" for suffix in _SUFFIXES[field]] + [f"{field}/{key}.npy"]
    return [*([f"{key}.npy"] if field == "features" else []), *names]
