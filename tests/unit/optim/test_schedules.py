from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hopescale.optim.schedules import rate_factor
from hopescale.optim.schema import ScheduleConfig

# V-JEPA 2-AC: 315 epochs of 300 steps, from 7.5e-5 to 4.25e-4 in 15 epochs, to 0 in the last 15.
PEAK, START, STEPS, EDGE = 4.25e-4, 7.5e-5, 94_500, 4_500
LONG_RUN = ScheduleConfig(warmup=EDGE / STEPS, decay=EDGE / STEPS, start=START / PEAK)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, START),
        (1, START + (PEAK - START) / EDGE),
        (2_250, (START + PEAK) / 2),
        (4_499, PEAK - (PEAK - START) / EDGE),
        (4_500, PEAK),
        (50_000, PEAK),
        (90_000, PEAK),
        (90_001, PEAK * (1 - 1 / EDGE)),
        (92_250, PEAK / 2),
        (94_499, PEAK / EDGE),
        (94_500, 0.0),
    ],
)
def test_the_long_run_follows_its_published_curve(step: int, rate: float) -> None:
    assert PEAK * rate_factor(LONG_RUN, step, STEPS) == pytest.approx(rate, rel=1e-9, abs=1e-15)


def test_cosine_decay_falls_slowly_then_fast_then_slowly() -> None:
    schedule = ScheduleConfig(warmup=0.0, decay=0.5, shape="cosine", end=0.2)
    found = [rate_factor(schedule, step, 80) for step in (0, 40, 50, 60, 70, 80)]
    assert found == pytest.approx([1, 1, 0.2 + 0.8 * 0.853553, 0.6, 0.2 + 0.8 * 0.146447, 0.2], abs=1e-5)


def test_phases_of_no_length_are_skipped() -> None:
    flat = ScheduleConfig(warmup=0.0, decay=0.0, start=0.0)
    assert {rate_factor(flat, step, 10) for step in range(10)} == {1.0}


schedules = st.builds(
    lambda warmup, decay, shape, start, end: ScheduleConfig(
        warmup=warmup, decay=min(decay, 1 - warmup), shape=shape, start=start, end=end
    ),
    *(st.floats(0, 1),) * 2,
    st.sampled_from(["linear", "cosine"]),
    *(st.floats(0, 1),) * 2,
)


@settings(max_examples=100, deadline=None)
@given(schedule=schedules, num_steps=st.integers(1, 200))
def test_the_factor_is_between_0_and_1_rises_and_falls_without_jumps(schedule: ScheduleConfig, num_steps: int) -> None:
    curve = [rate_factor(schedule, step, num_steps) for step in range(num_steps + 1)]
    assert all(0 <= factor <= 1 for factor in curve)
    steepest_rise = (1 - schedule.start) / max(schedule.warmup * num_steps, 1)
    # A cosine falls pi / 2 times as fast as a line at its steepest.
    steepest_fall = 1.571 * (1 - schedule.end) / max(schedule.decay * num_steps, 1)
    for before, after in pairwise(curve):
        assert -steepest_fall - 1e-9 <= after - before <= steepest_rise + 1e-9
    peak = curve.index(max(curve))
    assert curve[:peak] == sorted(curve[:peak])
    assert curve[peak:] == sorted(curve[peak:], reverse=True)


@settings(max_examples=50, deadline=None)
@given(schedule=schedules)
def test_the_curve_is_a_function_of_the_share_of_the_run(schedule: ScheduleConfig) -> None:
    for step in range(0, 16, 3):
        assert rate_factor(schedule, step, 16) == pytest.approx(rate_factor(schedule, 8 * step, 128), abs=1e-9)


def test_phases_longer_than_the_run_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 1"):
        ScheduleConfig(warmup=0.6, decay=0.5)
