from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.order import epoch_order, micro_batches, quotas, rank_share, uid, windowed_order

KEYS = [f"base-train-{index:05d}" for index in range(12)]
UIDS = np.array([uid(key) for key in KEYS], np.uint64)

# Resumed runs depend on these numbers: a change of them is a change of format.
GOLDEN_UIDS = ["0x1ed893257254e0d4", "0x4556ec611150f893"]
GOLDEN_EPOCH_0 = [7, 6, 1, 8, 0, 4, 10, 2, 5, 3, 11, 9]
GOLDEN_EPOCH_1 = [1, 7, 9, 3, 0, 11, 4, 10, 2, 8, 5, 6]
GOLDEN_SEED_7 = [11, 4, 1, 9, 5, 10, 2, 8, 0, 6, 3, 7]
GOLDEN_WINDOWED = [7, 6, 1, 8, 0, 2, 4, 10, 5, 3, 11, 9]


def test_order_is_the_one_recorded() -> None:
    assert [hex(value) for value in UIDS[:2].tolist()] == GOLDEN_UIDS
    assert epoch_order(UIDS, 0, 0).tolist() == GOLDEN_EPOCH_0
    assert epoch_order(UIDS, 0, 1).tolist() == GOLDEN_EPOCH_1
    assert epoch_order(UIDS, 7, 0).tolist() == GOLDEN_SEED_7


def test_order_follows_keys_not_rows() -> None:
    shuffled = [5, 3, 0, 11, 1, 2, 4, 6, 10, 9, 8, 7]
    names = [KEYS[row] for row in shuffled]
    there = [names[row] for row in epoch_order(UIDS[shuffled], 3, 2)]
    assert there == [KEYS[row] for row in epoch_order(UIDS, 3, 2)]


def test_windowed_order_is_the_one_recorded() -> None:
    shards = np.repeat(np.arange(4), 3)
    assert windowed_order(UIDS, shards, 0, 0, 2).tolist() == GOLDEN_WINDOWED


@given(data=st.data(), group=st.integers(1, 5), epoch=st.integers(0, 3))
def test_windowed_order_stays_within_groups_of_shards(data: st.DataObject, group: int, epoch: int) -> None:
    shards = np.array(data.draw(st.lists(st.integers(0, 6), min_size=12, max_size=12)))
    order = windowed_order(UIDS, shards, 3, epoch, group)
    assert sorted(order.tolist()) == list(range(12))
    visited = list(dict.fromkeys(shards[order].tolist()))
    for first in range(0, len(visited), group):
        count = np.isin(shards, visited[first : first + group]).sum()
        here = shards[order][np.isin(shards[order], visited[first : first + group])]
        assert len(here) == count
    rank = {shard: place // group for place, shard in enumerate(_shard_order(order, shards, group))}
    groups = [rank[shard] for shard in shards[order].tolist()]
    assert groups == sorted(groups)


def _shard_order(order: np.ndarray, shards: np.ndarray, group: int) -> list[int]:
    """Shards in an order in which each run of `group` of them is visited together."""
    left, at, found = order.tolist(), 0, []
    while at < len(left):
        together: list[int] = []
        while at < len(left) and (int(shards[left[at]]) in together or len(together) < group):
            if int(shards[left[at]]) not in together:
                together.append(int(shards[left[at]]))
            at += 1
        found += together
    return found


def test_windowed_order_does_not_depend_on_how_shards_are_numbered() -> None:
    shards = np.repeat(np.arange(4), 3)
    renamed = np.array([2, 0, 3, 1])[shards]
    for epoch in range(3):
        order = windowed_order(UIDS, shards, 5, epoch, 2)
        np.testing.assert_array_equal(windowed_order(UIDS, renamed, 5, epoch, 2), order)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.integers(1, 200))
def test_quotas_are_the_shares_to_the_nearest_clip(weights: list[float], block: int) -> None:
    counts = quotas(weights, block)
    assert sum(counts) == block
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - weight * block / sum(weights)) < 1 + 1e-9


def test_replay_of_a_third_takes_30_of_100() -> None:
    assert quotas([0.7, 0.3], 100) == [70, 30]
    assert quotas([2, 1], 10) == [7, 3]


@given(data=st.data(), world=st.integers(1, 8), micro=st.integers(1, 9))
def test_micro_batches_cover_each_global_batch_once(data: st.DataObject, world: int, micro: int) -> None:
    total = data.draw(st.integers(world, 50))
    shares = [micro_batches(total, rank, world, micro) for rank in range(world)]
    assert {len(share) for share in shares} == {math.ceil(math.ceil(total / world) / micro)}
    covered = [first + i for share in shares for first, size in share for i in range(size)]
    assert covered == list(range(total))
    assert max(size for share in shares for _, size in share) <= micro
    assert [sum(size for _, size in share) for share in shares] == [
        rank_share(total, r, world)[1] for r in range(world)
    ]


@pytest.mark.parametrize("arguments", [(3, 0, 4, 1), (4, 0, 2, 0), (4, 2, 2, 1), (4, 0, 0, 1)])
def test_impossible_sizes_are_refused(arguments: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError):
        micro_batches(*arguments)
