"""One pass over the bytes of a tar that is indexed where it lies: checksums, sha256, finite values, statistics."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.checksum import ChecksumName, checksum_function
from data_pipeline.dataset.index import Row
from data_pipeline.dataset.samples import samples
from data_pipeline.dataset.spans import Span, SpanReader
from data_pipeline.dataset.tar_clips import TarClip, TarLayout, Unusable
from data_pipeline.dtypes import STORED_TYPES
from data_pipeline.schema import ROW_FIELDS, ShardEntry, Split
from data_pipeline.shard.convert import all_finite, first_not_finite
from data_pipeline.shard.statistics import Statistics
from data_pipeline.shard.tar import measured
from data_pipeline.shard.walk import open_regular

_CHANGED = "it has changed while it was indexed"
_WAIT = "index it again when nobody writes to it any more"


class ListedClip(NamedTuple):
    """What is known of a clip before its values are read."""

    key: str
    partition: int
    split: Split
    phase: int
    """Frames of the clips of its split whose keys sort before its own."""


@dataclass(frozen=True)
class IndexedTar:
    """What one pass found: the manifest's entry, rows of the index, and statistics to be merged."""

    entry: ShardEntry
    rows: tuple[Row, ...]
    statistics: dict[str, np.ndarray]


@dataclass(frozen=True)
class TarPass:
    """How tars of one folder are indexed.

    Attributes:
        folder: Of the tars.
        layout: Of the samples.
        like: Any clip: all others have the same fields, types and widths.
        partitions: Their number.
        sample_every: Statistics take one of so many (frame, token) pairs.
        checksum: Of the fields.
    """

    folder: Path
    layout: TarLayout
    like: TarClip
    partitions: int
    sample_every: int
    checksum: ChecksumName

    def run(
        self, name: str, number: int, listed: Sequence[ListedClip], reader: SpanReader, tick: Callable[[int], None]
    ) -> IndexedTar:
        """Read a tar from its first byte to its last.

        Args:
            name: Of the file.
            number: Of the tar among all.
            listed: Its clips, as an earlier look at its headers found them.
            reader: Of the calling thread.
            tick: Called with numbers of clips that are done.

        Raises:
            OSError: It cannot be read.
            Unusable: A value is not finite, or the file has changed since it was listed.
            BadTar: It has become damaged since.
        """
        descriptor = open_regular(self.folder / name)
        try:
            before = os.fstat(descriptor)
            clips = [self.layout.clip(descriptor, sample) for sample in samples(descriptor)]
            if [clip.key for clip in clips] != [clip.key for clip in listed] or not all(map(self._is_alike, clips)):
                raise Unusable(_CHANGED, _WAIT)
            digest, statistics, rows = hashlib.sha256(), self._statistics(), []
            spans = [_extent(clip) for clip in clips]
            for place, content in reader.read(descriptor, spans, size=before.st_size, digest=digest):
                assert content is not None
                known, arrays = listed[place], _arrays(clips[place], spans[place].offset, content)
                rows.append(self._row(clips[place], known, number, arrays))
                if known.split == "train":
                    statistics.add(arrays, known.partition, known.phase)
                tick(1)
            after = os.fstat(descriptor)
            if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise Unusable(_CHANGED, _WAIT)
        finally:
            os.close(descriptor)
        entry = ShardEntry(name, before.st_size, len(rows), digest.hexdigest())
        return IndexedTar(entry, tuple(rows), statistics.arrays())

    def _is_alike(self, clip: TarClip) -> bool:
        return not clip.difference(self.like)

    def _statistics(self) -> Statistics:
        specs = self.like.specs
        widths = {name: specs[name].shape[1] for name in ROW_FIELDS if name in specs}
        _, tokens, channels = specs["features"].shape
        kind = specs["features"].dtype
        return Statistics((tokens, channels), widths, self.partitions, self.sample_every, feature_type=kind)

    def _row(self, clip: TarClip, known: ListedClip, number: int, arrays: Mapping[str, np.ndarray]) -> Row:
        payloads, checksum = {}, checksum_function(self.checksum)
        for name, array in arrays.items():
            _check_finite(clip, name, array)
            payloads[name] = measured(self.checksum, checksum, clip.places[name][0], name, array)
        return Row(clip.key, number, clip.length, known.partition, known.split, clip.rows, payloads)


def _extent(clip: TarClip) -> Span:
    """Return the bytes from the first value of a clip to its last: members of a sample lie side by side."""
    start = min(offset for offset, _ in clip.places.values())
    return Span(start, max(offset + nbytes for offset, nbytes in clip.places.values()) - start)


def _arrays(clip: TarClip, start: int, content: NDArray[np.uint8]) -> dict[str, np.ndarray]:
    arrays = {}
    for name, (offset, nbytes) in clip.places.items():
        spec = clip.specs[name]
        values = content[offset - start : offset - start + nbytes].view(STORED_TYPES[spec.dtype].numpy)
        # Members of others may start anywhere in the buffer; torch wants numbers on their boundary.
        arrays[name] = (values if values.flags.aligned else values.copy()).reshape(spec.shape)
    return arrays


def _check_finite(clip: TarClip, name: str, array: np.ndarray) -> None:
    kind = clip.specs[name].dtype
    if not all_finite(array, kind):
        place, value = first_not_finite(array, kind)
        text = f"{clip.names[name]}: {name} holds {value} at {list(place)}: all values must be finite"
        raise Unusable(text, "repair the clip, or leave it out of the tar")
