"""The global order of clips: pure functions of a seed and of the clips' keys, never of ranks, shards or libraries.

Integer mixing: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (SplitMix64). The generators of
numpy and torch do not promise the same stream across versions; this does.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def uid(key: str) -> int:
    """Return the 64-bit identity of a clip key: the first 8 bytes, big-endian, of its BLAKE2b hash."""
    return int.from_bytes(hashlib.blake2b(key.encode()).digest()[:8], "big")


def mix64(values: NDArray[np.uint64], *words: int) -> NDArray[np.uint64]:
    """Hash each value together with some integers.

    Args:
        values: u64 array of any shape.
        words: Integers; their order matters.

    Returns:
        u64 array of the same shape.
    """
    salt = 0
    for word in words:
        salt = int(_finish(np.array([((salt ^ word) + _GOLDEN) & _MASK], np.uint64))[0])
    return _finish((values ^ np.uint64(salt)) + np.uint64(_GOLDEN))


def _finish(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def epoch_order(uids: NDArray[np.uint64], seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order in which one epoch visits the rows of a view.

    Args:
        uids: u64 `[num_clips]`.
        seed: Seed of the run.
        epoch: Epoch counted from 0.

    Returns:
        i64 `[num_clips]`, a permutation of the rows.
    """
    return np.argsort(mix64(uids, seed, epoch), kind="stable").astype(np.int64)


def clips_at(
    uids: NDArray[np.uint64], seed: int, start: int, count: int, orders: dict[int, NDArray[np.int64]] | None = None
) -> NDArray[np.int64]:
    """Return the rows at global positions `start .. start + count - 1`; positions run on across epochs.

    Args:
        uids: u64 `[num_clips]`, at least one.
        seed: Seed of the run.
        start: First position, counted from 0 at the start of training.
        count: Number of positions.
        orders: Epoch orders computed earlier, by epoch; kept up to date and down to the epochs in use.

    Returns:
        i64 `[count]`.

    Raises:
        ValueError: There are no clips, or a negative position.
    """
    num_clips = len(uids)
    if num_clips == 0 or start < 0:
        raise ValueError(f"{num_clips} clips, start {start}: needs at least one clip and a position from 0")
    orders = {} if orders is None else orders
    positions = np.arange(start, start + count)
    epochs = positions // num_clips
    used = {int(epoch) for epoch in np.unique(epochs)}
    for epoch in set(orders) - used:
        del orders[epoch]
    rows = np.empty(count, np.int64)
    for epoch in used:
        if epoch not in orders:
            orders[epoch] = epoch_order(uids, seed, epoch)
        here = epochs == epoch
        rows[here] = orders[epoch][positions[here] - epoch * num_clips]
    return rows


def ceil_div(count: int, parts: int) -> int:
    """Return `count / parts` rounded up."""
    return (count + parts - 1) // parts


def rank_share(global_batch: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return (first offset, number of clips) of a rank's contiguous share of a global batch.

    The first `global_batch % world_size` ranks hold one clip more than the others.
    """
    base, extra = divmod(global_batch, world_size)
    return rank * base + min(rank, extra), base + (rank < extra)


def micro_batches(global_batch: int, rank: int, world_size: int, micro_batch: int) -> list[tuple[int, int]]:
    """Return (first offset, number of clips) of each micro-batch of a rank, relative to the global batch.

    Every rank gets the same number of micro-batches, `ceil(ceil(global_batch / world_size) / micro_batch)`, so that all
    ranks make the same collective calls; sizes differ by at most one and may be 0 on a rank with fewer clips.

    Raises:
        ValueError: A rank would have no clip, or a size is below 1.
    """
    if world_size < 1 or micro_batch < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size} with micro-batch {micro_batch} is not possible")
    if global_batch < world_size:
        raise ValueError(f"global batch {global_batch} leaves some of {world_size} ranks without a clip")
    start, count = rank_share(global_batch, rank, world_size)
    accumulation = ceil_div(ceil_div(global_batch, world_size), micro_batch)
    shares = [rank_share(count, index, accumulation) for index in range(accumulation)]
    return [(start + first, size) for first, size in shares]
