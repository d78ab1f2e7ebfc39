"""A predictor small enough for a test, with every kind of block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hopescale.model.init import initialise
from hopescale.model.predictor import HopePredictor
from hopescale.model.schema import ModelConfig

SMALL: dict[str, Any] = {
    "encoder_dim": 10,
    "grid": (2, 3),
    "frames": 5,
    "action_dim": 3,
    "state_dim": 2,
    "width": 24,
    "block_pattern": ("S", "H", "T", "H"),
    "memory": {"heads": 2, "hidden_multiplier": 1.5},
    "cms": {"levels": [{"period": 1, "hidden_multiplier": 2.0}, {"period": 2, "hidden_multiplier": 1.0}]},
    "attention": {"heads": 2, "mlp_multiplier": 2.0},
    "spatial_mixing": True,
}


@pytest.fixture
def small_config() -> Callable[..., ModelConfig]:
    """The small configuration with some fields set otherwise."""
    return lambda **fields: ModelConfig.model_validate(SMALL | fields)


@pytest.fixture
def small_predictor(small_config: Callable[..., ModelConfig]) -> Callable[..., HopePredictor]:
    """An initialised small predictor whose zero-initialised parameters are moved away from zero."""

    def build(**fields: Any) -> HopePredictor:
        model = HopePredictor(small_config(**fields))
        initialise(model, seed=3)
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        return model

    return build


@pytest.fixture
def small_input() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Features, actions and states of `frames` frames of `batch` clips, for the small configuration."""

    def draw(batch: int = 2, frames: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = (batch, frames, 6, 10), (batch, frames, 3), (batch, frames, 2)
        features, actions, states = (torch.randn(shape, generator=generator) for shape in shapes)
        return features, actions, states

    return draw
