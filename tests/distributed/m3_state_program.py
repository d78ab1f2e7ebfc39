"""Run by torchrun: a sharded model takes steps, is saved or loaded by torch's DCP, and takes more."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from hopescale.optim.m3 import M3
from hopescale.optim.schema import OptimizerConfig
from hopescale.parallel.fsdp import shard_dim
from hopescale.parallel.process_group import end_process
from tests.sharded import whole

BEFORE, AFTER = 5, 6
LEVELS = [{"period": 1, "eta": 0.9, "theta": 0.1}, {"period": 3, "eta": 0.8, "theta": 0.2}]


class Model(nn.Module):
    """Matrices of every kind of placement, a stack, and vectors that do not divide."""

    def __init__(self) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(0)
        self.tall = nn.Parameter(torch.randn(24, 12, generator=drawn))
        self.wide = nn.Parameter(torch.randn(12, 24, generator=drawn))
        self.uneven = nn.Parameter(torch.randn(18, 9, generator=drawn))
        self.stack = nn.Parameter(torch.randn(3, 8, 16, generator=drawn))
        self.vector = nn.Parameter(torch.randn(7, generator=drawn))
        self.scale = nn.Parameter(torch.randn(1, generator=drawn))

    def forward(self, x: Tensor) -> Tensor:
        """A number with gradients of full rank in every matrix: x [32, 12].

        Newton-Schulz lifts the directions that a gradient leaves out, and with them rounding.
        """
        hidden = torch.tanh(0.3 * x @ self.tall.T) @ self.wide.T
        matrices = hidden.square().mean() + self.uneven.sin().mean() + self.stack.sin().mean()
        return (matrices * self.scale + self.vector.square().mean()).sum()


def build(mesh_shape: list[int]) -> tuple[Model, M3]:
    names = ("replicate", "shard") if len(mesh_shape) > 1 else ("shard",)
    mesh, model = init_device_mesh("cpu", tuple(mesh_shape), mesh_dim_names=names), Model()
    degree = mesh_shape[-1]
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(shard_dim(tuple(p.shape), degree)))
    named = dict(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"name": "matrices", "algorithm": "m3", "param_names": ["tall", "wide"]},
        {"name": "slow", "algorithm": "m3", "param_names": ["uneven", "stack"], "period": 4},
        {"name": "vectors", "algorithm": "adamw", "param_names": ["vector", "scale"], "betas": (0.8, 0.9)},
    ]
    for group in groups:
        group["params"] = [named[name] for name in group["param_names"]]
    config = OptimizerConfig.model_validate({"lr": 0.02, "levels": LEVELS, "newton_schulz": {"precision": "fp32"}})
    return model, M3(groups, config)


def train(model: Model, optimizer: M3, first: int, count: int) -> None:
    """Steps on the same numbers on every rank, so that any number of ranks has the same gradient."""
    for step in range(first, first + count):
        loss = model(torch.randn(32, 12, generator=torch.Generator().manual_seed(100 + step)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main(action: str, folder: Path, mesh: str, out: Path) -> None:
    dist.init_process_group("gloo")
    model, optimizer = build([int(size) for size in mesh.split("x")])
    if action == "save":
        before = get_state_dict(model, optimizer)
        assert len(before[1]["state"]) == len(list(model.parameters())), "state exists before the first step"
        train(model, optimizer, 0, BEFORE)
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state}
    if action == "save":
        dcp.save(saved, checkpoint_id=folder)
    else:
        dcp.load(saved, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    train(model, optimizer, BEFORE, AFTER)
    found = {name: whole(p.detach()) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        found |= {f"{name}.{key}": whole(value) for key, value in optimizer.state[parameter].items()}
    found["num_steps"] = torch.tensor([group["num_steps"] for group in optimizer.param_groups])
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
    end_process(0)
