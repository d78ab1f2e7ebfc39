"""How long steps take and how much of it is waiting for data, measured on the host between two log steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """What happened between two log steps.

    Attributes:
        steps: steps finished.
        clips: clips they consumed, as passed to `StepClock.step`.
        seconds: time spent training, pauses excluded.
        wait_seconds: the part of it spent waiting for data.
    """

    steps: int
    clips: float
    seconds: float
    wait_seconds: float

    @property
    def step_seconds(self) -> float:
        """Mean seconds per step."""
        return self.seconds / self.steps

    @property
    def clips_per_second(self) -> float:
        """Clips per second of training; 0 when the clock did not advance."""
        return self.clips / self.seconds if self.seconds > 0 else 0.0


class StepClock:
    """Splits host time into steps, waiting for data, and pauses.

    The device runs behind the host, so a single step's host time means little; over a window that starts and ends
    where the recorder synchronises (each log step) the mean is the true step time.

    Args:
        now: a monotonic clock in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self.total_seconds = 0.0
        """Training time of all windows taken so far."""
        self._begin()

    def _begin(self) -> None:
        self._started = self._now()
        self._paused_seconds = 0.0
        self._wait_seconds = 0.0
        self._steps = 0
        self._clips = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the block as waiting for data."""
        begin = self._now()
        try:
            yield
        finally:
            self._wait_seconds += self._now() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the block (evaluation, checkpoint) out of every number."""
        begin = self._now()
        try:
            yield
        finally:
            self._paused_seconds += self._now() - begin

    def step(self, clips: float) -> None:
        """Ends a step that consumed `clips` clips over all ranks."""
        self._steps += 1
        self._clips += clips

    def take(self) -> Window | None:
        """The window since the last call, or None when no step ended in it; starts the next window."""
        if self._steps == 0:
            return None
        seconds = self._now() - self._started - self._paused_seconds
        window = Window(self._steps, self._clips, seconds, self._wait_seconds)
        self.total_seconds += seconds
        self._begin()
        return window
