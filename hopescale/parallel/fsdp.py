"""FSDP2, HSDP and replicas: every block is one unit, the rest of the model the last."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard

from .mesh import SHARDS
from .schema import ParallelConfig


def shard_model(model: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, config: ParallelConfig) -> None:
    """Spread a model over a mesh in place, `blocks` first.

    Parameters become DTensors: sharded over the axis of shards, replicated over that of copies. Gradients are summed
    over ranks, not averaged: losses are already divided by the size of the global batch, so ranks with fewer clips need
    no correction.
    """
    names = mesh.mesh_dim_names or ()
    for module in (*blocks, model):
        # FSDP2 would shard over a mesh of one axis whatever its name.
        if config.engine == "ddp" or SHARDS not in names:
            replicate(module, mesh=mesh)
        else:
            degree = mesh.size(names.index(SHARDS))
            _shard(module, mesh, degree, config.reshard_after_forward and module is not model)
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_gradient_divide_factor(1.0)
    if config.prefetch:
        _prefetch([block for block in blocks if isinstance(block, FSDPModule)], config.prefetch)


def _shard(module: nn.Module, mesh: DeviceMesh, degree: int, reshard_after_forward: bool) -> None:
    fully_shard(
        module,
        mesh=mesh,
        # Freeing the root after forward would only gather it again at once for backward.
        reshard_after_forward=reshard_after_forward,
        shard_placement_fn=lambda parameter: Shard(shard_dim(tuple(parameter.shape), degree)),
    )


def _prefetch(blocks: Sequence[FSDPModule], ahead: int) -> None:
    for place, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(list(blocks[place + 1 : place + 1 + ahead]))
        block.set_modules_to_backward_prefetch(list(reversed(blocks[max(0, place - ahead) : place])))


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
