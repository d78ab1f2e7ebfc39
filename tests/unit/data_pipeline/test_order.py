from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.order import clips_at, epoch_order, micro_batches, rank_share, uid

KEYS = [f"base-train-{index:05d}" for index in range(12)]
UIDS = np.array([uid(key) for key in KEYS], np.uint64)

# Resumed runs depend on these numbers: a change of them is a change of format.
GOLDEN_UIDS = ["0x1ed893257254e0d4", "0x4556ec611150f893"]
GOLDEN_EPOCH_0 = [7, 6, 1, 8, 0, 4, 10, 2, 5, 3, 11, 9]
GOLDEN_EPOCH_1 = [1, 7, 9, 3, 0, 11, 4, 10, 2, 8, 5, 6]
GOLDEN_SEED_7 = [11, 4, 1, 9, 5, 10, 2, 8, 0, 6, 3, 7]


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


@given(start=st.integers(0, 60), count=st.integers(0, 40), keep=st.booleans())
def test_positions_run_across_epochs(start: int, count: int, keep: bool) -> None:
    stream = np.concatenate([epoch_order(UIDS, 1, epoch) for epoch in range(10)])
    orders = {0: epoch_order(UIDS, 1, 0)} if keep else None
    np.testing.assert_array_equal(clips_at(UIDS, 1, start, count, orders), stream[start : start + count])


def test_an_empty_view_has_no_positions() -> None:
    with pytest.raises(ValueError, match="0 clips"):
        clips_at(UIDS[:0], 0, 0, 4)


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
