"""What a person sees: a progress bar on a terminal, plain lines in a job's log."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

_SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("learning_rate", "lr", "{:.2e}"),
    ("grad_norm", "grad", "{:.3g}"),
    ("clips_per_second", "clips/s", "{:.1f}"),
    ("data_wait_ratio", "wait", "{:.0%}"),
)
_SHOWN_BESIDE_BAR = {"loss", "clips_per_second"}


class ConsoleSink:
    """Shows loss, speed and the time left.

    Args:
        total_steps: last step of the run.
        start_step: step the process starts from.
        stream: where to print; standard output when None.
        interactive: progress bar or plain lines; asked of the stream when None.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        stream: TextIO | None = None,
        interactive: bool | None = None,
    ) -> None:
        self._stream = stream or sys.stdout
        self._total_steps = total_steps
        self._last: tuple[int, float] | None = None
        self._seconds_per_step: float | None = None
        self._progress: Progress | None = None
        if self._stream.isatty() if interactive is None else interactive:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[shown]}"),
                console=Console(file=self._stream, force_terminal=True),
            )
            self._task = self._progress.add_task("train", total=total_steps, completed=start_step, shown="")
            self._progress.start()

    def write(self, step: int, kind: str, values: Mapping[str, float], time: float) -> None:
        """Prints one line, or moves the bar; evaluation results are always a line, checkpoints are not shown."""
        if kind == "checkpoint":
            return
        if kind != "train":
            # An identity ratio is 1 - skill, which stands beside it.
            shown = "  ".join(f"{k} {value:.4f}" for k, value in values.items() if not k.startswith("identity_ratio"))
            self._print(f"{kind} at step {step}  {shown}")
            return
        wanted = values if self._progress is None else values.keys() & _SHOWN_BESIDE_BAR
        words = [f"{word} {form.format(values[key])}" for key, word, form in _SHOWN if key in wanted]
        shown = "  ".join([*words, f"eta {self._time_left(step, time)}"])
        if self._progress is not None:
            self._progress.update(self._task, completed=step, shown=shown)
        else:
            self._print(f"step {step}/{self._total_steps}  {shown}")

    def _time_left(self, step: int, time: float) -> str:
        """Remaining wall time from the pace of recent records, evaluation and checkpoints included."""
        if self._last is not None and step > self._last[0]:
            pace = (time - self._last[1]) / (step - self._last[0])
            # A moving average: one slow checkpoint must not make the estimate jump.
            earlier = self._seconds_per_step
            self._seconds_per_step = pace if earlier is None else 0.8 * earlier + 0.2 * pace
        self._last = (step, time)
        if self._seconds_per_step is None:
            return "?"
        return str(timedelta(seconds=round(max(0, self._total_steps - step) * self._seconds_per_step)))

    def _print(self, line: str) -> None:
        if self._progress is not None:
            self._progress.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was; the stream stays open."""
        if self._progress is not None:
            self._progress.stop()
