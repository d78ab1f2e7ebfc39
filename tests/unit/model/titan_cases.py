"""Memories and tokens for tests: double precision, and weights large enough for every term of a write to matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hopescale.model.init import initialise
from hopescale.model.schema import MemoryConfig
from hopescale.model.titan import TitanMemory

UNLIMITED = 1e9


def memory(width: int = 6, seed: int = 5, **fields: Any) -> TitanMemory:
    """A memory in double precision, nothing of which is small."""
    built = TitanMemory(MemoryConfig.model_validate(fields), width).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * noise if "norm_weight" in name else 0.4 * noise)
    return built


def fresh(width: int, **fields: Any) -> TitanMemory:
    """A memory as training starts with it."""
    titan = TitanMemory(MemoryConfig.model_validate(fields), width)
    # Initial weights go by the names that parameters have in a predictor.
    initialise(nn.ModuleDict({"block": nn.ModuleDict({"memory": titan})}), seed=0)
    return titan


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Standard normal numbers in double precision."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated_frames(batch: int, frames: int, number: int, width: int) -> Tensor:
    """Layer-normalised frames that resemble each other (cosine about 0.87), as frames of a video do."""
    generator = torch.Generator().manual_seed(4)
    still = torch.randn(batch, 1, number, width, generator=generator)
    moving = torch.randn(batch, frames, number, width, generator=generator)
    return F.layer_norm(0.87**0.5 * still + 0.13**0.5 * moving, (width,))


def gradients(titan: TitanMemory, loss: Tensor, *others: Tensor) -> dict[str, Tensor]:
    """Of all parameters by name, then of `others` by number; zeros where the loss does not depend on one."""
    named = dict(titan.named_parameters()) | {str(number): other for number, other in enumerate(others)}
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))
