"""What asks this process to stop, or to save: signals, files in the run folder, the end of its job's time."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from enum import IntEnum
from pathlib import Path
from types import FrameType, TracebackType

logger = logging.getLogger(__name__)

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
        self._stop_file = None if folder is None else folder / "stop"
        self._save_file = None if folder is None else folder / "save"
        self._ends_at = ends_at
        self._signalled = False
        self._looked = -POLL_SECONDS
        self._found = (False, False)
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
        return Stop.FILE if self._look()[0] else Stop.NO

    @property
    def save(self) -> bool:
        """Whether somebody wants a checkpoint."""
        return self._look()[1]

    @property
    def seconds_left(self) -> float:
        """Until the job is over; infinite where nobody says."""
        return float("inf") if self._ends_at is None else self._ends_at - time.time()

    def granted(self, *, stop: bool = False, save: bool = False) -> None:
        """Remove the files whose wish was granted, so that each counts once."""
        for wanted, path in ((stop, self._stop_file), (save, self._save_file)):
            if wanted and path is not None:
                path.unlink(missing_ok=True)
        self._found = (self._found[0] and not stop, self._found[1] and not save)

    def _look(self) -> tuple[bool, bool]:
        if self._stop_file is None or self._save_file is None:
            return False, False
        now = time.monotonic()
        if now - self._looked >= POLL_SECONDS:
            self._looked = now
            self._found = (self._stop_file.exists(), self._save_file.exists())
        return self._found
