"""The global order of clips: pure functions of a seed and of the clips' keys, never of ranks, shards or libraries.

Integer mixing: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (SplitMix64). The generators of
numpy and torch do not promise the same stream across versions; this does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

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


def windowed_order(
    uids: NDArray[np.uint64], shards: NDArray[np.int64], seed: int, epoch: int, group: int
) -> NDArray[np.int64]:
    """Return an order that goes through groups of shards, each group in the order of `epoch_order`.

    Unlike the full order it depends on which clips share a shard.

    Args:
        uids: u64 `[num_clips]`.
        shards: i64 `[num_clips]`, the shard of each row.
        seed: Seed of the run.
        epoch: Epoch counted from 0.
        group: Shards in a group.

    Returns:
        i64 `[num_clips]`, a permutation of the rows.
    """
    found, inverse = np.unique(shards, return_inverse=True)
    place = np.empty(len(found), np.int64)
    # The xor of its clips' identities names a shard whatever its row in the manifest.
    names = np.zeros(len(found), np.uint64)
    np.bitwise_xor.at(names, inverse, uids)
    place[np.argsort(mix64(names, seed, epoch), kind="stable")] = np.arange(len(found))
    return np.lexsort((mix64(uids, seed, epoch), place[inverse] // group)).astype(np.int64)


def quotas(weights: Sequence[float], block: int) -> list[int]:
    """Return how many of `block` clips each part of a mixture gets: largest remainders, ties to the earlier part.

    Args:
        weights: Positive, of any sum.
        block: Clips to share out.
    """
    shares = [weight * block / sum(weights) for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(weights)), key=lambda part: (counts[part] - shares[part], part))
    for part in by_remainder[: block - sum(counts)]:
        counts[part] += 1
    return counts


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
