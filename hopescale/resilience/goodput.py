"""What a run's time went into, kept across incarnations: `RUN/goodput.jsonl`, one line at a time, never rewritten.

Every second from the start of the first process to the last line belongs to exactly one class:

    init          starting Python, opening data, building the model, joining the other ranks
    load          finding, verifying and loading the checkpoint that a run goes on from
    compile       the first step of an incarnation, which compiles, allocates and connects
    step          steps that count, as long as they usually are, and evaluations
    lost_step     steps that were skipped, and steps that an earlier incarnation had done and nothing kept
    data_wait     waiting for the next batch, until the slowest rank has it
    save          waiting for a checkpoint
    restart_gap   from the last line of an incarnation to the start of the next: queues, and what a crash left unsaid
    other         logging, what a step takes beyond the median where it takes ten times as long (something stood
                  still), and everything nobody named

Goodput is the share of `step`. Within an incarnation a monotonic clock counts; only gaps go by wall clocks, and one
that would be negative counts as nothing.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from hopescale.errors import EXIT_SUPERSEDED, UserError
from hopescale.metrics.reliability_metrics import TIME_CLASSES
from hopescale.process_start import seconds_after_boot

logger = logging.getLogger(__name__)

USEFUL = "step"
STALL_FACTOR = 10.0
"""A step that takes so many times the median stood still for what is beyond."""
STALL_LEAST_SECONDS = 1.0
"""Less is no stall, however short steps are."""
STEPS_REMEMBERED, STEPS_TO_KNOW = 64, 8
"""The median is of the last so many steps; of fewer nothing is known."""


@dataclass
class History:
    """What the lines of earlier incarnations, or of all, add up to.

    Attributes:
        seconds: By class.
        began: Unix seconds at which the first process started; None where there is no line.
        until: Unix seconds of the last line.
        step: Most steps that any incarnation is known to have done.
        starts: Of any incarnation.
        preemptions: Incarnations that stopped early, with a checkpoint.
    """

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    began: float | None = None
    until: float | None = None
    step: int = 0
    starts: int = 0
    preemptions: int = 0

    @property
    def restarts(self) -> int:
        """Starts after the first."""
        return max(0, self.starts - 1)

    @property
    def goodput(self) -> float | None:
        """Share of the time that went into steps that count; None before any has passed."""
        return useful_share(self.seconds)

    def add(self, told: Mapping[str, Any]) -> None:
        """Count a line."""
        for kind, spent in told["seconds"].items():
            self.seconds[kind] += spent
        if self.began is None:
            self.began = told["time"] - sum(told["seconds"].values())
        self.until = told["time"]
        self.step = max(self.step, told["step"])
        self.starts += told["event"] == "start"
        self.preemptions += told["event"] == "preempted"


def useful_share(seconds: Mapping[str, float]) -> float | None:
    """Goodput of the time by class; None before any has passed."""
    total = sum(seconds.values())
    return seconds[USEFUL] / total if total > 0 else None


def read_history(path: Path) -> History:
    """Add up the lines; one that a crash has cut short is passed over, and its time is part of the gap after it."""
    history = History()
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            history.add(json.loads(line))
        except ValueError:
            continue
    return history


class Goodput:
    """One rank's account; only the first rank's is written and published.

    Args:
        path: of the lines; None keeps them for nobody.
        incarnation: of the run, from 0.
        age: seconds since this process was started.
        now: a monotonic clock, in seconds.
        clock: Unix seconds.
    """

    def __init__(
        self,
        path: Path | None,
        incarnation: int,
        *,
        age: float = 0.0,
        now: Callable[[], float] = time.monotonic,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path, self._incarnation, self._now = path, incarnation, now
        self.history = History() if path is None else read_history(path)
        """Of all incarnations, up to the last line."""
        self._began = self._since = now() - age
        self._started = clock() - age
        self._kind = "init"
        self.outcome = ""
        """What the last line will say."""
        self._open: defaultdict[str, float] = defaultdict(float)
        self._done_before, self._fresh = self.history.step, True
        self._last_step: str = "other"
        self._usual: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        if self.history.until is not None:
            gap = max(0.0, self._started - self.history.until)
            # Also where the clock has gone back: time that was told of once is not told of again.
            self._started = self.history.until + gap
            self._open["restart_gap"] = gap
        self._append("start", self.history.step, self._started)

    def enter(self, kind: str) -> None:
        """Say what the time from now on goes into."""
        self._charge(self._kind)
        self._kind = kind

    @contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        """Say what the time of a block goes into; after it, it goes on as before."""
        before = self._kind
        self.enter(kind)
        try:
            yield
        finally:
            self.enter(before)

    @contextmanager
    def stepping(self) -> Iterator[Callable[[int, bool], None]]:
        """A block of one step; what is yielded is to be told the step that was taken, and whether it was skipped."""
        before, kind = self._kind, "lost_step"
        self.enter(kind)

        def taken(step: int, skipped: bool) -> None:
            nonlocal kind
            lost = skipped or step <= self._done_before
            kind = "compile" if self._fresh else "lost_step" if lost else USEFUL

        try:
            yield taken
        finally:
            if not self._fresh:
                self._charge_stall()
            self._fresh, self._last_step = False, kind
            self._charge(kind)
            self._kind = before

    def settling(self) -> AbstractContextManager[None]:
        """A block of waiting for the device, which may lag behind the host with what it was given to do in steps."""
        return self.spending(self._last_step)

    def seconds(self) -> Mapping[str, float]:
        """Of all incarnations, by class, up to now."""
        self._charge(self._kind)
        return {kind: self.history.seconds[kind] + self._open[kind] for kind in TIME_CLASSES}

    def tell(self, step: int, event: str = "") -> None:
        """Append a line.

        Args:
            step: steps done.
            event: `preempted`, `finished` or `failed` on the last line of an incarnation, else empty.
        """
        self._charge(self._kind)
        self._append(event, step, self._started + (self._since - self._began))

    @contextmanager
    def ending_aloud(self, step: Callable[[], int]) -> Iterator[None]:
        """A block of the whole incarnation, of which the last line says how it ended; a crash says nothing.

        Args:
            step: steps done, asked at the end.
        """
        try:
            yield
        except UserError as error:
            # A later start tells of its own time, which this one's is a part of.
            if error.exit_code != EXIT_SUPERSEDED:
                self.tell(step(), "failed")
            raise
        self.tell(step(), self.outcome)

    def _charge_stall(self) -> None:
        """Take from a step's time what no step usually takes."""
        taken = self._now() - self._since
        usual = median(self._usual) if len(self._usual) >= STEPS_TO_KNOW else taken
        if taken > max(STALL_FACTOR * usual, usual + STALL_LEAST_SECONDS):
            self._open["other"] += taken - usual
            self._since += taken - usual
        # Steps that have become that long for good are soon the usual ones.
        self._usual.append(taken)

    def _charge(self, kind: str) -> None:
        now = self._now()
        self._open[kind] += now - self._since
        self._since = now

    def _append(self, event: str, step: int, until: float) -> None:
        seconds = {kind: self._open[kind] for kind in TIME_CLASSES if self._open[kind]}
        told = {"incarnation": self._incarnation, "event": event, "time": until, "step": step, "seconds": seconds}
        try:
            if self._path is not None:
                _append_line(self._path, told)
        except OSError as error:
            logger.error("goodput.jsonl lacks a line, what it would say will be on the next one: %s", error)
            return
        self.history.add(told)
        self._open.clear()


def _append_line(path: Path, told: dict[str, Any]) -> None:
    with path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        # A crash may have cut the line before this one short.
        torn = end > 0 and file.read(1) != b"\n"
        line = (b"\n" if torn else b"") + json.dumps(told).encode() + b"\n"
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(end)
            raise


def process_age() -> float:
    """Seconds since this process was started, where Linux says so, else 0."""
    try:
        return max(0.0, float(Path("/proc/uptime").read_text().split()[0]) - seconds_after_boot("self"))
    except OSError:
        return 0.0
