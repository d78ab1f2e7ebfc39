"""What the data benchmark measures of the reader, and the limit it is compared with: copies of the same bytes."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from data_pipeline.dataset.verify import verify
from data_pipeline.reader.batches import GlobalBatches
from data_pipeline.reader.clips import ClipReader
from data_pipeline.reader.global_order import Places
from data_pipeline.schema import DataConfig, ReaderConfig
from tests.benchmarks.data_clips import BATCH, consumed, cost, payload_bytes, touch
from tests.benchmarks.data_worker import Result

BUFFER = 32 << 20
EPOCHS = 10


class InShardOrder:
    """The clips as they lie in the shards, again and again."""

    def __init__(self, shards: NDArray[np.int64]) -> None:
        self._shards = shards
        self.epoch_length = len(shards)

    def at(self, start: int, count: int) -> Places:
        rows = np.arange(start, start + count) % self.epoch_length
        return Places(rows, np.ones(count, np.float32), np.zeros(count, np.int64))

    def rows_of(self, part: int) -> NDArray[np.int64]:
        return np.arange(self.epoch_length)

    def upcoming_shards(self, start: int) -> NDArray[np.int64]:
        return np.unique(self._shards)


class RingBatches(GlobalBatches):
    """Steps of one rank: features stay in their stored type, as they would be sent to a GPU, or are decoded to f32."""

    def __init__(self, reader: ClipReader, *, in_order: bool = False, decoded: bool = False) -> None:
        super().__init__(reader, global_batch=BATCH, rank=0, world_size=1, micro_batch=BATCH, decoded=decoded)
        self.reader = reader
        if in_order:
            self._order = InShardOrder(reader.view.shards)

    def ring_bytes(self) -> tuple[int, int]:
        """Return the bytes of the ring's blocks, and of those it was planned with."""
        assert self._ring is not None
        planned = len(self._shares) + self.reader.config.reader.batches
        return len(self._ring._blocks) * self._layout.nbytes, planned * self._layout.nbytes


def limit(dataset: str) -> Result:
    """Copy all shards into one buffer that is used again, by preadv and by memcpy from a mapping: the mean of both."""
    buffer = _buffer()
    by_preadv = cost(lambda: [_preadv(path, buffer) for path in _shards(dataset)])
    by_memcpy = cost(lambda: [_memcpy(pages, buffer) for pages in _mapped(dataset)])
    gigabytes = sum(path.stat().st_size for path in _shards(dataset)) / 1e9
    return {
        "seconds": (by_preadv["seconds"] + by_memcpy["seconds"]) / 2,
        "cpu": (by_preadv["cpu"] + by_memcpy["cpu"]) / 2,
        "preadv_rate": gigabytes / by_preadv["seconds"],
        "memcpy_rate": gigabytes / by_memcpy["seconds"],
    }


def ring(dataset: str, *, checksums: bool, threads: int | None = None, in_order: bool = False) -> Result:
    """Read one epoch through the ring, after one that does not count."""
    with closing(_open_ring(dataset, checksums, threads, in_order)) as batches:
        return _epoch_cost(batches)


def views(dataset: str) -> Result:
    """Make a view of every clip, without touching its features; microseconds of each."""
    reader = _view_reader(dataset)
    seconds = cost(lambda: [reader.clip(row) for row in range(reader.num_clips)])["seconds"]
    return {"microseconds": 1e6 * seconds / reader.num_clips}


def check(dataset: str) -> Result:
    """Verify every field.

    Raises:
        RuntimeError: Something is wrong with the data set.
    """
    reports = []
    measured = cost(lambda: reports.append(verify(Path(dataset), level="crc")))
    if not reports[0].sound:
        raise RuntimeError(f"{reports[0].num_findings} findings: {reports[0].findings[:3]}")
    return measured


def waits(dataset: str, factors: list[float]) -> Result:
    """Take batches as the trainer does, in steps that last so many times as long as reading one.

    Returns:
        Shares of the time that went into getting batches, whatever it was spent on.
    """
    batches = _open_ring(dataset, True, None, False, decoded=True)
    steps = batches.reader.num_clips // BATCH
    shares = []
    with closing(batches):
        read = _epoch_cost(batches)["seconds"] / steps
        for factor in factors:
            # A run of steps starts with what was read ahead during the one before.
            time.sleep(8 * read)
            waited, started = 0.0, time.perf_counter()
            for _ in range(steps):
                asked = time.perf_counter()
                features = next(batches).micro[0].features
                waited += time.perf_counter() - asked
                touch(features)
                del features
                time.sleep(factor * read)
            shares.append(waited / (time.perf_counter() - started))
    return {"shares": shares}


