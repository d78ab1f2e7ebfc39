"""Gradient norms and clipping over sharded gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hopescale.optim.schema import ClipConfig


def group_norms(groups: list[dict[str, Any]]) -> Tensor:
    """Norm of the whole, unsharded gradient of each optimizer group: fp64 [groups], one all-reduce for all."""
    norms = []
    for group in groups:
        gradients = [_local(p.grad) for p in group["params"] if p.grad is not None]
        device = _local(group["params"][0]).device
        each = torch._foreach_norm(gradients, 2, dtype=torch.float64) if gradients else []
        norms.append(torch.stack([*each, torch.zeros((), dtype=torch.float64, device=device)]).square().sum())
    total = torch.stack(norms)
    if dist.is_initialized() and _is_sharded(groups):
        dist.all_reduce(total)
    return total.sqrt()


def clip_gradients(groups: list[dict[str, Any]], norms: Tensor, config: ClipConfig) -> None:
    """Scale gradients in place so that each group's norm (or their joint norm) is at most `max_norm`."""
    if config.mode == "none":
        return
    joint = norms.square().sum().sqrt().expand_as(norms)
    measured = norms if config.mode == "per_group" else joint
    factors = (config.max_norm / measured.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1.0)
    for group, factor in zip(groups, factors, strict=True):
        gradients = [_local(p.grad) for p in group["params"] if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))


def _is_sharded(groups: list[dict[str, Any]]) -> bool:
    return any(isinstance(p, DTensor) for group in groups for p in group["params"])


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
