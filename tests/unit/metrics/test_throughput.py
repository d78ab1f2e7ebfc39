from __future__ import annotations

import pytest

from hopescale.metrics.throughput import StepClock


class Time:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_window_splits_training_into_steps_and_waiting():
    time = Time()
    clock = StepClock(time)
    for _ in range(4):
        with clock.waiting():
            time.seconds += 0.5
        time.seconds += 1.5
        clock.step(clips=8)
    window = clock.take()
    assert window is not None
    assert (window.steps, window.step_seconds, window.wait_seconds) == (4, 2.0, 2.0)
    assert window.clips_per_second == 4.0


def test_pauses_are_no_training_time():
    time = Time()
    clock = StepClock(time)
    time.seconds += 1
    clock.step(clips=2)
    with clock.paused():
        time.seconds += 1000
    window = clock.take()
    assert window is not None
    assert window.seconds == 1.0


def test_windows_do_not_overlap_and_an_empty_one_is_no_window():
    time = Time()
    clock = StepClock(time)
    assert clock.take() is None
    time.seconds += 1
    clock.step(clips=1)
    clock.take()
    time.seconds += 3
    clock.step(clips=1)
    window = clock.take()
    assert window is not None
    assert (window.steps, window.seconds) == (1, 3.0)
    assert clock.take() is None


def test_the_total_counts_every_window_and_no_pause():
    time = Time()
    clock = StepClock(time)
    for seconds in (1, 2):
        time.seconds += seconds
        clock.step(clips=1)
        with clock.paused():
            time.seconds += 1000
        clock.take()
    assert clock.total_seconds == 3.0


def test_waiting_that_raises_still_counts():
    time = Time()
    clock = StepClock(time)

    def fail_after_a_second() -> None:
        with clock.waiting():
            time.seconds += 1
            raise StopIteration

    with pytest.raises(StopIteration):
        fail_after_a_second()
    clock.step(clips=1)
    window = clock.take()
    assert window is not None
    assert window.wait_seconds == 1.0


def test_a_clock_that_does_not_advance_gives_no_division_by_zero():
    clock = StepClock(lambda: 0.0)
    clock.step(clips=5)
    window = clock.take()
    assert window is not None
    assert window.clips_per_second == 0.0
