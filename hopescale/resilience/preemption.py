"""What asks this process to stop, or to save: signals, files in the run folder, the end of its job's time."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from enum import IntEnum
from pathlib import Path
from types import FrameType, TracebackType

FILES = ("stop", "save")
"""By which a run can be asked, in its folder."""
POLL_SECONDS = 1.0
"""Least time between two looks at the files: a look at a file of a busy server can take milliseconds."""


class Stop(IntEnum):
    """Why a run is to stop; of several reasons the largest is named."""

    NO = 0
    TIME = 1
    FILE = 2
    SIGNAL = 3

    @property
    def reason(self) -> str:
        """For the log."""
        return ("", "its time is nearly over", "a stop file lies in the run folder", "a rank got a signal")[self]


class StopRequests(AbstractContextManager["StopRequests"]):
    """Listens for signals while it is entered, and looks at the files when it is asked.

    TERM, USR1 and USR2 only raise a flag: a collective or a save that is under way goes on. So does the first INT
    (Ctrl-C); a second one ends the process at once.

    Args:
        folder: holds `stop` and `save` once somebody has put them there; None for ranks that do not look.
        ends_at: Unix seconds at which the job is over, whatever it does; None where nobody says.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

    def __init__(self, folder: Path | None, ends_at: float | None = None) -> None:
        self._folder, self._ends_at = folder, ends_at
        self._signalled = False
        self._looked = -POLL_SECONDS
        self._found: set[str] = set()
        self._earlier: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> StopRequests:
        """Take the signals over."""
        for number in self.SIGNALS:
            self._earlier[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the signals back."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signalled:
            raise KeyboardInterrupt
        self._signalled = True

    @property
    def stop(self) -> Stop:
        """What this process knows of; the end of the time is not among it."""
        if self._signalled:
            return Stop.SIGNAL
        return Stop.FILE if self._is_asked_to("stop") else Stop.NO

    @property
    def save(self) -> bool:
        """Whether somebody wants a checkpoint."""
        return self._is_asked_to("save")

    @property
    def seconds_left(self) -> float:
        """Until the job is over; infinite where nobody says."""
        return float("inf") if self._ends_at is None else self._ends_at - time.time()

    def granted(self, *, stop: bool = False, save: bool = False) -> None:
        """Remove the files whose wish was granted, so that each counts once."""
        for name, wanted in (("stop", stop), ("save", save)):
            if wanted and self._folder is not None:
                (self._folder / name).unlink(missing_ok=True)
                self._found.discard(name)

    def _is_asked_to(self, name: str) -> bool:
        now = time.monotonic()
        if self._folder is not None and now - self._looked >= POLL_SECONDS:
            self._looked = now
            self._found = {file for file in FILES if (self._folder / file).exists()}
        return name in self._found
