"""Run by torchrun: engines against the same steps on the whole model in one process. Rank 0 writes what it saw as JSON.

Every cell is a line of settings, and all of them take turns in one process group. `SETTINGS` trains from the start and
leaves a checkpoint of the middle; `SETTINGS < FOLDER` goes on from one that another engine, or other ranks, have left.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hopescale.checkpoint.contents import RunState, tensors
from hopescale.checkpoint.manager import CheckpointManager
from hopescale.checkpoint.staging import step_folder
from hopescale.config.compose import load_config
from hopescale.config.schema import Config
from hopescale.model.build import build_predictor
from hopescale.model.init import initialise
from hopescale.optim.flat_piece import FlatPiece
from hopescale.optim.m3 import M3
from hopescale.optim.routing import parameter_groups
from hopescale.parallel import deepspeed
from hopescale.parallel.agreement import decide_on_first
from hopescale.parallel.engine import Engine, TorchEngine
from hopescale.parallel.process_group import Launch, choose_device, end_process, process_group, read_launch
from hopescale.train import build
from hopescale.train_step import train_step
from tests.distributed.fsdp_program import OVERRIDES, batches, distance
from tests.sharded import whole

NUM_STEPS, SAVED_AT = 20, 10
KEPT_WHOLE = 100
BROKEN_BEFORE = (5, SAVED_AT)
# A low rate and eps as in the test of curves over world sizes, and for its reasons: rounding must not grow past bounds.
STEADY = [
    "optimizer.lr=1e-4",
    "optimizer.adam.eps=1e-6",
    # Below the norms of these gradients.
    "optimizer.clip.max_norm=0.02",
    f"train.steps={NUM_STEPS}",
    # Small: many cells take turns.
    "model.block_pattern=[T,H]",
    "model.grid=[2,2]",
]


ROLLOUT = "objective.rollout="
MODELS = {
    "+rollout": [setting for setting in OVERRIDES if setting.startswith(ROLLOUT)],
    "+longterm": ["model.longterm={hidden_multiplier: 1.5, ema: 0.3, gate: retrieval, sync_every: 2}"],
    "+online": [
        "model.cms.mode=online",
        "model.cms.levels=[{period: 1, hidden_multiplier: 1.0, teach_scale: 2.0},{period: 2, hidden_multiplier: 1.0}]",
        "model.cms.online={teach_scale: 1.0, warmup_steps: 2}",
    ],
    "+periods": [
        "model.cms.mode=param_period",
        "model.cms.levels=[{period: 2, hidden_multiplier: 1.0},{period: 3, hidden_multiplier: 1.0}]",
    ],
}
"""What cells call other models."""


def config_of(cell: str) -> Config:
    """The configuration of a cell: its settings and other models, separated by spaces."""
    words = (MODELS.get(word, [word]) for word in cell.split())
    base = [setting for setting in OVERRIDES if not setting.startswith(ROLLOUT)]
    return load_config([*base, *STEADY, *(setting for each in words for setting in each)])


def curve_of(cell: str) -> str:
    """What of a cell decides on the curve that every engine must follow."""
    fixed = ("parallel", "train.micro_batch")
    return " ".join(word for word in cell.split() if not word.startswith(fixed) or "precision" in word)


def run(engine: Engine, config: Config, steps: range, rank: int, world_size: int) -> tuple[list[float], list[float]]:
    """Train, and return losses and norms of gradients, step by step.

    Before some steps comes a batch that is not finite. From the middle on nobody aims at a frame, so that the embedding
    of aims has no gradient, and those that the last of these batches has left must be gone.
    """
    losses, norms = [], []
    not_aiming = config.objective.model_copy(update={"jump_weight": 0.0})
    for step in steps:
        if step in BROKEN_BEFORE:
            broken = batches(config, step, rank, world_size)
            broken.micro[0].features[0, 0] = torch.inf
            assert train_step(engine, broken, config, attempt=step, step=step).skipped
        trained = config if step < SAVED_AT else config.model_copy(update={"objective": not_aiming})
        result = train_step(engine, batches(config, step, rank, world_size), trained, attempt=step, step=step)
        objective = result.objective
        if world_size > 1:
            dist.all_reduce(objective)
        losses.append(float(objective))
        norms += result.norms.tolist()
    return losses, norms


def reference_of(config: Config) -> tuple[list[float], list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, norms, first and last tensors of a whole model trained in this process alone."""
    model = build_predictor(config.model)
    initialise(model, config.train.seed)
    groups = parameter_groups(model.named_parameters(), config.optimizer, config.model.cms.parameter_periods)
    optimizer = M3(groups, config.optimizer)
    first = {name: tensor.clone() for name, tensor in tensors(model, optimizer).items()}
    losses, norms = run(TorchEngine(model, optimizer), config, range(NUM_STEPS), 0, 1)
    return losses, norms, first, tensors(model, optimizer)


def kept(path: Path, train: Callable[[], Any]) -> Any:
    """What an earlier launch has trained, or what is trained now, for later ones."""
    if decide_on_first(path.exists):
        return torch.load(path, weights_only=True)
    made = train()
    if dist.get_rank() == 0:
        torch.save(made, path)
    return made


