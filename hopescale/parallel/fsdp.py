"""FSDP2: every block is one unit, the rest of the model the last."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard


def shard_model(
    model: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, *, reshard_after_forward: bool
) -> None:
    """Shard a model in place, `blocks` first.

    Gradients are summed over ranks, not averaged: losses are already divided by the size of the global batch, so
    ranks with fewer clips need no correction.
    """
    degree = mesh.size()
    for module in (*blocks, model):
        fully_shard(
            module,
            mesh=mesh,
            # Freeing the root after forward would only gather it again at once for backward.
            reshard_after_forward=reshard_after_forward and module is not model,
            shard_placement_fn=lambda parameter: Shard(shard_dim(tuple(parameter.shape), degree)),
        )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def shard_dim(shape: tuple[int, ...], degree: int) -> int:
    """The dim a parameter is sharded on.

    The longest of the two matrix dims that divides evenly, so that Newton-Schulz can work on shards; else a leading dim
    that does; else dim 0, the only one FSDP2 shards unevenly.
    """
    even = [dim for dim, size in enumerate(shape) if size % degree == 0 and size >= degree]
    matrix = [dim for dim in even if dim >= len(shape) - 2]
    return max(matrix or even, key=lambda dim: (shape[dim], -dim), default=0)


def free_gathered(model: nn.Module) -> None:
    """Free what a forward without backward leaves gathered, so that all parameters are sharded again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def reduce_gradients_in_backward(model: nn.Module, reduce: bool) -> None:
    """Whether the next backward reduces gradients over ranks, or only adds them up on this one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(reduce)
