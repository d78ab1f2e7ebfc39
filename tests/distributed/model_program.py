"""Run by torchrun: loss and gradients of one step, sharded and whole, over what may be chosen about memories.

Rank 0 writes as JSON, by variant and type, the relative errors against the unsharded model.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.batch import StepBatches
from hopescale.config.compose import load_config
from hopescale.config.schema import Config
from hopescale.model.build import build_predictor
from hopescale.model.init import initialise
from hopescale.model.schema import MEMORIES
from hopescale.parallel.activation_checkpointing import recompute_blocks
from hopescale.parallel.fsdp import reduce_gradients_in_backward, shard_model
from hopescale.parallel.mesh import build_mesh, degrees_of
from hopescale.parallel.process_group import Launch, choose_device, end_process, process_group, read_launch
from hopescale.train_step import micro_losses, objective_share
from tests.distributed.fsdp_program import OVERRIDES, batches
from tests.sharded import whole

# Sharing a step's clips out to 1, 2 and 4 ranks leaves ranks with 3, 2, 1 of them, in micro-batches of at most 2.
VARIANTS: dict[str, list[str]] = {
    "default": ["parallel.recompute=none"],
    "so": ["model.memory.meta_grad=so", "parallel.recompute=chunk", "model.memory.heads=1"],
    "scan": ["model.memory.chunk_rule=scan", "parallel.recompute=block"],
    "cut": ["model.memory.detach_interval=1", "parallel.recompute=chunk", "model.memory.momentum=0.5"],
    "token_exact": ["model.memory.chunk_rule=token_exact", "model.memory.surprise_gate=0.0035"],
    "unified": ["model.block_pattern=[U,H]", "model.memory.meta_grad=so", "parallel.recompute=chunk"],
    "resident": ["parallel.reshard_after_forward=false", "model.memory.self_modify=[main]", "parallel.recompute=chunk"],
}
IN_FP32 = ("default", "so", "cut")


def backward(
    model: nn.Module, share: StepBatches, config: Config, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's part of the objective, and the whole gradients of the step."""
    total = torch.zeros((), dtype=dtype)
    for number, clips in enumerate(share.micro):
        reduce_gradients_in_backward(model, number == len(share.micro) - 1)
        states = None if clips.states is None else clips.states.to(dtype)
        clips = replace(clips, features=clips.features.to(dtype), actions=clips.actions.to(dtype), states=states)
        part = objective_share(micro_losses(model, clips, config, 0), share, config)
        part.backward()
        total += part.detach()
    return total, {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative distance of every gradient, memory by memory; infinite where one of them is missing or zero."""
    seen = {name: float("inf") for name in found.keys() ^ expected.keys()}
    for name in found.keys() & expected.keys():
        ours, theirs = [found[name]], [expected[name]]
        if ".memory." in name and len(expected[name]) == len(MEMORIES):
            ours, theirs = list(found[name]), list(expected[name])
        pairs = zip(ours, theirs, strict=True)
        seen[name] = max(float((a - b).norm() / b.norm()) if b.any() else float("inf") for a, b in pairs)
    return seen


def compare(variant: str, dtype: torch.dtype, launch: Launch) -> dict[str, object]:
    config = load_config([*OVERRIDES, *VARIANTS[variant]])
    device = choose_device(config.parallel, launch)
    models = [build_predictor(config.model) for _ in range(2)]
    for model in models:
        initialise(model, config.train.seed)
        with torch.no_grad():
            # What starts at zero would keep the parameters before it from having gradients.
            for name, parameter in model.named_parameters():
                if "spatial_mixing.second" in name:
                    parameter.copy_(0.1 * torch.eye(*parameter.shape))
        model.to(dtype)
    reference, sharded = models
    expected_loss, expected = backward(reference, batches(config, 0, 0, 1), config, dtype)
    recompute_blocks(list(sharded.blocks), config.parallel.recompute)
    mesh = build_mesh(device, degrees_of(config.parallel, launch.world_size))
    shard_model(sharded, list(sharded.blocks), mesh, config.parallel)
    loss, found = backward(sharded, batches(config, 0, launch.rank, launch.world_size), config, dtype)
    dist.all_reduce(loss)
    return {
        "loss": float((loss - expected_loss).abs() / expected_loss),
        "gradients": errors(found, expected),
        "parameters": len(list(reference.parameters())),
    }


def main(out: Path) -> None:
    launch = read_launch()
    config = load_config(OVERRIDES)
    with process_group(config.parallel, launch, choose_device(config.parallel, launch)):
        seen = {
            "fp64": {variant: compare(variant, torch.float64, launch) for variant in VARIANTS},
            "fp32": {variant: compare(variant, torch.float32, launch) for variant in IN_FP32},
        }
        if launch.is_first:
            out.write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    end_process(0)
