"""What clips of 7, 15 and 31 transitions cost S-H-S and T-T-T, trained on the probe's objective.

`python tests/benchmarks/clip_cost.py [--threads 1] [--rounds 5]` lets both take turns in one process and prints how
many times the seconds and the FLOPs of S-H-S a step of T-T-T takes, with frames of the probe's and of the demo's size;
the figures are kept for `ablation_report.py`, which puts the skills beside them. Nothing asserts these numbers.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch

from hopescale.config.compose import load_config
from hopescale.config.schema import Config
from hopescale.model.flops import flops_executed
from hopescale.model.init import initialise
from hopescale.model.objective import clip_losses
from hopescale.model.predictor import HopePredictor
from tests.benchmarks.ablation_results import RESULTS, keep
from tests.benchmarks.turns import seconds_in_turns
from tests.clip_batches import clips_for

FRAMES = (8, 16, 32)
SIDES = (4, 8)
"""Patches along one side of a frame: the probe's, the demo's."""
PATTERNS = ("S-H-S", "T-T-T")
KEPT = RESULTS / "clip_cost.json"
CLIPS = 4


def config_of(pattern: str, frames: int, side: int) -> Config:
    """The probe's experiment with another pattern, longer clips and frames of another size."""
    letters = pattern.replace("-", ",")
    settings = [f"model.block_pattern=[{letters}]", f"model.frames={frames}", f"model.grid=[{side},{side}]"]
    return load_config(["experiment=hidden", *settings])


def step(config: Config) -> Callable[[], None]:
    """Forward and backward of a few random clips."""
    model = HopePredictor(config.model)
    initialise(model, seed=0)
    clips = clips_for(config.model, CLIPS)
    batch = (clips.features, clips.actions, clips.states, clips.lengths, clips.weights, clips.lengths - 1)

    def run() -> None:
        losses = clip_losses(model, config.objective, *batch, draws=None)
        (losses.teacher + losses.rollout).backward()
        model.zero_grad(set_to_none=True)

    return run


def measure(frames: int, side: int, rounds: int) -> dict[str, Any]:
    """Ratios of T-T-T to S-H-S, and FLOPs of one clip by pattern."""
    configs = [config_of(pattern, frames, side) for pattern in PATTERNS]
    plain, attending = seconds_in_turns([step(config) for config in configs], rounds)
    flops = [flops_executed(config.model, config.objective, frames).total for config in configs]
    return {
        "transitions": frames - 1,
        "patches": side**2,
        "seconds_ratio": round(statistics.median(b / a for a, b in zip(plain, attending, strict=True)), 3),
        "flops_ratio": round(flops[1] / flops[0], 3),
        "flops": dict(zip(PATTERNS, flops, strict=True)),
    }


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--frames", type=int, nargs="+", default=FRAMES)
    parser.add_argument("--out", type=Path, default=KEPT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    print("T-T-T / S-H-S        seconds   FLOPs   GFLOP a clip")
    rows = []
    for frames, side in product(arguments.frames, SIDES):
        row = measure(frames, side, arguments.rounds)
        rows.append(row)
        giga = " against ".join(f"{flops / 1e9:.2f}" for flops in reversed(row["flops"].values()))
        size = f"T = {row['transitions']}, {row['patches']} patches"
        print(f"{size:<20} {row['seconds_ratio']:>7.2f} {row['flops_ratio']:>7.2f}   {giga}", flush=True)
    keep(arguments.out, {"threads": arguments.threads, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
