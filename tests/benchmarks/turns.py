"""Timing of several things that take turns in one process, so that a machine whose speed drifts slows all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence


def seconds_in_turns(runs: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of each run in each round, after one round that does not count."""
    found: list[list[float]] = [[] for _ in runs]
    for number in range(rounds + 1):
        for times, run in zip(found, runs, strict=True):
            began = time.perf_counter()
            run()
            if number:
                times.append(time.perf_counter() - began)
    return found


def ratio_in_turns(numerator: Callable[[], None], denominator: Callable[[], None], rounds: int) -> float:
    """Median over rounds of the ratio of neighbouring runs."""
    above, below = seconds_in_turns([numerator, denominator], rounds)
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
