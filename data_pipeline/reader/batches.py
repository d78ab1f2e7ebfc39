"""The steps of a run, as one rank sees them: read ahead by the ring, in the global order, resumable anywhere."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.batch import ClipBatch, StepBatches
from data_pipeline.dataset.view import part_rows
from data_pipeline.order import micro_batches
from data_pipeline.reader.clips import ClipReader
from data_pipeline.reader.device import AheadOnDevice
from data_pipeline.reader.fill import BatchFiller
from data_pipeline.reader.global_order import EpochOrder, GlobalOrder, MixtureOrder, buffered
from data_pipeline.reader.layout import BatchLayout
from data_pipeline.reader.ring import Ring
from data_pipeline.reader.shard_reads import MAX_OPEN, OpenShards
from data_pipeline.reader.state import STATE_FORMAT, ReaderState
from data_pipeline.stats import ReaderStats

logger = logging.getLogger(__name__)

NO_LENGTHS = np.empty(0, np.int64)


class GlobalBatches(Iterator[StepBatches]):
    """Endless steps of a run; a step takes the next G global positions, whatever the number of ranks.

    Reading starts with the first step that is asked for.
    """

    def __init__(
        self,
        reader: ClipReader,
        *,
        global_batch: int,
        rank: int,
        world_size: int,
        micro_batch: int,
        device: torch.device | str = "cpu",
        decoded: bool = True,
        bad_clips: Path | None = None,
    ) -> None:
        """Plan the steps.

        Args:
            reader: Clips to draw from; its settings and seed give the order.
            global_batch: Clips in one step over all ranks, G.
            rank: Data-parallel rank.
            world_size: Data-parallel ranks; need not divide G.
            micro_batch: Most clips in one micro-batch.
            device: Where the steps are wanted. For a GPU features travel as they are stored and are decoded there.
            decoded: Features as f32; False leaves them in the stored type, for a CPU only.
            bad_clips: File that gets one JSON line for each bad clip met; none logs them only.

        Raises:
            ValueError: Sizes that leave a rank without a clip.
        """
        self.frames = reader.frames
        """Stored frames of a batch, F."""
        self._reader = reader
        self._global_batch = global_batch
        self._shares = micro_batches(global_batch, rank, world_size, micro_batch)
        self._order = global_order(reader, global_batch)
        self._device = torch.device(device)
        self._stored = BatchLayout.of(reader.manifest, max(1, *(size for _, size in self._shares)), reader.frames)
        as_stored = self._device.type == "cuda" or not decoded or self._stored.dtype == "float32"
        self._layout = self._stored if as_stored else self._stored.decoded()
        self._bad_clips = bad_clips
        self._position = 0
        self._ring: Ring[StepBatches] | None = None
        self._ahead: AheadOnDevice | None = None
        self._expected_until = 0
        self._planning: threading.Thread | None = None

    def __next__(self) -> StepBatches:
        """Return the next step, and read on behind it.

        Raises:
            DataError: What went wrong while reading.
            StopIteration: After an error.
        """
        if self._ring is None:
            self._ring = self._start()
            if self._device.type == "cuda":
                self._ahead = AheadOnDevice(partial(self._take, self._ring), self._device, self._reader.counters)
        self._expect()
        started = time.monotonic()
        try:
            step = self._ahead.take() if self._ahead else self._take(self._ring)
        except BaseException:
            self.close()
            raise
        self._reader.counters.add(wait_seconds=time.monotonic() - started)
        self._position += self._global_batch
        return step

    def state_dict(self) -> dict[str, Any]:
        """Return where the run is: what was handed out counts, what was read ahead does not."""
        return self._state(self._position).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a place that any number of ranks, threads and micro-batches may have reached.

        Raises:
            DataError: The place is in other data, or in another order; all differences are named.
        """
        saved = ReaderState.from_json(state)
        self._state(0).check_continues(saved)
        self.close()
        self._ring, self._ahead = None, None
        self._position = self._expected_until = saved.position

    def stats(self) -> ReaderStats:
        """Return what the reader has done since it was opened, and where it is."""
        self._reader.counters.set(epoch=self._position // self._order.epoch_length, position=self._position)
        return self._reader.stats()

    def close(self) -> None:
        """Stop reading; waits for the reads under way, but for one that hangs."""
        if self._ring is not None:
            self._ring.close()
        if self._ahead is not None:
            self._ahead.close()

    def _take(self, ring: Ring[StepBatches]) -> StepBatches:
        shares = [ring.take() for _ in self._shares]
        return replace(shares[0], micro=[clips for share in shares for clips in share.micro])

    def _state(self, position: int) -> ReaderState:
        reader, config = self._reader, self._reader.config
        order: list[Any] = [config.order, config.tail, config.mixture_block if config.mixture else 0]
        order += [config.order_shards if config.order == "windowed" else 0]
        # Which clips share a shard decides the windowed order.
        order += [reader.view.shards_digest if config.order == "windowed" else ""]
        order += [self._global_batch if config.tail != "continuous" else 0]
        order += [part.model_dump(mode="json") for part in config.mixture]
        digest = hashlib.sha256(json.dumps(order).encode()).hexdigest()[:16]
        view = f"{reader.view.digest}-{reader.frames}"
        data = reader.manifest.fingerprint[:32]
        return ReaderState(STATE_FORMAT, data, view, reader.alignment, digest, reader.seed, position)

    def _start(self) -> Ring[StepBatches]:
        reader, config = self._reader, self._reader.config
        threads = config.reader.threads or min(4, available_processors())
        # Before the threads start, of which one may be in the next epoch already and would sort that one first.
        self._order.at(self._position, 1)
        # A shard that is open keeps its space on the node, also when its copy was given up. All threads together stay
        # below the 1024 files that a process usually may open.
        group = config.order_shards * max(1, len(config.mixture)) if config.order == "windowed" else MAX_OPEN
        max_open = max(1, min(MAX_OPEN, group, 512 // threads))
        made = RankBatches(
            BatchFiller(
                reader.fields,
                self._stored,
                self._layout,
                reader.alignment,
                config.reader,
                self._order.rows_of,
                reader.seed,
                reader.counters,
                reader.store.where,
                partial(_report, self._bad_clips),
            ),
            self._order,
            self._shares,
            self._global_batch,
            self._position,
        )
        ring = Ring(
            made.fill,
            partial(OpenShards, reader.store, max_open),
            nbytes=self._layout.nbytes,
            # A step is handed out whole, so its own batches come on top of those read ahead.
            blocks=len(self._shares) + config.reader.batches,
            threads=threads,
            timeout=config.reader.timeout,
            counters=reader.counters,
            pinned=self._device.type == "cuda",
        )
        # The ring knows nothing of this object, so that dropping it ends the threads.
        weakref.finalize(self, ring.close)
        return ring

    def _expect(self) -> None:
        """Tell the store what comes, as often as that changes what it should keep."""
        staged = self._reader.config.staging.folder is not None
        planning = self._planning is not None and self._planning.is_alive()
        if staged and not planning and self._position >= self._expected_until:
            # Looking through an epoch of millions of clips takes seconds, which a step must not wait for.
            self._planning = threading.Thread(target=self._plan_shards, args=(self._position,), daemon=True)
            self._planning.start()
            self._expected_until = self._position + max(self._global_batch, self._order.epoch_length // 64)

    def _plan_shards(self, position: int) -> None:
        self._reader.store.expect(self._order.upcoming_shards(position).tolist())


@dataclass(frozen=True)
class RankBatches:
    """One rank's micro-batches, numbered from 0 at some position of the run.

    Attributes:
        filler: Reads clips into memory.
        order: Of the run.
        shares: (first offset, size) of each micro-batch of a step.
        global_batch: Clips in a step over all ranks.
        start: Position of the first step.
    """

    filler: BatchFiller
    order: GlobalOrder
    shares: Sequence[tuple[int, int]]
    global_batch: int
    start: int

    def fill(self, number: int, memory: NDArray[np.uint8], files: OpenShards) -> StepBatches:
        """Read one micro-batch into memory that its tensors will share; a step's first one comes with its lengths.

        All that a step needs of the order is looked up here, beside the training, which waits for nothing else.
        """
        step, share = divmod(number, len(self.shares))
        start = self.start + step * self.global_batch
        lengths = NO_LENGTHS if share else self._lengths(start)
        return StepBatches(start, lengths, [self._read(start, share, memory, files)])

    def _lengths(self, start: int) -> NDArray[np.int64]:
        places = self.order.at(start, self.global_batch)
        return np.where(places.weights > 0, self.filler.fields.view.lengths[places.rows], 0)

    def _read(self, start: int, share: int, memory: NDArray[np.uint8], files: OpenShards) -> ClipBatch:
        offset, size = self.shares[share]
        empty = size == 0
        if empty:
            # A rank with fewer clips still needs a batch for the collectives; a clip of weight 0 keeps shapes ordinary.
            offset, size = max(offset - 1, 0), 1
        first = start + offset
        positions = np.arange(first, first + size)
        rows, weights, _ = self.filler.fill(memory, files, self.order.at(first, size), positions)
        fields, view = self.filler.layout.tensors(memory, size), self.filler.fields.view
        return ClipBatch(
            features=fields["features"],
            features_scale=fields.get("features_scale"),
            actions=fields["actions"],
            states=fields.get("states"),
            extrinsics=fields.get("extrinsics"),
            lengths=torch.from_numpy(view.lengths[rows]),
            weights=torch.zeros(size) if empty else torch.from_numpy(weights),
            positions=torch.from_numpy(positions),
            keys=[view.key(row) for row in rows.tolist()],
            partitions=[view.partition(row) for row in rows.tolist()],
        )


def available_processors() -> int:
    """Return how many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _report(file: Path | None, line: str) -> None:
    logger.warning("bad clip: %s", line)
    if file is not None:
        with file.open("a", encoding="utf-8") as log:
            log.write(line + "\n")


def global_order(reader: ClipReader, global_batch: int) -> GlobalOrder:
    """Return the order in which a run visits a reader's clips.

    Args:
        reader: Its settings and seed give the order.
        global_batch: Clips in a step.
    """
    config, view, seed = reader.config, reader.view, reader.seed
    group = config.order_shards if config.order == "windowed" else 0
    if not config.mixture:
        return EpochOrder(view.uids, view.shards, seed, group, config.tail, global_batch)
    parts, orders = [], []
    for number, (part, rows) in enumerate(zip(config.mixture, part_rows(view, config), strict=True)):
        rows = rows[buffered(view.uids[rows], seed, part.clips)]
        parts.append(rows)
        # Parts that share clips must not visit them in step.
        orders.append(EpochOrder(view.uids[rows], view.shards[rows], seed + (number << 32), group))
    weights = [part.weight for part in config.mixture]
    return MixtureOrder(parts, orders, weights, config.mixture_block, seed, view.shards)
