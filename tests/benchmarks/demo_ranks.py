"""Run by torchrun: what a step of the demo spends beside computing. Rank 0 writes what it saw as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hopescale import train
from hopescale.parallel.process_group import end_process, read_launch
from hopescale.trainer import Outcome, Trainer

WARM_UP, CHECKS = 10, 200


class Watched(Trainer):
    """A trainer that counts the seconds of its parts, after the first steps."""

    shares: Mapping[str, float] = {}
    """Of the seconds of the run."""

    def run(self) -> Outcome:
        """Train, and count."""
        self.seconds, self.began = defaultdict[str, float](float), 0.0
        ended = super().run()
        total = time.perf_counter() - self.began
        dist.barrier()
        began = time.perf_counter()
        for _ in range(CHECKS):
            # What `load` adds to a batch: the ranks tell each other what they know.
            with self.control.word(0):
                pass
        self.seconds["control"] = (time.perf_counter() - began) / CHECKS * (self.state.step - WARM_UP)
        type(self).shares = {name: spent / total for name, spent in self.seconds.items()}
        return ended

    def load(self, batches: Iterator[Any]) -> Any:
        """Count what the next batch takes, without waiting for other ranks to have theirs."""
        if self.state.step == WARM_UP:
            self.seconds.clear()
            self.began = time.perf_counter()
        return super().load(self._counted(batches))

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        with self._as("data"):
            batch = next(batches)
        yield batch

    def record(self, *args: Any) -> None:
        """Count."""
        with self._as("metrics"):
            super().record(*args)

    def log(self) -> None:
        """Count."""
        with self._as("metrics"):
            super().log()

    @contextmanager
    def _as(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began


def main(out: Path, settings: list[str]) -> int:
    """Train a run, and keep what share of it was spent on what."""
    train.Trainer = Watched  # type: ignore[misc]
    code = train.main(settings)
    if read_launch().is_first:
        out.write_text(json.dumps(dict(Watched.shares)))
    return code


if __name__ == "__main__":
    torch.set_num_threads(1)
    end_process(main(Path(sys.argv[1]), sys.argv[2:]))
