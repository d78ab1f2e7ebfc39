"""The device mesh: how ranks are arranged, and how many hold one copy of the model between them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hopescale.errors import ConfigError, Problem

from .schema import ParallelConfig

COPIES, SHARDS = "replicate", "shard"


class Degrees(NamedTuple):
    """Ranks along both axes."""

    replicate: int
    """Copies of the model."""
    shard: int
    """Ranks that hold one copy between them."""


def degrees_of(config: ParallelConfig, world_size: int) -> Degrees:
    """How `parallel.shard` and `parallel.replicate` arrange some ranks.

    Raises:
        ConfigError: they do not divide the ranks.
    """
    if config.engine == "ddp":
        return Degrees(world_size, 1)
    if config.engine == "deepspeed":
        return Degrees(1, world_size) if config.zero_stage else Degrees(world_size, 1)
    shard, replicate = config.shard, config.replicate
    if shard is None and replicate is None:
        return Degrees(1, world_size)
    field, given = ("parallel.shard", shard) if replicate is None else ("parallel.replicate", replicate)
    both = (shard or 1) * (replicate or 1)
    if world_size % both or (shard is not None and replicate is not None and both != world_size):
        if shard is not None and replicate is not None:
            rule = f"with parallel.shard={shard} arranges {both} ranks, and there are {world_size}"
            fix = "set parallel.replicate=null, to have as many as there are ranks for"
            fix = fix if world_size % shard == 0 else f"{fix}; {shard} must divide the ranks"
            raise ConfigError(Problem(field, given, rule, fix))
        rule = f"must divide the number of ranks, {world_size}"
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        fix = f"set it to one of {', '.join(map(str, divisors))}, or start other ranks"
        raise ConfigError(Problem(field, given, rule, fix))
    if replicate is None:
        return Degrees(world_size // both, both)
    return Degrees(replicate, world_size // replicate)


def build_mesh(device: torch.device, degrees: Degrees) -> DeviceMesh:
    """A mesh over all ranks, on an explicitly named device type (CPU too).

    One axis, `shard` or `replicate`, where the other has one rank; else both, shards varying fastest, so that the ranks
    of a node hold one copy where they are enough.
    """
    if degrees.replicate == 1:
        return init_device_mesh(device.type, (degrees.shard,), mesh_dim_names=(SHARDS,))
    if degrees.shard == 1:
        return init_device_mesh(device.type, (degrees.replicate,), mesh_dim_names=(COPIES,))
    return init_device_mesh(device.type, tuple(degrees), mesh_dim_names=(COPIES, SHARDS))
