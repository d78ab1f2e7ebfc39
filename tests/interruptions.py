"""Training that gets a signal at a moment of a test's choice, and what its run folder says afterwards.

Run by torchrun as a program: `interruptions.py MOMENT RANK OVERRIDE...`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

import hopescale.train
import hopescale.trainer
from hopescale.checkpoint.manager import CheckpointManager
from hopescale.checkpoint.manifest import read_manifest
from hopescale.checkpoint.staging import committed
from hopescale.parallel.process_group import end_process

MOMENTS = {
    "never": (hopescale.trainer, "train_step", -1),
    "first step": (hopescale.trainer, "train_step", 0),
    "fourth step": (hopescale.trainer, "train_step", 3),
    "second evaluation": (hopescale.train, "held_out_errors", 1),
    "first save": (CheckpointManager, "save", 0),
}
"""What is about to be called for which time when the signal comes."""


def call_with_signal(moment: str, rank: int, call: Callable[[], int]) -> int:
    """Send this process a signal at the moment, if it is the rank; everything else stays as it is."""
    owner, name, wanted = MOMENTS[moment]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if calls == wanted and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGUSR1)
        calls += 1
        return original(*args, **kwargs)

    setattr(owner, name, interrupted)
    try:
        return call()
    finally:
        setattr(owner, name, original)


def curve(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Losses and skills by step, as they are in metrics.jsonl."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "loss": [(r["step"], r["loss"]) for r in records if r["kind"] == "train"],
        "skill": [(r["step"], r["skill_one_step"]) for r in records if r["kind"] == "eval"],
    }


def final_state(run: Path) -> dict[str, Any]:
    """Numbers and hashes of all tensors of the newest checkpoint."""
    manifest = read_manifest(committed(run / "checkpoints")[0])
    return {"state": manifest["state"], "files": manifest["files"]}


if __name__ == "__main__":
    chosen, who, *settings = sys.argv[1:]
    end_process(call_with_signal(chosen, int(who), lambda: hopescale.train.main(settings)))
