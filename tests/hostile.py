"""Bounds on code that reads what somebody else wrote: it must end soon, and allocate no more than it was told of."""

from __future__ import annotations

import signal
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from data_pipeline.errors import UserError


class Hang(BaseException):
    """Raised in the middle of code that takes too long; not an Exception, so that nothing handles it by mistake."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `Hang` when the body uses more CPU time than `seconds`, or sleeps for twenty times as long.

    Processor time rather than the clock's: other work on the machine must not decide.
    """

    def expire(signal_number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {seconds} s")

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, 20 * seconds)}
    before = {number: signal.signal(number, expire) for number in timers}
    try:
        for timer, limit in timers.values():
            signal.setitimer(timer, limit)
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


@contextmanager
def allocating_at_most(nbytes: int) -> Iterator[None]:
    """Fail when the body holds more than `nbytes` of new memory at any moment, as Python and numpy count it."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= nbytes, f"{peak} bytes were allocated, {nbytes} are allowed"


def require_reason(error: Exception) -> None:
    """Fail when an error says nothing, or, as errors for users must, not how to mend it."""
    text = str(error)
    assert text
    assert text.replace("\n", "").isprintable()
    if isinstance(error, UserError):
        assert all("Fix: " in line for line in text.splitlines())
