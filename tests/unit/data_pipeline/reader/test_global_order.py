from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.order import epoch_order, uid
from data_pipeline.reader.global_order import EpochOrder, MixtureOrder, Tail, buffered

UIDS = np.array([uid(f"clip-{index}") for index in range(11)], np.uint64)
SHARDS = np.arange(11) // 3


def _stream(order: EpochOrder | MixtureOrder, count: int) -> tuple[list[int], list[float]]:
    rows, weights, _ = order.at(0, count)
    return rows.tolist(), weights.tolist()


@given(start=st.integers(0, 60), count=st.integers(0, 40), group=st.sampled_from([0, 2]))
def test_any_piece_is_a_piece_of_the_one_stream(start: int, count: int, group: int) -> None:
    stream, _ = _stream(EpochOrder(UIDS, SHARDS, 1, group), 100)
    assert EpochOrder(UIDS, SHARDS, 1, group).at(start, count).rows.tolist() == stream[start : start + count]


def test_continuous_positions_run_across_epochs() -> None:
    stream, weights = _stream(EpochOrder(UIDS, SHARDS, 1, global_batch=4), 33)
    assert stream == np.concatenate([epoch_order(UIDS, 1, epoch) for epoch in range(3)]).tolist()
    assert set(weights) == {1.0}


@pytest.mark.parametrize(("tail", "length", "weight_of_last"), [("drop", 8, 4), ("pad_zero_weight", 12, 3)])
def test_epochs_end_with_a_step_where_the_tail_says_so(tail: Tail, length: int, weight_of_last: int) -> None:
    order = EpochOrder(UIDS, SHARDS, 1, tail=tail, global_batch=4)
    assert order.epoch_length == length
    for epoch in range(3):
        rows, weights, _ = order.at(epoch * length, length)
        real = rows[weights > 0].tolist()
        assert real == epoch_order(UIDS, 1, epoch).tolist()[: len(real)]
        assert len(set(real)) == len(real) == min(length, 11)
        assert weights[-4:].sum() == weight_of_last


@pytest.mark.parametrize("tail", ["continuous", "drop", "pad_zero_weight"])
def test_no_clips_give_no_order(tail: Tail) -> None:
    with pytest.raises(ValueError, match="0 clips"):
        EpochOrder(UIDS[:0], SHARDS[:0], 1, tail=tail)
    if tail == "drop":
        with pytest.raises(ValueError, match="11 clips"):
            EpochOrder(UIDS, SHARDS, 1, tail=tail, global_batch=12)
    with pytest.raises(ValueError, match="below 0"):
        EpochOrder(UIDS, SHARDS, 1).at(-1, 3)


@given(
    start=st.integers(0, 300),
    count=st.integers(0, 60),
    block=st.integers(2, 20),
    share=st.floats(0.2, 0.8),
    limit=st.integers(1, 6),
)
def test_mixtures_keep_exact_shares_and_go_on_anywhere(
    start: int, count: int, block: int, share: float, limit: int
) -> None:
    parts = [np.arange(7), np.arange(7, 11)[buffered(UIDS[7:], 2, limit)]]

    def mixture() -> MixtureOrder:
        orders = [EpochOrder(UIDS[part], SHARDS[part], 2 + (n << 32)) for n, part in enumerate(parts)]
        return MixtureOrder(parts, orders, [1 - share, share], block, 2, SHARDS)

    if min(round(share * block), round((1 - share) * block)) < 1:
        return
    stream, weights = _stream(mixture(), 400)
    assert set(weights) == {1.0}
    places = mixture().at(0, 400)
    assert places.parts.tolist() == [int(row >= 7) for row in places.rows]
    assert all(mixture().rows_of(part).tolist() == rows.tolist() for part, rows in enumerate(parts))
    assert mixture().at(start, count).rows.tolist() == stream[start : start + count]
    quota = mixture().quotas[1]
    for first in range(0, 400 - block, block):
        assert sum(row >= 7 for row in stream[first : first + block]) == quota
    second = [row for row in stream if row >= 7]
    for first in range(0, len(second) - len(parts[1]), len(parts[1])):
        assert sorted(second[first : first + len(parts[1])]) == parts[1].tolist()


def test_a_part_without_a_clip_of_a_block_is_refused() -> None:
    parts = [np.arange(7), np.arange(7, 11)]
    orders = [EpochOrder(UIDS[part], SHARDS[part], 2) for part in parts]
    with pytest.raises(ValueError, match="without a clip"):
        MixtureOrder(parts, orders, [0.99, 0.01], 10, 2, SHARDS)


@given(count=st.integers(1, 11), seed=st.integers(0, 5))
def test_a_replay_buffer_of_another_size_holds_the_same_clips_first(count: int, seed: int) -> None:
    held = buffered(UIDS, seed, count).tolist()
    assert len(held) == count
    assert held == sorted(held)
    assert set(held) <= set(buffered(UIDS, seed, count + 1).tolist())
    assert buffered(UIDS, seed, None).tolist() == list(range(11))


@given(start=st.integers(0, 40), group=st.sampled_from([0, 2]), mixed=st.booleans())
def test_upcoming_shards_come_in_the_order_of_their_next_use(start: int, group: int, mixed: bool) -> None:
    order: EpochOrder | MixtureOrder = EpochOrder(UIDS, SHARDS, 1, group)
    if mixed:
        parts = [np.arange(7), np.arange(7, 11)]
        order = MixtureOrder(parts, [EpochOrder(UIDS[p], SHARDS[p], 1, group) for p in parts], [1, 1], 4, 1, SHARDS)
    coming = SHARDS[order.at(start, 22).rows].tolist()
    assert order.upcoming_shards(start).tolist() == list(dict.fromkeys(coming))
