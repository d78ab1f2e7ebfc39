"""The device mesh: how ranks are arranged."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def build_mesh(device: torch.device, world_size: int) -> DeviceMesh:
    """A one-axis mesh named "shard" over all ranks, on an explicitly named device type (CPU too)."""
    return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
