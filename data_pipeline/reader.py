"""Reading clips by offset, checked, in the global order, with the next step prefetched on one thread."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.batch import Clip, ClipBatch, collate, frames_between
from data_pipeline.errors import DataError, Problem
from data_pipeline.manifest import (
    INDEX_FOLDER,
    KEYS_FILE,
    MEAN_FRAME_FILE,
    SHARD_FOLDER,
    check_use,
    load_manifest,
)
from data_pipeline.order import clips_at, micro_batches
from data_pipeline.schema import SPLITS, DataConfig, Split
from data_pipeline.stats import ReaderStats

_MAX_OPEN_SHARDS = 64


class ClipReader:
    """Random access to the clips of one split, restricted to the view of the settings.

    Rows 0 .. num_clips - 1 follow the order of the shards; use `GlobalBatches` for the order of training.

    Attributes:
        manifest: What the data set says about itself.
        num_clips: Clips in the view.
        frames: Stored frames of a batch, F.
        tokens: Patch tokens of a frame, N.
        encoder_dim: Channels of a token, E.
        action_dim: Numbers in an action, A.
        state_dim: Numbers in a state, S; 0 when there are none.
        uids: u64 `[num_clips]`, identities of the clips.
        lengths: i64 `[num_clips]`, valid frames, at most `frames`.
        partitions: Partition of each clip.
        keys: Key of each clip.
    """

    def __init__(self, dataset: Path, config: DataConfig, *, split: Split, seed: int) -> None:
        """Open a data set.

        Args:
            dataset: Folder of the data set.
            config: The data settings; `path` is not used.
            split: `train` or `heldout`.
            seed: Seed of the training order.

        Raises:
            DataError: The data set is damaged or does not fit the settings.
        """
        self.dataset = Path(dataset)
        self.config = config
        self.split: Split = split
        self.seed = seed
        self.manifest = load_manifest(self.dataset)
        check_use(self.manifest, config, (split,))
        self.frames = config.frames or self.manifest.frames
        self.tokens = self.manifest.tokens
        self.encoder_dim = self.manifest.encoder_dim
        self.action_dim = self.manifest.action_dim
        self.state_dim = self.manifest.state_dim

        names = list(self.manifest.partitions)
        view = names if config.view is None else config.view
        codes = self._column("partition")
        selected = (self._column("split") == SPLITS.index(split)) & np.isin(codes, [names.index(name) for name in view])
        self._rows: NDArray[np.int64] = np.flatnonzero(selected)
        self.num_clips = len(self._rows)
        self.uids: NDArray[np.uint64] = self._column("uid")[self._rows]
        self._stored_lengths = self._column("length")[self._rows].astype(np.int64)
        self.lengths: NDArray[np.int64] = np.minimum(self._stored_lengths, self.frames)
        self.partitions: list[str] = [names[code] for code in codes[self._rows]]
        all_keys = (self.dataset / KEYS_FILE).read_text(encoding="ascii").splitlines()
        self.keys: list[str] = [all_keys[row] for row in self._rows]
        self._shards = self._column("shard")[self._rows]
        self._payloads = {
            field: tuple(self._column(f"{field}_{part}")[self._rows] for part in ("offset", "nbytes", "crc32"))
            for field in self.manifest.dtypes
        }
        self._stats = ReaderStats()
        self._lock = threading.Lock()
        self._descriptors: dict[int, int] = {}

    def read(self, rows: NDArray[np.int64], positions: NDArray[np.int64] | None = None) -> ClipBatch:
        """Read clips, verified against their checksums.

        Args:
            rows: i64 `[B]`, rows of this reader.
            positions: i64 `[B]`, global sample positions; the rows themselves when absent.

        Raises:
            DataError: A shard is shorter than the index says, bytes differ from their checksum, or a value is not
                finite.
        """
        with self._lock:
            started = time.monotonic()
            clips = [self._read_clip(int(row)) for row in rows]
            batch = collate(
                clips,
                self.frames,
                np.asarray(rows if positions is None else positions),
                np.ones(len(clips), np.float32),
            )
            self._add(clips_read=len(clips), read_seconds=time.monotonic() - started)
        return batch

    def read_actions(self, rows: NDArray[np.int64]) -> Tensor:
        """Read the actions of clips alone: f32 `[B, T, A]` as in `read`, without the cost of their features.

        Args:
            rows: i64 `[B]`, rows of this reader.

        Raises:
            DataError: A shard is shorter than the index says, bytes differ from their checksum, or a value is not
                finite.
        """
        with self._lock:
            started = time.monotonic()
            actions = torch.zeros(len(rows), self.frames - 1, self.action_dim)
            for number, row in enumerate(rows):
                stored = self._read_field(int(row), "actions")[: self.frames - 1]
                actions[number, : len(stored)] = stored
            self._add(read_seconds=time.monotonic() - started)
        return actions

    def mean_frame(self) -> Tensor:
        """Return f32 `[N, E]`: the mean of the layer-normalised frames of all training clips of the data set."""
        return torch.from_numpy(np.load(self.dataset / MEAN_FRAME_FILE, allow_pickle=False))

    def fingerprint(self) -> str:
        """Return hex digits that two ranks share exactly when they read the same clips in the same order."""
        parts = [self.manifest.fingerprint, self.split, sorted(set(self.partitions)), self.frames, self.seed]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def stats(self) -> ReaderStats:
        """Return what has been done since the reader was opened."""
        return self._stats

    def add_wait(self, seconds: float) -> None:
        """Count time that a consumer waited for a batch."""
        with self._lock:
            self._add(wait_seconds=seconds)

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def _column(self, name: str) -> np.ndarray:
        return np.load(self.dataset / INDEX_FOLDER / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    def _add(self, **amounts: float) -> None:
        current = self._stats
        self._stats = replace(current, **{name: getattr(current, name) + amount for name, amount in amounts.items()})

    def _read_clip(self, row: int) -> Clip:
        fields = {field: self._read_field(row, field) for field in self.manifest.dtypes}
        return Clip(self.keys[row], self.partitions[row], fields["features"], fields["actions"], fields.get("states"))

    def _read_field(self, row: int, field: str) -> Tensor:
        offset, nbytes, expected = (int(column[row]) for column in self._payloads[field])
        content = os.pread(self._descriptor(int(self._shards[row])), nbytes, offset)
        self._add(bytes_read=len(content))
        actual = zlib.crc32(content)
        if len(content) != nbytes or actual != expected:
            self._add(checksum_errors=1)
            shard = self.dataset / SHARD_FOLDER / self.manifest.shards[self._shards[row]].name
            rule = (
                f"field {field} at offset {offset} of {shard}: {len(content)} of {nbytes} bytes with crc32 "
                f"{actual:08x}, expected {expected:08x}"
            )
            fix = "copy this shard again, and check the disk"
            raise DataError(Problem(f"data.path: clip {self.keys[row]}", str(self.dataset), rule, fix))
        length = int(self._stored_lengths[row])
        shape = {
            "features": (length, self.tokens, self.encoder_dim),
            "actions": (length - 1, self.action_dim),
            "states": (length, self.state_dim),
        }[field]
        stored = np.frombuffer(content, self.manifest.dtypes[field]).reshape(shape)
        values = torch.from_numpy(stored.astype(np.float32))
        # A sum shows at a fraction of the cost whether it is worth looking at each number.
        if not values.sum().isfinite() and not values.isfinite().all():
            rule = f"field {field} holds values that are not finite"
            fix = "encode and shard the clip again, or leave it out"
            raise DataError(Problem(f"data.path: clip {self.keys[row]}", str(self.dataset), rule, fix))
        return values

    def _descriptor(self, shard: int) -> int:
        if shard not in self._descriptors:
            if len(self._descriptors) >= _MAX_OPEN_SHARDS:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            path = self.dataset / SHARD_FOLDER / self.manifest.shards[shard].name
            self._descriptors[shard] = os.open(path, os.O_RDONLY)
        return self._descriptors[shard]


@dataclass(frozen=True)
class StepBatches:
    """What one rank computes in one optimizer step.

    Attributes:
        step: Step, counted from 0.
        lengths: i64 `[G]`, valid frames of every clip of the whole global batch, on all ranks.
        micro: Micro-batches; equally many on every rank.
    """

    step: int
    lengths: NDArray[np.int64]
    micro: list[ClipBatch]

    @property
    def num_clips(self) -> int:
        """Clips of the whole global batch, on all ranks."""
        return len(self.lengths)

    def num_frames(self, first: int = 0, end: int | None = None) -> int:
        """Return how many valid frames the whole global batch has with numbers first .. end - 1 in their clips.

        This is what summed losses are divided by, so that ranks and micro-batches add up to one mean.
        """
        return int(frames_between(self.lengths, first, end).sum())

    def to(self, device: torch.device | str) -> StepBatches:
        """Return the same with all tensors on `device`."""
        return replace(self, micro=[clips.to(device) for clips in self.micro])


class GlobalBatches(Iterator[StepBatches]):
    """Endless steps of a run; step s takes the global positions `[s * G, (s + 1) * G)` whatever the number of ranks."""

    def __init__(
        self,
        reader: ClipReader,
        *,
        global_batch: int,
        seed: int,
        rank: int,
        world_size: int,
        micro_batch: int,
        start_step: int = 0,
    ) -> None:
        """Start reading the first step.

        Args:
            reader: Clips to draw from; its seed gives the order.
            global_batch: Clips in one step over all ranks, G.
            seed: Must equal the reader's, whose fingerprint covers it.
            rank: Data-parallel rank.
            world_size: Data-parallel ranks; need not divide G.
            micro_batch: Most clips in one micro-batch.
            start_step: First step, after a resume.

        Raises:
            ValueError: Sizes that leave a rank without a clip, or two different seeds.
        """
        if seed != reader.seed:
            raise ValueError(f"seed {seed} differs from the reader's seed {reader.seed}")
        self.frames = reader.frames
        """Stored frames of a batch, F."""
        self._reader = reader
        self._global_batch = global_batch
        self._shares = micro_batches(global_batch, rank, world_size, micro_batch)
        self._step = start_step
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._next: Future[StepBatches] | None = self._executor.submit(self._load, start_step)

    def __next__(self) -> StepBatches:
        """Return the next step and start reading the one after it.

        Raises:
            DataError: What went wrong while reading, raised here from the background thread.
            StopIteration: After `close`, or after an error.
        """
        if self._next is None:
            raise StopIteration
        started = time.monotonic()
        pending, self._next = self._next, None
        try:
            batches = pending.result()
        except BaseException:
            self._executor.shutdown(wait=False, cancel_futures=True)
            raise
        self._reader.add_wait(time.monotonic() - started)
        self._step += 1
        self._next = self._executor.submit(self._load, self._step)
        return batches

    def stats(self) -> ReaderStats:
        """Return what the reader has done since it was opened."""
        return self._reader.stats()

    def close(self) -> None:
        """Stop prefetching; waits for the read under way."""
        self._next = None
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _load(self, step: int) -> StepBatches:
        first = step * self._global_batch
        rows = clips_at(self._reader.uids, self._reader.seed, first, self._global_batch, self._orders)
        micro = [self._micro(rows, first, *share) for share in self._shares]
        return StepBatches(step, self._reader.lengths[rows], micro)

    def _micro(self, rows: NDArray[np.int64], first: int, offset: int, size: int) -> ClipBatch:
        # A rank with fewer clips still needs a batch for the collectives; a clip of weight 0 keeps shapes ordinary.
        taken = slice(offset, offset + size) if size else slice(max(offset - 1, 0), max(offset, 1))
        positions = first + np.arange(self._global_batch)[taken]
        batch = self._reader.read(rows[taken], positions)
        return batch if size else batch.without_weight()
