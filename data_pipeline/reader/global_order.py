"""Which clip stands at each position of a run: a pure function of the settings, never of ranks, threads or the past."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.order import epoch_order, mix64, quotas, windowed_order

SLOW_TO_SORT = 100_000
"""Clips whose order takes longer to make than a thread to start."""
_MIXTURE = 0x4D495854
_BUFFER = 0x42554646

Tail = Literal["continuous", "drop", "pad_zero_weight"]


class Places(NamedTuple):
    """The clips at some positions."""

    rows: NDArray[np.int64]
    """Rows of the view, i64 `[count]`."""
    weights: NDArray[np.float32]
    """1, or 0 where a position only fills up the last step of an epoch: f32 `[count]`."""
    parts: NDArray[np.int64]
    """Part of a mixture that each clip was drawn from, 0 without one: i64 `[count]`."""


class GlobalOrder(Protocol):
    """Endless positions 0, 1, 2, …, each with a clip."""

    epoch_length: int
    """Positions in an epoch."""

    def at(self, start: int, count: int) -> Places:
        """Return the clips at positions `start .. start + count - 1`."""
        ...

    def rows_of(self, part: int) -> NDArray[np.int64]:
        """Return the rows of the view that a part draws from."""
        ...

    def upcoming_shards(self, start: int) -> NDArray[np.int64]:
        """Return the shards in the order of their next use from position `start` on, each once."""
        ...


@dataclass
class EpochOrder:
    """One epoch after another, each a permutation of the view.

    Attributes:
        uids: u64 `[num_clips]`.
        shards: i64 `[num_clips]`.
        seed: Seed of the run.
        group: Shards in a group of the windowed order; 0 for the full one.
        tail: What happens at an epoch's end.
        global_batch: Clips in a step; an epoch that does not run on into the next one ends with a step.
    """

    uids: NDArray[np.uint64]
    shards: NDArray[np.int64]
    seed: int
    group: int = 0
    tail: Tail = "continuous"
    global_batch: int = 1

    def __post_init__(self) -> None:
        """Fix how long an epoch is.

        Raises:
            ValueError: No clips, or fewer than a step where steps are not filled up.
        """
        num_clips, steps = len(self.uids), len(self.uids) // self.global_batch
        lengths = {
            "continuous": num_clips,
            "drop": steps * self.global_batch,
            "pad_zero_weight": -(-num_clips // self.global_batch) * self.global_batch,
        }
        self.epoch_length = lengths[self.tail]
        self._orders: dict[int, NDArray[np.int32] | NDArray[np.int64]] = {}
        self._sorting = threading.Lock()
        if self.epoch_length < 1:
            raise ValueError(f"{num_clips} clips give no epoch with tail {self.tail} and steps of {self.global_batch}")

    def at(self, start: int, count: int) -> Places:
        """Return the clips at positions `start .. start + count - 1`."""
        if start < 0:
            raise ValueError(f"position {start} is below 0")
        epoch, offset = divmod(start, self.epoch_length)
        if offset + count <= min(len(self.uids), self.epoch_length):
            # Within an epoch, which is nearly always, a slice says it all.
            rows = self._order(epoch)[offset : offset + count].astype(np.int64)
            if self.epoch_length > SLOW_TO_SORT and 2 * offset > self.epoch_length:
                self._prepare(epoch + 1)
            return Places(rows, np.ones(count, np.float32), np.zeros(count, np.int64))
        epochs, offsets = np.divmod(np.arange(start, start + count), self.epoch_length)
        rows = np.empty(count, np.int64)
        real = offsets < len(self.uids)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            # A position without a clip of its own repeats the epoch's first one, at weight 0.
            rows[here] = self._order(int(epoch))[np.where(real, offsets, 0)[here]]
        return Places(rows, real.astype(np.float32), np.zeros(count, np.int64))

    def rows_of(self, part: int) -> NDArray[np.int64]:
        """Return all rows: there is one part."""
        return np.arange(len(self.uids))

    def upcoming_shards(self, start: int) -> NDArray[np.int64]:
        """Return the shards in the order of their next use from position `start` on, each once."""
        epoch, offset = divmod(start, self.epoch_length)
        rows = np.concatenate([self._order(epoch)[offset : self.epoch_length], self._order(epoch + 1)])
        shards = self.shards[rows]
        _, first = np.unique(shards, return_index=True)
        return shards[np.sort(first)]

    def _prepare(self, epoch: int) -> None:
        """Sort an epoch ahead of need: millions of clips take seconds, in which the other threads read on."""
        if epoch not in self._orders and self._sorting.acquire(blocking=False):
            self._sorting.release()
            threading.Thread(target=self._order, args=(epoch,), name="sort-epoch", daemon=True).start()

    def _order(self, epoch: int) -> NDArray[np.int32] | NDArray[np.int64]:
        known = self._orders.get(epoch)
        if known is not None:
            return known
        with self._sorting:
            if epoch not in self._orders:
                # Of several threads that read ahead, one may still be in the epoch before.
                for old in [other for other in self._orders if abs(other - epoch) > 1]:
                    del self._orders[old]
                if self.group:
                    order = windowed_order(self.uids, self.shards, self.seed, epoch, self.group)
                else:
                    order = epoch_order(self.uids, self.seed, epoch)
                self._orders[epoch] = order.astype(np.int32) if len(order) < 1 << 31 else order
            return self._orders[epoch]


@dataclass
class MixtureOrder:
    """Parts in exact shares: every block of positions holds a fixed number of clips of each part.

    Attributes:
        parts: Rows of the view that each part draws from.
        orders: Order within each part, over `parts[i]`.
        weights: Of the parts.
        block: Positions in a block.
        seed: Seed of the run.
        shards: i64 `[num_clips]`.
    """

    parts: Sequence[NDArray[np.int64]]
    orders: Sequence[EpochOrder]
    weights: Sequence[float]
    block: int
    seed: int
    shards: NDArray[np.int64]

    def __post_init__(self) -> None:
        """Share out a block.

        Raises:
            ValueError: A part gets no clip of a block.
        """
        self.quotas = quotas(self.weights, self.block)
        self.epoch_length = sum(len(part) for part in self.parts)
        self._labels = np.repeat(np.arange(len(self.parts)), self.quotas)
        if min(self.quotas) < 1:
            raise ValueError(f"weights {list(self.weights)} leave a part without a clip in a block of {self.block}")

    def at(self, start: int, count: int) -> Places:
        """Return the clips at positions `start .. start + count - 1`."""
        rows, parts = np.empty((2, count), np.int64)
        for block in range(start // self.block, -(-(start + count) // self.block)):
            first = block * self.block
            here = slice(max(start - first, 0), min(start + count - first, self.block))
            labels = self._labels[np.argsort(mix64(np.arange(self.block, dtype=np.uint64), self.seed, block, _MIXTURE))]
            taken = np.empty(self.block, np.int64)
            for number, (part, order, quota) in enumerate(zip(self.parts, self.orders, self.quotas, strict=True)):
                taken[labels == number] = part[order.at(block * quota, quota).rows]
            there = slice(first + here.start - start, first + here.stop - start)
            rows[there], parts[there] = taken[here], labels[here]
        return Places(rows, np.ones(count, np.float32), parts)

    def rows_of(self, part: int) -> NDArray[np.int64]:
        """Return the rows of the view that a part draws from."""
        return self.parts[part]

    def upcoming_shards(self, start: int) -> NDArray[np.int64]:
        """Return the shards in the order of their next use from position `start` on, each once."""
        shards = self.shards[self.at(start, 2 * self.epoch_length).rows]
        _, first = np.unique(shards, return_index=True)
        return shards[np.sort(first)]


def buffered(uids: NDArray[np.uint64], seed: int, count: int | None) -> NDArray[np.int64]:
    """Return the rows a replay buffer of some size holds: the first by a hash of the seed, in the view's order."""
    if count is None or count >= len(uids):
        return np.arange(len(uids))
    return np.sort(np.argsort(mix64(uids, seed, _BUFFER), kind="stable")[:count])
