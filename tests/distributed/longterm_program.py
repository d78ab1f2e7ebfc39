"""Run by torchrun: long-term memories on shards against the whole model, stopped and resumed or not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hopescale.checkpoint.contents import RunState, tensors
from hopescale.checkpoint.manager import CheckpointManager
from hopescale.config.compose import load_config
from hopescale.config.schema import Config
from hopescale.model.init import initialise
from hopescale.model.predictor import HopePredictor
from hopescale.optim.m3 import M3
from hopescale.optim.routing import parameter_groups
from hopescale.parallel.consolidation import longterm_memories, restore_waiting, waiting_changes
from hopescale.parallel.engine import TorchEngine
from hopescale.parallel.process_group import Launch, choose_device, end_process, process_group, read_launch
from hopescale.train import build
from hopescale.train_step import train_step
from tests.distributed.fsdp_program import GLOBAL_BATCH, batches, distance
from tests.sharded import whole

OVERRIDES = [
    "model.encoder_dim=12",
    "model.grid=[2,3]",
    "model.frames=4",
    "model.state_dim=3",
    "model.width=24",
    "model.block_pattern=[H,U]",
    "model.memory.heads=2",
    "model.memory.hidden_multiplier=1.5",
    "model.attention.heads=2",
    "objective.jump_weight=0.0",
    f"train.global_batch={GLOBAL_BATCH}",
    "train.micro_batch=2",
    "optimizer.lr=1e-3",
    "optimizer.newton_schulz.precision=fp32",
    # A rate at which what is carried over matters after a few steps.
    "model.longterm={hidden_multiplier: 1.5, ema: 0.3, gate: retrieval}",
]
NUM_STEPS, STOP = 3, 1


def train(model: nn.Module, optimizer: M3, config: Config, steps: range, rank: int, world_size: int) -> None:
    for step in steps:
        train_step(
            TorchEngine(model, optimizer), batches(config, step, rank, world_size), config, attempt=step, step=step
        )


def compared(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Distance of each tensor; of what waits, only the sum over ranks can agree."""
    wholes = {name: (whole(found[name]), whole(tensor)) for name, tensor in expected.items()}
    sums = {n: (a.sum(0), b.sum(0)) if n.startswith("waiting/") else (a, b) for n, (a, b) in wholes.items()}
    return {name: distance(a, b) for name, (a, b) in sums.items()}


def main(out: Path) -> None:
    launch = read_launch()
    config = load_config(OVERRIDES)
    device = choose_device(config.parallel, launch)
    with process_group(config.parallel, launch, device):
        seen = {every: run(launch, device, out.parent / f"every-{every}", every) for every in (1, 2)}
    if launch.is_first:
        out.write_text(json.dumps(seen))


def run(launch: Launch, device: torch.device, folder: Path, sync_every: int) -> dict[str, Any]:
    """Train whole, on shards, and on shards with a stop, and compare."""
    config = load_config([*OVERRIDES, f"model.longterm.sync_every={sync_every}"])
    rank, world_size = launch.rank, launch.world_size
    reference = HopePredictor(config.model)
    initialise(reference, config.train.seed)
    reference_optimizer = M3(parameter_groups(reference.named_parameters(), config.optimizer), config.optimizer)
    train(reference, reference_optimizer, config, range(NUM_STEPS), 0, 1)

    engine = build(config, device, world_size)
    model, optimizer = engine.model, engine.optimizer
    manager = CheckpointManager(folder, keep=1, config={})
    train(model, optimizer, config, range(STOP), rank, world_size)
    saved = manager.save(model, optimizer, RunState(step=STOP))
    train(model, optimizer, config, range(STOP, NUM_STEPS), rank, world_size)
    engine = build(config, device, world_size)
    resumed, its_optimizer = engine.model, engine.optimizer
    manager.restore(saved, resumed, its_optimizer)
    train(resumed, its_optimizer, config, range(STOP, NUM_STEPS), rank, world_size)

    ours, theirs = tensors(model, optimizer), tensors(resumed, its_optimizer)
    held: list[list[Tensor]] = [[] for _ in range(world_size)]
    carried = [part for _, memory in longterm_memories(model) for part in memory.carried]
    dist.all_gather_object(held, carried)
    return {
        "errors": {name: distance(whole(ours[name]), tensor) for name, tensor in tensors(reference, None).items()},
        "waiting_errors": [
            distance(whole(rows).sum(0), part.squeeze(0))
            for rows, part in zip(
                waiting_changes(model, spread=True).values(), waiting_changes(reference).values(), strict=True
            )
        ],
        "differs_after_resuming": [n for n in ours if not torch.equal(whole(ours[n]), whole(theirs[n]))],
        "differs_between_ranks": [n for n, parts in enumerate(zip(*held, strict=True)) if not torch.equal(*parts)],
        "smallest_carried": min(float(part.norm()) for part in carried),
        "names": sorted(n for n in ours if "carried" in n or "waiting" in n),
        "rows_lost": rows_lost(model, world_size),
    }


def rows_lost(model: nn.Module, world_size: int) -> list[str]:
    """What is not whole once rows of fewer or more ranks are handed out."""
    lost = []
    for saved_by in (world_size - 1, world_size + 1, 2 * world_size + 1):
        rows = waiting_changes(model, saved_by, spread=True)
        for row in rows.values():
            row.to_local().fill_(1.0)  # type: ignore[attr-defined]
        restore_waiting(model, rows)
        for name, handed_out in waiting_changes(model, spread=True).items():
            if not torch.equal(whole(handed_out).sum(0), whole(rows[name]).sum(0)):
                lost.append(f"{name} of {saved_by}")
    return lost


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    end_process(0)
