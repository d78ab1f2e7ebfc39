"""Run by torchrun: seconds of steps whose time `hopescale plan` is to foresee. Rank 0 writes them as JSON."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.batch import StepBatches
from hopescale.config.compose import load_config
from hopescale.parallel.process_group import choose_device, end_process, process_group, read_launch
from hopescale.train import build
from hopescale.train_step import train_step
from tests.clip_batches import clips_for, step_of
from tests.presets import TRAINED_HERE

CELLS = [
    "demo 2 parallel=fsdp",
    "demo 8 parallel=fsdp",
    "demo 8 parallel=ddp parallel.recompute=none",
    "phase5 1 parallel=fsdp",
    "phase5 3 parallel=fsdp",
    "phase5 2 parallel=ddp",
    "phase5 2 parallel=fsdp parallel.recompute=none",
    "phase5 2 parallel=hsdp",
]
"""Model, clips of a rank, settings."""


def settings_of(cell: str, ranks: int) -> list[str]:
    """Settings of a cell on so many ranks."""
    name, clips, *rest = cell.split()
    sizes = [f"train.global_batch={int(clips) * ranks}", f"cluster.gpus_per_node={ranks}", "parallel.device=cpu"]
    return [*TRAINED_HERE[name], *sizes, "train.steps=1000", *rest]


def main(out: Path, rounds: int) -> None:
    launch = read_launch()
    ranks = launch.world_size
    configs = {cell: load_config(settings_of(cell, ranks)) for cell in CELLS if ranks > 2 or "hsdp" not in cell}
    first = next(iter(configs.values()))
    device = choose_device(first.parallel, launch)
    times: dict[str, list[float]] = {cell: [] for cell in configs}
    with process_group(first.parallel, launch, device):
        engines = {cell: build(config, device, ranks) for cell, config in configs.items()}
        for number in range(rounds + 1):
            for cell, engine in engines.items():
                batch = step_of(clips_for(configs[cell].model, int(cell.split()[1])))
                batch = StepBatches(number, batch.lengths.repeat(ranks), batch.micro)
                dist.barrier()
                began = time.perf_counter()
                train_step(engine, batch, configs[cell], attempt=number, step=number)
                dist.barrier()
                if number:
                    times[cell].append(time.perf_counter() - began)
    if launch.is_first:
        out.write_text(json.dumps({cell: statistics.median(spent) for cell, spent in times.items()}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    main(Path(sys.argv[1]), int(sys.argv[2]))
    end_process(0)
