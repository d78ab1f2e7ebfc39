from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hopescale.draws import Purpose, drop_path_draws, jump_targets, uniform

seeds = st.integers(0, 2**63 - 1)
steps = st.integers(0, 2**40)
places = st.lists(st.integers(0, 2**62), min_size=1, max_size=8, unique=True)
few = settings(max_examples=60, deadline=None)


def positions(values: list[int]) -> np.ndarray:
    return np.array(values, np.int64)


@few
@given(seed=seeds, step=steps, values=places, data=st.data())
def test_a_draw_depends_on_its_position_and_not_on_the_batch(
    seed: int, step: int, values: list[int], data: st.DataObject
) -> None:
    together = uniform(seed, step, positions(values), 3, Purpose.DROP_PATH)
    order = data.draw(st.permutations(range(len(values))))
    moved = uniform(seed, step, positions([values[i] for i in order]), 3, Purpose.DROP_PATH)
    np.testing.assert_array_equal(moved, together[order])
    alone = uniform(seed, step, positions(values[:1]), 3, Purpose.DROP_PATH)
    np.testing.assert_array_equal(alone, together[:1])


@few
@given(seed=seeds, step=steps, values=places, layers=st.integers(1, 9))
def test_a_draw_does_not_depend_on_the_number_of_layers(seed: int, step: int, values: list[int], layers: int) -> None:
    more = uniform(seed, step, positions(values), layers + 3, Purpose.DROP_PATH)
    np.testing.assert_array_equal(uniform(seed, step, positions(values), layers, Purpose.DROP_PATH), more[:, :layers])


@few
@given(seed=seeds, step=steps, values=places)
def test_draws_are_in_the_half_open_unit_interval(seed: int, step: int, values: list[int]) -> None:
    draws = uniform(seed, step, positions(values), 5, Purpose.JUMP_TARGET)
    assert draws.dtype == np.float64
    assert ((draws >= 0) & (draws < 1)).all()


@few
@given(seed=seeds, step=steps, values=places)
def test_other_seeds_steps_purposes_and_layers_draw_otherwise(seed: int, step: int, values: list[int]) -> None:
    base = uniform(seed, step, positions(values), 4, Purpose.DROP_PATH)
    for other in (
        uniform(seed ^ 1, step, positions(values), 4, Purpose.DROP_PATH),
        uniform(seed, step + 1, positions(values), 4, Purpose.DROP_PATH),
        uniform(seed, step, positions(values), 4, Purpose.JUMP_TARGET),
        uniform(seed, step, positions(values) + 1, 4, Purpose.DROP_PATH),
    ):
        assert (base != other).all()
    assert len(np.unique(base)) == base.size


def test_draws_are_spread_evenly_and_independently() -> None:
    draws = uniform(7, 3, np.arange(20_000), 4, Purpose.DROP_PATH)
    counts = np.stack([np.bincount((column * 20).astype(int), minlength=20) for column in draws.T])
    # 1,000 expected in each bin, standard deviation 31.
    assert np.abs(counts - 1000).max() < 160
    neighbours = np.corrcoef(np.concatenate([draws[:-1].T, draws[1:].T]))
    assert np.abs(neighbours - np.eye(8)).max() < 0.04


def test_draws_keep_their_values_for_good() -> None:
    draws = uniform(42, 7, positions([0, 1, 1_000_000]), 2, Purpose.DROP_PATH)
    expected = [
        [0.12251403681103623, 0.281002097263768],
        [0.34014241644554877, 0.31634238424874384],
        [0.20446422279746523, 0.16323137350338002],
    ]
    assert draws.tolist() == expected
    assert jump_targets(42, 7, np.arange(8), np.full(8, 8), 3).tolist() == [7, 5, 6, 7, 6, 7, 5, 5]


def test_purposes_keep_their_numbers() -> None:
    assert {purpose.name: int(purpose) for purpose in Purpose} == {"DROP_PATH": 1, "JUMP_TARGET": 2}


def test_drop_path_has_a_draw_for_every_branch_of_every_block() -> None:
    draws = drop_path_draws(1, 2, positions([5, 9]), 4, 3)
    assert draws.shape == (2, 4, 3)
    assert draws.dtype == torch.float32
    flat = uniform(1, 2, positions([5, 9]), 12, Purpose.DROP_PATH)
    np.testing.assert_allclose(draws.flatten(1).numpy(), flat, rtol=1e-6)


@few
@given(
    seed=seeds,
    step=steps,
    clips=st.lists(st.tuples(st.integers(0, 2**62), st.integers(2, 12)), min_size=1, max_size=8),
    horizons=st.integers(1, 12),
    context=st.integers(1, 6),
)
def test_jump_targets_are_among_the_last_frames_and_never_in_the_context(
    seed: int, step: int, clips: list[tuple[int, int]], horizons: int, context: int
) -> None:
    lengths = np.array([length for _, length in clips], np.int64)
    targets = jump_targets(seed, step, positions([place for place, _ in clips]), lengths, horizons, context).numpy()
    assert targets.dtype == np.int64
    assert (targets >= np.minimum(context, lengths - 1)).all()
    assert (targets >= lengths - horizons).all()
    assert (targets <= lengths - 1).all()


@pytest.mark.parametrize(
    ("length", "horizons", "context", "expected"),
    [(8, 3, 1, {5, 6, 7}), (4, 9, 1, {1, 2, 3}), (2, 3, 1, {1}), (8, 3, 6, {6, 7}), (5, 4, 4, {4}), (4, 3, 4, {3})],
)
def test_jump_targets_are_drawn_evenly(length: int, horizons: int, context: int, expected: set[int]) -> None:
    targets = jump_targets(0, 0, np.arange(3000), np.full(3000, length), horizons, context).tolist()
    assert set(targets) == expected
    share = 3000 / len(expected)
    assert all(abs(targets.count(target) - share) < 150 for target in expected)