def full(tensor: Tensor) -> Tensor:
    """A tensor from all its pieces."""
    if not isinstance(tensor, FlatPiece):
        return whole(tensor)
    made = torch.zeros(tensor.shape).view(-1)
    start, stop = tensor.spec.own
    made[start:stop] = tensor.piece
    dist.all_reduce(made)
    return made.view(tensor.shape)


def kept_whole(model: torch.nn.Module, config: Config) -> int:
    """Numbers of parameters that stage 3 leaves on every rank."""
    limit = config.parallel.zero_optimization.get("stage3_param_persistence_threshold", KEPT_WHOLE)
    sizes = [getattr(p, "ds_numel", p.numel()) for p in model.parameters()]
    return sum(size for size in sizes if size <= limit)


def layout_seen(engine: Engine, config: Config) -> dict[str, Any]:
    """How parameters and states lie, from the tensors themselves."""
    held = [
        (p, tensor)
        for group in engine.optimizer.param_groups
        for p in group["params"]
        for tensor in (p, *(t for key, t in engine.optimizer.state[p].items() if key != "step"))
    ]
    kinds = {type(tensor).__name__ for _, tensor in held}
    placements = {str(t.placements) for _, t in held if isinstance(t, DTensor)}
    local = sum(
        t.to_local().numel() if isinstance(t, DTensor) else t.piece.numel() if isinstance(t, FlatPiece) else t.numel()
        for _, t in held
    )
    in_model = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in engine.model.parameters())
    numel = sum(p.numel() for group in engine.optimizer.param_groups for p in group["params"])
    return {
        "kinds": sorted(kinds),
        "placements": sorted(placements),
        "local_share": local / sum(t.numel() for _, t in held),
        "model_share": in_model / numel,
        "kept_share": kept_whole(engine.model, config) / numel,
        "zero": zero_stage(engine),
    }


def zero_stage(engine: Engine) -> int | None:
    """The stage by DeepSpeed's own word."""
    own = getattr(engine, "_engine", None)
    return None if own is None else int(own.zero_optimization_stage())


def off(found: list[float], expected: list[float]) -> float:
    """Largest relative difference, of the last ones where fewer were found; of what is not a number, infinity."""
    pairs = zip(found, expected[-len(found) :], strict=True)
    return max(abs(a - b) / max(abs(b), 1e-9) if math.isfinite(a) else math.inf for a, b in pairs)


def moves(found: dict[str, Tensor], first: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest error of what a parameter moved by, relative to that; 1 for one that stays where it was."""
    moved = [name for name in found if name.startswith("model/") and not torch.equal(expected[name], first[name])]
    return max(distance(found[name] - first[name], expected[name] - first[name]) for name in moved)


def compare(
    cell: str, references: dict[str, Any], folder: Path, launch: Launch, device: torch.device
) -> dict[str, Any]:
    """Train a cell and compare it with the reference of its optimizer."""
    settings, _, saved = cell.partition(" < ")
    config = config_of(settings)
    curve = curve_of(settings)
    if curve not in references:
        references[curve] = kept(folder.with_name(f"curve {curve}.pt"), lambda: reference_of(config_of(curve)))
    expected_losses, expected_norms, first, expected = references[curve]
    engine = build(config, device, launch.world_size)
    manager = CheckpointManager(folder, keep=1, config={})
    seen, ranks = ([], []), (launch.rank, launch.world_size)
    if saved:
        manager.restore(step_folder(Path(saved), SAVED_AT), engine.model, engine.optimizer)
        engine.take_loaded()
    else:
        seen = run(engine, config, range(SAVED_AT), *ranks)
        manager.save(engine.model, engine.optimizer, RunState(step=SAVED_AT))
    more = run(engine, config, range(SAVED_AT, NUM_STEPS), *ranks)
    losses, norms = (before + after for before, after in zip(seen, more, strict=True))
    found = {name: full(tensor.detach()) for name, tensor in tensors(engine.model, engine.optimizer).items()}
    return {
        "losses": off(losses, expected_losses),
        "norms": off(norms, expected_norms),
        "names": sorted(found.keys() ^ expected.keys()),
        "errors": {name: distance(found[name], tensor) for name, tensor in expected.items() if name in found},
        "moves": moves(found, first, expected),
        "never_moved": [name for name, tensor in first.items() if torch.equal(found[name], tensor)],
        **layout_seen(engine, config),
    }


def main(out: Path, cells: list[str]) -> None:
    launch = read_launch()
    device = choose_device(config_of("").parallel, launch)
    # The model is so small that stage 3 would leave all of it on every rank, and not only norms and biases.
    deepspeed.KEPT_WHOLE = KEPT_WHOLE
    seen, references = {}, {}
    with process_group(config_of("").parallel, launch, device):
        for number, cell in enumerate(cells):
            seen[cell] = compare(cell, references, out.parent / f"{out.stem}-{number}", launch, device)
    if launch.is_first:
        out.write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
    end_process(0)
