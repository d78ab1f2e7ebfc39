"""The folder that `hopescale data encode` writes, or somebody by hand: features.json and one .npz a clip."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from data_pipeline.alignment import ALIGNMENTS
from data_pipeline.encode.documents import FEATURES_FILE, read_document
from data_pipeline.errors import DataError, Problem, nearest
from data_pipeline.schema import FIELDS, EncodeMode
from data_pipeline.sources.agreement import key_problem
from data_pipeline.sources.base import SourceClip, SourceProvenance
from data_pipeline.sources.clip_source import ClipSource, FoundClip
from data_pipeline.sources.flat import archive_arrays
from data_pipeline.sources.labels import PARTITION_RULE, is_valid_partition
from data_pipeline.sources.layout import FEATURES_DTYPES
from data_pipeline.sources.provenance import combined
from data_pipeline.sources.stored import NpzArray, StoredArray, opened, reason

_PIECE = 1 << 20
_TEXTS = ("encoder", "weights_sha256", "encode_mode", "preprocessing", "pixels_digest")
_TYPES = {**dict.fromkeys((*_TEXTS, "digest"), str), "grid": list, "clips": list}
_CLIP_TYPES = {"key": str, "partition": str, "split": str, "length": int, "sha256": str}
_MAX_PROBLEMS = 20


@dataclass(kw_only=True)
class FeaturesFolder(ClipSource):
    """features.json with the clips and where the features come from, and `PARTITION/KEY.npz` for each clip.

    Every .npz is compared with its sha256 when it is read. Provenance is that of features.json; what it does not know
    may be given beside it.
    """

    kind = "features"

    def __post_init__(self) -> None:
        """Read features.json.

        Raises:
            DataError: It is missing, or lacks fields, or they have other types; all problems at once.
        """
        document = self._document()
        self.provenance = _provenance(document, self.provenance, self.path)
        super().__post_init__()
        if self.features_dtype is None and document.get("dtype") in FEATURES_DTYPES:
            self.features_dtype = document["dtype"]

    def found(self) -> Iterable[FoundClip]:
        """See `ClipSource`."""
        for number, clip in enumerate(self._document()["clips"]):
            key, partition = clip["key"], clip["partition"]
            where = f"{FEATURES_FILE}: clips[{number}]"
            problem = key_problem(key)
            if not problem and not is_valid_partition(partition):
                problem = f"{where}: the partition {partition[:80]!r} has other signs than {PARTITION_RULE}"
            if problem:
                yield FoundClip(key, where, problem=problem)
                continue
            name = f"{partition}/{key}.npz"
            try:
                arrays = self._arrays(name)
            except (OSError, ValueError) as error:
                yield FoundClip(key, name, problem=f"{name}: {reason(error)}")
                continue
            yield FoundClip(key, name, arrays, partition, clip["split"], clip["length"], clip["sha256"])

    def again(self, clip: SourceClip) -> Mapping[str, StoredArray]:
        """See `ClipSource`."""
        try:
            with opened(self.path / clip.where) as (descriptor, size, _):
                digest = _sha256(descriptor, size)
            if digest != clip.stamp:
                raise ValueError(f"its sha256 differs from {FEATURES_FILE}")
            return self._arrays(clip.where)
        except (OSError, ValueError) as error:
            raise self._unreadable(clip, f"{clip.where}: {reason(error)}") from error

    def _is_same(self, clip: SourceClip, stamps: Mapping[str, str]) -> bool:
        # `again` has compared the sha256.
        return True

    def _arrays(self, name: str) -> dict[str, StoredArray]:
        return archive_arrays(NpzArray(self.path / name, name, ""), {field: field for field in FIELDS}, set())

    def _document(self) -> dict[str, Any]:
        document = read_document(self.path, FEATURES_FILE, "features", "hopescale data encode")
        _check_types(document, self.path / FEATURES_FILE)
        return document


def _check_types(document: Mapping[str, Any], path: Path) -> None:
    clips = document.get("clips")
    entries: list[tuple[Any, Mapping[str, type], str]] = [(document, _TYPES, "features")]
    entries += [
        (clip, _CLIP_TYPES, f"features.clips[{number}]")
        for number, clip in enumerate(clips if isinstance(clips, list) else ())
    ]
    problems = []
    for entry, types, where in entries:
        if not isinstance(entry, dict):
            problems.append(Problem(where, entry, "must be an object", f"correct {path}"))
            continue
        for name, kind in types.items():
            value = entry.get(name)
            if not isinstance(value, kind) or isinstance(value, bool):
                problems.append(
                    Problem(f"{where}.{name}", value, f"must be of type {kind.__name__}", f"correct {path}")
                )
    if problems:
        raise DataError(problems[:_MAX_PROBLEMS])


def _provenance(document: Mapping[str, Any], given: SourceProvenance, folder: Path) -> SourceProvenance:
    """Return what features.json says, with `given` where it says nothing."""
    alignment = document.get("action_alignment", given.action_alignment)
    problems = []
    for name, value, valid in (
        ("encode_mode", document["encode_mode"], get_args(EncodeMode)),
        ("action_alignment", alignment, ALIGNMENTS),
    ):
        if value not in valid:
            problems.append(Problem(f"features.{name}", value, "there is no such thing", nearest(str(value), valid)))
    grid = document["grid"]
    if len(grid) != 2 or not all(type(side) is int and side > 0 for side in grid):
        problems.append(Problem("features.grid", grid, "must be rows and columns of tokens", "correct features.json"))
    if problems:
        raise DataError(problems)
    own = SourceProvenance(
        **{name: document[name] for name in _TEXTS},
        grid=(grid[0], grid[1]),
        features_digest=document["digest"],
        action_alignment=alignment,
    )
    return combined(asdict(own), given, folder / FEATURES_FILE)


def _sha256(descriptor: int, size: int) -> str:
    digest, at = hashlib.sha256(), 0
    while at < size:
        piece = os.pread(descriptor, min(_PIECE, size - at), at)
        if not piece:
            raise ValueError("it was truncated while it was read")
        digest.update(piece)
        at += len(piece)
    return digest.hexdigest()
