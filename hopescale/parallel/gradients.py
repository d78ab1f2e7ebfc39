"""Gradient norms and clipping over sharded gradients, and figures of this rank's pieces."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from hopescale.optim.schema import ClipConfig
from hopescale.optim.state import local


def group_norms(groups: list[dict[str, Any]], shard_group: dist.ProcessGroup | None = None) -> Tensor:
    """Norm of the whole, unsharded gradient of each optimizer group: fp64 [groups], one all-reduce for all.

    Args:
        groups: of the optimizer.
        shard_group: ranks that hold one copy of the gradients between them; None where each holds all.
    """
    total = torch.stack([_sum_of_squares(group, _gradients(group)) for group in groups])
    if shard_group is not None:
        dist.all_reduce(total, group=shard_group)
    return total.sqrt()


def clip_gradients(groups: list[dict[str, Any]], norms: Tensor, config: ClipConfig) -> None:
    """Scale gradients in place so that each group's norm (or their joint norm) is at most `max_norm`."""
    if config.mode == "none":
        return
    joint = norms.square().sum().sqrt().expand_as(norms)
    measured = norms if config.mode == "per_group" else joint
    factors = (config.max_norm / measured.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1.0)
    for group, factor in zip(groups, factors, strict=True):
        gradients = _gradients(group)
        if gradients:
            torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))


def parameter_squares(groups: list[dict[str, Any]]) -> Float[Tensor, " groups"]:
    """Sum of the squares of this rank's pieces of each group's parameters, in fp64."""
    return torch.stack([_sum_of_squares(group, [local(p) for p in group["params"]]) for group in groups])


def dead_numbers(groups: list[dict[str, Any]]) -> Int[Tensor, " groups"]:
    """How many numbers of this rank's pieces of each group have no gradient, or one of exactly 0."""
    alive = [[torch.count_nonzero(gradient) for gradient in _gradients(group)] for group in groups]
    none = _zero(groups[0]).long()
    sizes = [local_size(group) for group in groups]
    return torch.stack([size - torch.stack([none, *each]).sum() for size, each in zip(sizes, alive, strict=True)])


def local_size(group: dict[str, Any]) -> int:
    """Numbers in this rank's pieces of a group's parameters."""
    return sum(local(p).numel() for p in group["params"])


def _gradients(group: dict[str, Any]) -> list[Tensor]:
    return [local(p.grad) for p in group["params"] if p.grad is not None]


def _sum_of_squares(group: dict[str, Any], tensors: list[Tensor]) -> Tensor:
    each = torch._foreach_norm(tensors, 2, dtype=torch.float64) if tensors else []
    return torch.stack([*each, _zero(group)]).square().sum()


def _zero(group: dict[str, Any]) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=local(group["params"][0]).device)
