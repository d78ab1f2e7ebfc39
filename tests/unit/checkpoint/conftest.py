"""A small model with an optimizer that has taken steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from hopescale.optim.m3 import M3
from hopescale.optim.schema import OptimizerConfig


class Pair(nn.Module):
    """A matrix for M3 and, of odd sizes, a stack, a vector and a scalar for AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(6, 4))
        self.stack = nn.Parameter(torch.zeros(2, 3, 5))
        self.vector = nn.Parameter(torch.zeros(7))
        self.scalar = nn.Parameter(torch.zeros(()))


@pytest.fixture
def trained() -> Callable[[int], tuple[nn.Module, M3]]:
    """Model and optimizer after two steps of random gradients from a seed."""

    def build(seed: int) -> tuple[nn.Module, M3]:
        levels = [{"period": 1}, {"period": 8}]
        model, config = Pair(), OptimizerConfig.model_validate({"levels": levels})
        generator = torch.Generator().manual_seed(seed)
        names = [name for name, _ in model.named_parameters() if name != "matrix"]
        optimizer = M3(
            [
                {"name": "m3", "params": [model.matrix], "param_names": ["matrix"], "algorithm": "m3"},
                {
                    "name": "adamw",
                    "params": [getattr(model, name) for name in names],
                    "param_names": names,
                    "algorithm": "adamw",
                },
            ],
            config,
        )
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        return model, optimizer

    return build
