"""Filling a block of memory with the clips of a batch: read, checked, aligned, padded; and what a bad one leads to."""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.alignment import ActionAlignment, aligned
from data_pipeline.checksum import checksum_function
from data_pipeline.dataset.index import FRAME_COLUMN
from data_pipeline.dataset.view import View
from data_pipeline.dtypes import STORED_TYPES
from data_pipeline.errors import DataError, Problem
from data_pipeline.order import mix64
from data_pipeline.reader.counters import Counters
from data_pipeline.reader.global_order import Places
from data_pipeline.reader.layout import BatchLayout
from data_pipeline.reader.shard_reads import ByteRange, OpenShards, ShortRead, runs
from data_pipeline.schema import ROW_FIELDS, Manifest, ReaderConfig

RETRIES = 2
RETRY_SECONDS = (0.0, 0.01, 0.1)
"""Pauses before a clip is read again: a file server may need a moment."""
_LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_SUBSTITUTE = 0x53554253


class BadClip(Exception):
    """Why a clip cannot be used; the message names the field, the offset and the shard."""

    def __init__(self, reason: str, *, kind: str, expected: int | None = None, actual: int | None = None) -> None:
        """Take what is wrong, its kind (checksum, short or unreadable), and the checksums that differ."""
        super().__init__(reason)
        self.kind, self.expected, self.actual = kind, expected, actual


class Reading(NamedTuple):
    """One clip's ranges, by field; those of small fields go to memory of their own, to be aligned from there."""

    row: int
    ranges: dict[str, ByteRange]


class ClipFields:
    """Where the fields of a view's samples lie in the shards, and whether what was read is what was written."""

    def __init__(self, manifest: Manifest, view: View, *, check: bool = True) -> None:
        """Open the columns of an index.

        Args:
            manifest: Of the data set.
            view: Samples.
            check: Compare checksums.
        """
        self.manifest = manifest
        self.view = view
        self.check = check
        column = view.index.column
        self._columns = {
            name: tuple(column(f"{name}_{part}") for part in ("offset", "nbytes", "checksum"))
            for name in manifest.dtypes
        }
        self._shards, self._stored, self._rows = column("shard"), column("length"), column("rows")
        self._frame_checksums = column(FRAME_COLUMN)
        self._checksum = checksum_function(manifest.checksum)

    def shard(self, row: int) -> int:
        """Return the shard of one sample."""
        return int(self._shards[self.view.clips[row]])

    def span(self, row: int, name: str) -> tuple[int, int]:
        """Return the offset and the size in bytes of what one sample needs of a field."""
        clip = self.view.clips[row]
        offset, nbytes = int(self._columns[name][0][clip]), int(self._columns[name][1][clip])
        if name != "features":
            return offset, nbytes
        frame = nbytes // int(self._stored[clip])
        return offset + int(self.view.starts[row]) * frame, int(self.view.lengths[row]) * frame

    def verify(self, row: int, name: str, content: NDArray[np.uint8]) -> None:
        """Check what was read of one field.

        Raises:
            BadClip: It is not what was written.
        """
        if not self.check:
            return
        clip, length = self.view.clips[row], int(self.view.lengths[row])
        if name != "features" or length == int(self._stored[clip]):
            pieces, expected = content[None], [int(self._columns[name][2][clip])]
        else:
            first = int(self.view.index.frame_starts[clip]) + int(self.view.starts[row])
            pieces, expected = content.reshape(length, -1), self._frame_checksums[first : first + length].tolist()
        actual = [self._checksum(piece) for piece in pieces]
        if actual != expected:
            at = next(n for n, (a, b) in enumerate(zip(actual, expected, strict=True)) if a != b)
            kind = self.manifest.checksum
            where = f"field {name} at offset {self.span(row, name)[0]} of {self.shard_name(row)}"
            reason = f"{where} has {kind} {actual[at]:08x}, expected {expected[at]:08x}"
            raise BadClip(reason, kind="checksum", expected=expected[at], actual=actual[at])

    def small(self, row: int, name: str, content: NDArray[np.uint8], alignment: ActionAlignment) -> NDArray[np.float32]:
        """Return the numbers of actions, states or extrinsics that belong to one sample, f32.

        Args:
            row: Of the view.
            name: Field.
            content: All bytes of the clip's field.
            alignment: Of recorded actions.
        """
        clip, start, length = self.view.clips[row], int(self.view.starts[row]), int(self.view.lengths[row])
        stored = int(self._stored[clip])
        kind = STORED_TYPES[self.manifest.dtypes[name]]
        values = content.view(kind.numpy).reshape(self.manifest.shape(name, stored, int(self._rows[clip])))
        if name == "actions":
            values = aligned(values, alignment, stored)
        transitions = length if name == "states" else length - 1
        return values[start : start + transitions].astype(np.float32, copy=False)

    def shard_name(self, row: int) -> str:
        """Return the file name of one sample's shard."""
        return self.manifest.shards[self.shard(row)].name

    def error(self, row: int, where: str, rule: str) -> DataError:
        """Return the error that ends a run for a sample that cannot be used.

        Args:
            row: Of the view.
            where: Its shard is, for whoever looks after it.
            rule: What is wrong.
        """
        fix = "`hopescale data verify` lists what is damaged; copy the shard again, and check the disk"
        return DataError(Problem(f"data.path: clip {self.view.key(row)}", where, rule, fix))