def memory(dataset: str) -> Result:
    """Follow resident memory and the ring over epochs; for a process that has done nothing before."""
    # What any first use brings along, libraries and pools of threads, is not the reader's.
    touch(torch.zeros(1 << 20, dtype=torch.float16))
    with closing(_open_ring(dataset, True, None, False)) as first:
        consumed(_features(first, 1), BATCH)
    del first
    before = _resident()
    batches = _open_ring(dataset, True, None, False)
    with closing(batches):
        _fill_blocks(batches)
        early = _resident()
        for _ in range(EPOCHS):
            _read_epoch(batches)
        late = _resident()
        taken, planned = batches.ring_bytes()
    index = sum(path.stat().st_size for path in (Path(dataset) / "index").iterdir())
    plan = planned + index
    return {
        "used": (late - before) / plan,
        "growth": (late - early) / plan,
        "ring": taken / planned,
    }


def overhead(dataset: str) -> Result:
    """Return what tars add to the size of the values."""
    clips = ClipReader(_config(dataset, False, None), split="train", seed=0).num_clips
    return {"overhead": sum(path.stat().st_size for path in _shards(dataset)) / payload_bytes(clips) - 1}


def _config(dataset: str, checksums: bool, threads: int | None) -> DataConfig:
    reader = ReaderConfig(checksums=checksums, threads=threads)
    return DataConfig(path=dataset, reader=reader)


def _open_ring(
    dataset: str, checksums: bool, threads: int | None, in_order: bool, *, decoded: bool = False
) -> RingBatches:
    reader = ClipReader(_config(dataset, checksums, threads), split="train", seed=0)
    if reader.num_clips % BATCH:
        raise ValueError(f"{reader.num_clips} clips are no whole number of batches of {BATCH}")
    return RingBatches(reader, in_order=in_order, decoded=decoded)


def _epoch_cost(batches: RingBatches) -> dict[str, float]:
    """Return the cost of an epoch in the middle of reading."""
    return cost(lambda: _read_epoch(batches), first=lambda: _fill_blocks(batches))


def _fill_blocks(batches: RingBatches) -> None:
    """Read an epoch or more, so that every block of the ring has been used: a first page fault is no reading."""
    steps = max(batches.reader.num_clips // BATCH, 2 * (1 + batches.reader.config.reader.batches))
    consumed(_features(batches, steps), steps * BATCH)


def _read_epoch(batches: RingBatches) -> None:
    steps = batches.reader.num_clips // BATCH
    consumed(_features(batches, steps), steps * BATCH)


def _features(batches: RingBatches, steps: int) -> Iterator[torch.Tensor]:
    for _ in range(steps):
        yield next(batches).micro[0].features


def _resident() -> int:
    return psutil.Process().memory_info().rss


@cache
def _view_reader(dataset: str) -> ClipReader:
    reader = ClipReader(_config(dataset, False, None), split="train", seed=0)
    for row in range(reader.num_clips):
        reader.clip(row)
    return reader


@cache
def _shards(dataset: str) -> list[Path]:
    return sorted((Path(dataset) / "shards").iterdir())


@cache
def _mapped(dataset: str) -> list[NDArray[np.uint8]]:
    mapped = []
    for path in _shards(dataset):
        with path.open("rb") as file:
            mapped.append(np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8))
    for pages in mapped:
        _memcpy(pages, _buffer())
    return mapped


@cache
def _buffer() -> NDArray[np.uint8]:
    return np.zeros(BUFFER, np.uint8)


def _preadv(path: Path, buffer: NDArray[np.uint8]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        at = 0
        while got := os.preadv(descriptor, [buffer.data], at):
            at += got
    finally:
        os.close(descriptor)


def _memcpy(pages: NDArray[np.uint8], buffer: NDArray[np.uint8]) -> None:
    for at in range(0, len(pages), BUFFER):
        part = pages[at : at + BUFFER]
        np.copyto(buffer[: len(part)], part)
