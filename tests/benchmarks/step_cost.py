"""Seconds that one training step of every row of the ablation takes, all rows taking turns in one process.

`python tests/benchmarks/step_cost.py [--threads 1] [--rounds 5]` times forward, backward and optimizer on random clips.
`ablation_report.py` reads the curves against these seconds and not against those of the runs, which lasted hours on a
machine whose speed drifts. Nothing asserts these numbers.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from hopescale.config.compose import load_config
from hopescale.model.init import initialise
from hopescale.model.predictor import HopePredictor
from hopescale.optim.m3 import M3
from hopescale.optim.routing import parameter_groups
from hopescale.parallel.engine import TorchEngine
from hopescale.train_step import train_step
from tests.benchmarks.ablation_results import STEP_COST, keep
from tests.benchmarks.ablation_rows import ROWS
from tests.benchmarks.turns import seconds_in_turns
from tests.clip_batches import clips_for, step_of

GROUPS = ("demo", "hidden")


def step(settings: list[str]) -> Callable[[], None]:
    """A training step of an experiment, ready to be taken again and again."""
    config = load_config(settings)
    model = HopePredictor(config.model)
    initialise(model, seed=0)
    groups = parameter_groups(model.named_parameters(), config.optimizer, config.model.cms.parameter_periods)
    optimizer, batch = M3(groups, config.optimizer), step_of(clips_for(config.model, config.train.global_batch))

    def run() -> None:
        train_step(TorchEngine(model, optimizer), batch, config, attempt=0, step=0)

    return run


def measure(group: str, rounds: int) -> dict[str, float]:
    """Median seconds of a step by row."""
    rows = [row for row in ROWS if row.group == group]
    times = seconds_in_turns([step(row.settings) for row in rows], rounds)
    return {row.name: round(statistics.median(found), 4) for row, found in zip(rows, times, strict=True)}


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=STEP_COST)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    found = {group: measure(group, arguments.rounds) for group in GROUPS}
    for group, rows in found.items():
        for name, seconds in rows.items():
            print(f"{group}/{name:<20} {seconds:.3f} s a step")
    keep(arguments.out, {"threads": arguments.threads, "torch": torch.__version__, **found})


if __name__ == "__main__":
    main()