@dataclass
class BatchFiller:
    """Fills blocks for the ring; used by all its threads.

    Attributes:
        fields: Where clips lie.
        stored: Layout of batches as the shards hold them.
        layout: Of a block: the same, or with features decoded to f32.
        alignment: Of recorded actions.
        config: What to do with a bad clip.
        rows_of: Rows of the view that a part of a mixture draws from; substitutes come from the same part.
        seed: Of the run; a substitute is drawn by it and by the position.
        counters: What has been done.
        where: Path or URL of a shard, for errors.
        report: Takes one JSON line for each bad clip met.
    """

    fields: ClipFields
    stored: BatchLayout
    layout: BatchLayout
    alignment: ActionAlignment
    config: ReaderConfig
    rows_of: Callable[[int], NDArray[np.int64]]
    seed: int
    counters: Counters
    where: Callable[[int], str]
    report: Callable[[str], None]
    _bad: set[int] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _own: threading.local = field(default_factory=threading.local)

    def fill(self, block: NDArray[np.uint8], files: OpenShards, places: Places, positions: NDArray[np.int64]) -> Places:
        """Read clips into a block.

        Args:
            block: u8 `[layout.nbytes]`.
            files: Of the calling thread.
            places: Clips; at most `layout.clips`.
            positions: Of the clips in the run.

        Returns:
            The clips that are in the block now, and their weights: other ones where bad clips were met.

        Raises:
            DataError: A clip is bad and must not be, or too many are.
        """
        started = time.monotonic()
        rows, weights = places.rows.copy(), places.weights.copy()
        taken = self._as_stored(block)
        readings = [self._reading(taken, number, int(row)) for number, row in enumerate(rows)]
        left, unread = [len(reading.ranges) for reading in readings], set[int]()
        for run in runs(item for reading in readings for item in reading.ranges.values()):
            try:
                files.read(run)
            except (OSError, ShortRead, DataError):
                # One of the ranges cannot be read; which, shows when each clip is read alone.
                unread |= {item.owner for item in run}
            for number in [item.owner for item in run]:
                left[number] -= 1
                if left[number] == 0:
                    where = int(positions[number]), int(places.parts[number])
                    reading, row, weight = self._settled(taken, files, readings[number], where, number in unread)
                    rows[number], weights[number] = row, weight * weights[number]
                    self._finish(block, number, reading)
        nbytes = sum(len(item.target) for reading in readings for item in reading.ranges.values())
        self.counters.add(clips_read=len(rows), bytes_read=nbytes, read_seconds=time.monotonic() - started)
        return Places(rows, weights, places.parts)

    def _as_stored(self, block: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The memory that a batch is read to: the block itself, or this thread's own where it is decoded from there."""
        if self.layout is self.stored:
            return block
        if not hasattr(self._own, "memory"):
            self._own.memory = np.empty(self.stored.nbytes, np.uint8)
        return self._own.memory

    def _reading(self, block: NDArray[np.uint8], number: int, row: int) -> Reading:
        ranges = {}
        for name in self.fields.manifest.dtypes:
            offset, nbytes = self.fields.span(row, name)
            direct = name in ("features", "features_scale")
            target = self.stored.clip_bytes(block, name, number)[:nbytes] if direct else np.empty(nbytes, np.uint8)
            ranges[name] = ByteRange(self.fields.shard(row), offset, target, number)
        return Reading(row, ranges)

    def _settled(
        self, block: NDArray[np.uint8], files: OpenShards, reading: Reading, where: tuple[int, int], unread: bool
    ) -> tuple[Reading, int, float]:
        """The clip that takes a place, known by its position and its part of the mixture, checked; and its weight."""
        position, part = where
        try:
            if unread:
                self._read_alone(files, reading, again=False)
            self._verified(files, reading)
            return reading, reading.row, 1.0
        except BadClip as error:
            self._note(reading.row, position, error)
            first = error
        if self.config.on_bad_clip == "mask":
            for item in reading.ranges.values():
                item.target[:] = 0
            return reading, reading.row, 0.0
        for row in self._substitutes(reading.row, position, part):
            other = self._reading(block, reading.ranges["features"].owner, int(row))
            try:
                self._read_alone(files, other, again=False)
                self._verified(files, other)
            except BadClip as error:
                self._note(int(row), position, error)
                continue
            return other, int(row), 1.0
        raise self._error(reading.row, f"{first}; no clip of the same length is left to take its place")

    def _verified(self, files: OpenShards, reading: Reading) -> None:
        for attempt in range(RETRIES + 1):
            started = time.monotonic()
            try:
                for name, item in reading.ranges.items():
                    self.fields.verify(reading.row, name, item.target)
                return
            except BadClip:
                self.counters.add(checksum_errors=1)
                if attempt == RETRIES:
                    raise
            finally:
                self.counters.add(checksum_seconds=time.monotonic() - started)
            self._read_alone(files, reading, again=True)

    def _read_alone(self, files: OpenShards, reading: Reading, *, again: bool) -> None:
        first: BadClip | None = None
        for attempt in range(RETRIES + 1):
            try:
                if again or attempt:
                    self.counters.add(retries=1)
                    time.sleep(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)])
                    files.read_again(reading.ranges.values())
                else:
                    for run in runs(reading.ranges.values()):
                        files.read(run)
                return
            except ShortRead as error:
                kind, reason = "short", str(error)
            except (OSError, DataError) as error:
                self._check_machine(error)
                kind, reason = "unreadable", str(error)
            # A shard cut short is refused when it is opened again; what was seen first says why.
            first = first or BadClip(f"{self.fields.shard_name(reading.row)}: {reason}", kind=kind)
        if first is not None:
            raise first

    def _check_machine(self, error: BaseException) -> None:
        """End the run where the machine is at its limit: no clip is bad for that.

        Raises:
            DataError: Names the limit.
        """
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno in _LIMITS:
                fix = "raise the limit (ulimit -n for open files), or lower data.reader.threads"
                rule = f"this process cannot open or read more: {cause.strerror}"
                raise DataError(Problem("data.reader.threads", self.config.threads, rule, fix)) from error
            cause = cause.__cause__

    def _substitutes(self, row: int, position: int, part: int) -> Iterator[int]:
        """Clips of the same length and part, in an order drawn by the position, which no number of ranks changes."""
        view, rows = self.fields.view, self.rows_of(part)
        alike = rows[(view.lengths[rows] == view.lengths[row]) & (rows != row)]
        draws = mix64(view.uids[alike], self.seed, position, _SUBSTITUTE)
        while len(alike):
            # The first one is nearly always good: sorting millions of draws would be for nothing.
            best = int(np.argmin(draws))
            yield int(alike[best])
            alike, draws = np.delete(alike, best), np.delete(draws, best)

    def _note(self, row: int, position: int, error: BadClip) -> None:
        self.counters.add(**{f"bad_clips_{error.kind}": 1})
        record = {
            "key": self.fields.view.key(row),
            "shard": self.fields.shard_name(row),
            "offset": self.fields.span(row, "features")[0],
            "position": position,
            "reason": str(error),
            "expected": error.expected,
            "actual": error.actual,
            "policy": self.config.on_bad_clip,
        }
        self.report(json.dumps(record))
        if self.config.on_bad_clip == "raise":
            raise self._error(row, f"{error}; no clip may be bad with data.reader.on_bad_clip=raise")
        allowed = int(np.ceil(self.config.max_bad_fraction * len(self.fields.view)))
        with self._lock:
            self._bad.add(row)
            found = len(self._bad)
        if found > allowed:
            rule = f"{found} of {len(self.fields.view)} clips are bad, more than data.reader.max_bad_fraction allows"
            raise self._error(row, f"{error}; {rule}")

    def _error(self, row: int, rule: str) -> DataError:
        return self.fields.error(row, self.where(self.fields.shard(row)), rule)

    def _finish(self, block: NDArray[np.uint8], number: int, reading: Reading) -> None:
        """Decode and align a clip into the block and clear what a longer one left there."""
        read = reading.ranges["features"].target
        if self.layout is self.stored:
            self.layout.clip_bytes(block, "features", number)[len(read) :] = 0
        else:
            self._decode(block, number, read, reading.ranges.get("features_scale"))
        for name in ROW_FIELDS:
            if name in self.layout.shapes:
                target = self.layout.clip_array(block, name, number)
                values = self.fields.small(reading.row, name, reading.ranges[name].target, self.alignment)
                target[: len(values)] = values
                target[len(values) :] = 0

    def _decode(self, block: NDArray[np.uint8], number: int, read: NDArray[np.uint8], scale: ByteRange | None) -> None:
        # While the bytes are still in the processor's cache, and into memory that is not new to this process.
        target = torch.from_numpy(self.layout.clip_array(block, "features", number))
        frames = len(read) // self.stored.frame_bytes
        kind = STORED_TYPES[self.stored.dtype]
        target[:frames].copy_(torch.from_numpy(read).view(kind.torch).view(frames, *target.shape[1:]))
        if scale is not None:
            target[:frames].mul_(torch.from_numpy(scale.target.view(np.float32)))
        target[frames:] = 0
