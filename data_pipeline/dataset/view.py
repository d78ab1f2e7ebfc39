"""The samples that settings select from a data set: clips, or windows of clips, before any order is made."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property
from pathlib import Path
from re import compile as compile_pattern

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset.index import Index
from data_pipeline.errors import DataError, Problem
from data_pipeline.order import mix64
from data_pipeline.schema import SPLITS, DataConfig, Manifest, Split

_WINDOW = 0x57494E44


@dataclass(frozen=True)
class View:
    """Samples of one split, in the order of the shards.

    Attributes:
        index: Columns of the data set.
        clips: Row of the index of each sample, i64 `[num_samples]`.
        starts: First frame of each sample in its clip, i64 `[num_samples]`.
        lengths: Frames of each sample, i64 `[num_samples]`.
        uids: Identity of each sample, u64 `[num_samples]`.
        partition_names: Of the manifest.
        digest: Hex digits that two views share exactly when they select the same samples.
    """

    index: Index
    clips: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    uids: NDArray[np.uint64]
    partition_names: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.clips)

    @cached_property
    def shards(self) -> NDArray[np.int64]:
        """The shard of each sample, i64 `[num_samples]`."""
        return self.index.column("shard")[self.clips].astype(np.int64)

    @cached_property
    def shards_digest(self) -> str:
        """Hex digits that two views share exactly when the same samples share a shard."""
        names = np.zeros(int(self.shards.max()) + 1, np.uint64)
        np.bitwise_xor.at(names, self.shards, self.uids)
        return hashlib.sha256(np.sort(names).tobytes()).hexdigest()[:16]

    @cached_property
    def partition_codes(self) -> NDArray[np.int64]:
        """The partition of each sample, i64 `[num_samples]`."""
        return self.index.column("partition")[self.clips].astype(np.int64)

    def partition(self, row: int) -> str:
        """Return the partition of one sample."""
        return self.partition_names[int(self.partition_codes[row])]

    def key(self, row: int) -> str:
        """Return the key of one sample's clip; a window's start follows an @."""
        key = self.index.key(int(self.clips[row]))
        return f"{key}@{int(self.starts[row])}" if self.windowed else key

    @cached_property
    def windowed(self) -> bool:
        """Whether samples may start within a clip."""
        return bool(self.starts.any())


def open_view(index: Index, manifest: Manifest, config: DataConfig, split: Split) -> View:
    """Select samples.

    Args:
        index: Columns of the data set.
        manifest: Of the data set.
        config: The data settings.
        split: train or heldout.

    Raises:
        DataError: Nothing is left, or a skip list cannot be read or names clips that are not there.
    """
    names = tuple(manifest.partitions)
    codes = [names.index(name) for name in viewed_partitions(manifest, config)]
    lengths = np.asarray(index.column("length")).astype(np.int64)
    chosen = (index.column("split") == SPLITS.index(split)) & np.isin(index.column("partition"), codes)
    select = config.select
    chosen &= lengths >= max(select.min_frames, config.window.frames if config.window else 2)
    if select.max_frames is not None:
        chosen &= lengths <= select.max_frames
    chosen &= _by_key(index, config)
    chosen[_skip_list(index, config.skip_list)] = False
    clips = np.flatnonzero(chosen)
    if not len(clips):
        rule = f"leaves no {split} clip of {manifest.num_clips} in the data set"
        fix = "widen data.view, data.select, data.window or data.skip_list"
        raise DataError(Problem("data.select", select.model_dump(exclude_defaults=True), rule, fix))
    uids, lengths, starts = index.column("uid")[clips], lengths[clips], np.zeros(len(clips), np.int64)
    if config.window is not None:
        frames, stride = config.window.frames, config.window.stride
        counts = (lengths - frames) // stride + 1
        ordinal = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        clips, starts = np.repeat(clips, counts), ordinal * stride
        uids = mix64(mix64(np.repeat(uids, counts), _WINDOW) ^ starts.astype(np.uint64))
        lengths = np.full(len(clips), frames)
    if config.frames is not None:
        lengths = np.minimum(lengths, config.frames)
    return View(index, clips, starts, lengths, uids, names, _digest(uids, lengths))


def part_rows(view: View, config: DataConfig) -> list[NDArray[np.int64]]:
    """Return the rows of a view that each part of a mixture may draw from."""
    codes = [[view.partition_names.index(name) for name in part.view] for part in config.mixture]
    return [np.flatnonzero(np.isin(view.partition_codes, own)) for own in codes]


def check_parts(view: View, config: DataConfig) -> None:
    """Check that every part of a mixture has clips, and as many as it asks for.

    Raises:
        DataError: Names all parts that do not.
    """
    problems = []
    for number, (part, rows) in enumerate(zip(config.mixture, part_rows(view, config), strict=True)):
        where = f"data.mixture.{number}"
        if not len(rows):
            rule = "data.select, data.window and data.skip_list leave no training clip of these partitions"
            problems.append(Problem(f"{where}.view", list(part.view), rule, "widen them, or leave the part out"))
        elif part.clips is not None and part.clips > len(rows):
            rule = f"the view has only {len(rows)} clips of these partitions"
            problems.append(Problem(f"{where}.clips", part.clips, rule, f"use at most {len(rows)}, or leave it out"))
    if problems:
        raise DataError(problems)


def viewed_partitions(manifest: Manifest, config: DataConfig) -> tuple[str, ...]:
    """Return the names of the partitions that are read."""
    return tuple(manifest.partitions) if config.view is None else config.view


def _by_key(index: Index, config: DataConfig) -> NDArray[np.bool_] | np.bool_:
    select = config.select
    if select.keys is None and select.first_key is None and select.end_key is None:
        return np.bool_(True)
    matches = compile_pattern(translate(select.keys)).match if select.keys is not None else lambda key: True
    first, end, keys = select.first_key, select.end_key, index.keys()
    return np.array(
        [matches(key) is not None and (first is None or key >= first) and (end is None or key < end) for key in keys],
        bool,
    )


def _skip_list(index: Index, path: str | None) -> NDArray[np.int64]:
    if path is None:
        return np.zeros(0, np.int64)
    try:
        wanted = set(Path(path).read_text(encoding="ascii").split())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            Problem("data.skip_list", path, f"cannot be read ({error})", "name a file of keys, one a line")
        ) from error
    rows = {key: row for row, key in enumerate(index.keys()) if key in wanted}
    missing = sorted(wanted - rows.keys())
    if missing:
        rule = f"names {len(missing)} clips that the data set does not have, such as {missing[0]}"
        raise DataError(Problem("data.skip_list", path, rule, "name the skip list of this data set"))
    return np.array(sorted(rows.values()), np.int64)


def _digest(uids: NDArray[np.uint64], lengths: NDArray[np.int64]) -> str:
    # Sums and differences of hashes do not depend on the order of the shards, and cost no sort of millions.
    mixed = mix64(uids ^ lengths.astype(np.uint64))
    parts = [len(uids), int(np.add.reduce(mixed)), int(np.bitwise_xor.reduce(mixed))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
