"""Where the clips of a data set lie, by its index, in the pieces that have checksums of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.dataset.index import FIELD_COLUMNS, FRAME_COLUMN, Index
from data_pipeline.dataset.index_checks import frame_bytes
from data_pipeline.dataset.spans import Span
from data_pipeline.schema import Manifest


class Piece(NamedTuple):
    """Bytes of a shard that have a checksum of their own: a frame of features, or a small field."""

    row: int
    field: str
    frame: int
    checksum: int


class ClipPlaces:
    """Where the clips of a data set lie by its index; read by any number of threads."""

    def __init__(self, folder: Path, manifest: Manifest, index: Index) -> None:
        """Read the columns of an index in which `index_checks.check_index` found nothing."""
        self.folder = folder / manifest.shard_folder
        self.manifest = manifest
        self.index = index
        names = ("length", "rows", "partition", "split")
        self.lengths, self.recorded, self.partitions, self.splits = (np.asarray(index.column(n)) for n in names)
        self.columns = {
            name: tuple(np.asarray(index.column(f"{name}_{part}")) for part in FIELD_COLUMNS)
            for name in manifest.dtypes
        }
        self._frames = np.asarray(index.column(FRAME_COLUMN))
        self._frame_bytes = frame_bytes(manifest)
        shards = np.asarray(index.column("shard"))
        self._ends = np.searchsorted(shards, np.arange(len(manifest.shards)), side="right").tolist()

    def rows(self, shard: int) -> range:
        """Return the rows of the clips in one shard."""
        return range(self._ends[shard - 1] if shard else 0, self._ends[shard])

    def end(self, row: int, name: str) -> int:
        """Return the first byte after a field."""
        offset, nbytes, _ = self.columns[name]
        return int(offset[row]) + int(nbytes[row])

    def start(self, row: int, name: str) -> int:
        """Return the first byte of a field."""
        return int(self.columns[name][0][row])

    def pieces(self, row: int) -> Iterator[tuple[Piece, Span]]:
        """Yield the pieces of a clip in the order of the shard, and where they lie."""
        for name in sorted(self.columns, key=lambda name: self.start(row, name)):
            offset, nbytes, checksum = (int(column[row]) for column in self.columns[name])
            if name != "features":
                yield Piece(row, name, 0, checksum), Span(offset, nbytes)
                continue
            first, size = int(self.index.frame_starts[row]), self._frame_bytes
            for frame, expected in enumerate(self._frames[first : first + self.lengths[row]].tolist()):
                yield Piece(row, name, frame, expected), Span(offset + frame * size, size)
