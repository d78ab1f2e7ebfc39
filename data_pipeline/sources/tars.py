"""Tars in the way of WebDataset as a source: members KEY.EXTENSION, those of a clip one after another."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.dataset.samples import MAX_META, Sample, samples
from data_pipeline.errors import DataError, Problem
from data_pipeline.schema import FIELDS
from data_pipeline.shard.walk import BadTar, open_regular
from data_pipeline.sources.base import SourceClip
from data_pipeline.sources.clip_source import ClipSource, FoundClip
from data_pipeline.sources.flat import archive_arrays
from data_pipeline.sources.layout import FEATURES_DTYPES, REQUIRED
from data_pipeline.sources.npy_file import BadArray
from data_pipeline.sources.provenance import stated_by
from data_pipeline.sources.stored import NpyArray, NpzArray, StoredArray, parse_json, read_small, reason
from data_pipeline.sources.tar_files import TarFiles, find_tars

_ARCHIVE = -1
_MOST_EXTENSIONS = 2
Members = dict[int, tuple[int, int]]
"""First byte and bytes of members, by `_ARCHIVE` or `_MOST_EXTENSIONS` x the field's number + the extension's."""


@dataclass(kw_only=True)
class TarShards(ClipSource):
    """A .tar, or a folder of them at any depth; compressed ones are listed as bad.

    Members of a clip are its key, a dot, and an extension, taken in lower case: `FIELD.npy` for each field, `npy`
    for features alone, or one `npz` with arrays named like the fields. Partition, split, type of the features, encoder,
    encode mode and action alignment are those of the clip's `meta.json` or `json`, as far as it says them.

    Attributes:
        features: Extension of the features' members, e.g. `emb.npy`, or name of the array in a .npz; None means
            `features.npy` or `npy`, or `features`. The same holds for the other fields.
        actions: See features.
        states: See features; a field named here must be in every clip.
        extrinsics: See states.
        features_scale: See states.
        archive: Extension of the .npz members.
    """

    features: str | None = None
    actions: str | None = None
    states: str | None = None
    extrinsics: str | None = None
    features_scale: str | None = None
    archive: str = "npz"

    kind = "tars"

    def found(self) -> Iterable[FoundClip]:
        """See `ClipSource`."""
        tars = find_tars(self.path) if self.path.suffix != ".tar" else TarFiles((self.path.name,), {})
        for name, rule in tars.unread.items():
            yield FoundClip("", name, problem=f"{name}: {rule}")
        for tar in tars.tars:
            for sample in self._walk(tar):
                where = f"{tar}/{sample.key}"
                try:
                    yield self._clip(tar, where, sample)
                except (OSError, ValueError) as error:
                    yield FoundClip(sample.key, where, problem=f"{where}: {reason(error)}")

    def again(self, clip: SourceClip) -> Mapping[str, StoredArray]:
        """See `ClipSource`."""
        tar = clip.where[: -len(clip.key) - 1]
        try:
            return self._stored(tar, _members(clip.places), clip.key)
        except (OSError, ValueError) as error:
            raise self._unreadable(clip, reason(error)) from error

    def _file(self, tar: str) -> Path:
        return (self.path.parent if self.path.suffix == ".tar" else self.path) / tar

    def _walk(self, tar: str) -> Iterator[Sample]:
        try:
            descriptor = open_regular(self._file(tar))
            try:
                yield from samples(descriptor)
            finally:
                os.close(descriptor)
        except (OSError, BadTar) as error:
            # Where a tar is damaged nobody knows how many clips follow.
            raise DataError(Problem("source", self._file(tar), reason(error), "copy the tar again")) from error

    def _clip(self, tar: str, where: str, sample: Sample) -> FoundClip:
        members = self._chosen(sample)
        places = tuple(number for part, place in members.items() for number in (part, *place))
        arrays, meta = self._stored(tar, members, sample.key), self._meta(tar, sample)
        for label in ("partition", "split"):
            if not isinstance(meta.get(label, ""), str):
                raise BadArray(f"{label} is {str(meta[label])[:80]}, not a text")
        dtypes = meta.get("dtypes")
        dtype = dtypes.get("features") if isinstance(dtypes, dict) else None
        return FoundClip(
            sample.key,
            where,
            arrays,
            meta.get("partition"),
            meta.get("split"),
            features_dtype=dtype if dtype in FEATURES_DTYPES else None,
            stated=stated_by(meta),
            places=places,
        )

    def _chosen(self, sample: Sample) -> Members:
        """Return which members of a sample are read.

        Raises:
            BadArray: One that is needed is not there.
        """
        if self.archive.lower() in sample.members:
            member = sample.members[self.archive.lower()]
            return {_ARCHIVE: (member.offset, member.size)}
        chosen: Members = {}
        asked = self._asked()
        for name in dict.fromkeys((*REQUIRED, *FIELDS)):
            extensions = self._extensions(name)
            there = next((place for place, each in enumerate(extensions) if each in sample.members), None)
            if there is not None:
                member = sample.members[extensions[there]]
                chosen[_MOST_EXTENSIONS * FIELDS.index(name) + there] = (member.offset, member.size)
            elif name in REQUIRED or name in asked:
                raise BadArray(_missing(sample, extensions))
        return chosen

    def _stored(self, tar: str, members: Members, key: str) -> dict[str, StoredArray]:
        path = self._file(tar)
        if _ARCHIVE in members:
            start, size = members[_ARCHIVE]
            archive = NpzArray(path, f"{tar}: {key}.{self.archive}", "", start, size)
            return archive_arrays(archive, {name: getattr(self, name) or name for name in FIELDS}, self._asked())
        arrays: dict[str, StoredArray] = {}
        for part, (start, size) in members.items():
            name = FIELDS[part // _MOST_EXTENSIONS]
            extension = self._extensions(name)[part % _MOST_EXTENSIONS]
            arrays[name] = NpyArray(path, f"{tar}: {key}.{extension}", start, size)
        return arrays

    def _asked(self) -> set[str]:
        return {name for name in FIELDS if getattr(self, name) is not None}

    def _extensions(self, name: str) -> tuple[str, ...]:
        chosen = getattr(self, name)
        if chosen is not None:
            return (chosen.lower(),)
        return (f"{name}.npy", "npy") if name == "features" else (f"{name}.npy",)

    def _meta(self, tar: str, sample: Sample) -> dict[str, Any]:
        member = sample.meta
        if member is None:
            return {}
        try:
            return parse_json(read_small(self._file(tar), MAX_META, member.offset, member.size))
        except ValueError as error:
            raise BadArray(f"{member.name}: {error}") from error


def _members(places: tuple[int, ...]) -> Members:
    """Return what `SourceClip.places` says: part, first byte and bytes of each member, one after another."""
    return {places[at]: (places[at + 1], places[at + 2]) for at in range(0, len(places), 3)}


def _missing(sample: Sample, extensions: tuple[str, ...]) -> str:
    there = ", ".join(f"{sample.key}.{extension}" for extension in list(sample.members)[:6])
    text = f"there is no member {sample.key}.{' or '.join(extensions)} but {there or 'none'}"
    if any(extension.endswith(f".{ending}") for extension in sample.members for ending in extensions):
        text += "; is there a dot in the key? A key ends at the first one"
    return text
