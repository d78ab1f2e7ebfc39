"""Ten steps on features of the scale of V-JEPA 2, whose heavy tails are what recurrent writes have to survive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hopescale.model.init import initialise
from hopescale.model.objective import clip_losses
from hopescale.model.objective_schema import ObjectiveConfig
from hopescale.model.predictor import HopePredictor
from hopescale.model.schema import ModelConfig
from hopescale.optim.m3 import M3
from hopescale.optim.routing import parameter_groups
from hopescale.optim.schema import OptimizerConfig

STEPS, CLIPS, FRAMES, GRID, CHANNELS = 10, 2, 8, (3, 3), 16
SPREAD, EXTREME, COSINE = 3.2, 43.0, 0.87

MODEL: dict[str, Any] = {
    "encoder_dim": CHANNELS,
    "grid": GRID,
    "frames": FRAMES,
    "state_dim": 2,
    "width": 24,
    "attention": {"heads": 2},
    "spatial_mixing": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "five deep": {"block_pattern": "HHHHH"},
    "five deep, second order": {"block_pattern": "HHHHH", "memory": {"meta_grad": "so"}},
    "first order": {"block_pattern": "SHHS", "memory": {"meta_grad": "fo"}},
    "large steps, loose limit": {"block_pattern": "SHHS", "memory": {"eta_max": 600.0, "write_limit": 0.5, "heads": 4}},
    "momentum, scan": {"block_pattern": "HTH", "memory": {"momentum": 0.9, "chunk_rule": "scan"}},
    "token by token": {"block_pattern": "HTH", "memory": {"chunk_rule": "token_exact"}},
    "cut, gated": {"block_pattern": "HSH", "memory": {"detach_interval": 1, "surprise_gate": 0.002}},
    "all kept": {"block_pattern": "HSH", "memory": {"retention": False}},
    "whole frames, unified": {"block_pattern": "SUU", "output": "absolute"},
}


def features(step: int) -> Tensor:
    """Frames of a spread of 3.2 that reach 43 either way, resemble each other, and share a template of places."""
    generator = torch.Generator().manual_seed(step)
    number = GRID[0] * GRID[1]

    def heavy(*shape: int) -> Tensor:
        # A normal over the root of a mean of squares of five others: Student's t.
        tails = torch.randn(*shape, 5, generator=generator).square().mean(-1).sqrt()
        return torch.randn(shape, generator=generator) / tails

    template = torch.randn(1, 1, number, CHANNELS, generator=torch.Generator().manual_seed(99))
    still, moving = heavy(CLIPS, 1, number, CHANNELS), heavy(CLIPS, FRAMES, number, CHANNELS)
    frames = 1.5 * template + COSINE**0.5 * still + (1 - COSINE) ** 0.5 * moving
    frames = (SPREAD / frames.std() * frames).clamp(-EXTREME, EXTREME)
    # One token of one clip holds both extremes of the data.
    frames[0, 2, 4, 0], frames[0, 2, 4, 1] = EXTREME, -EXTREME
    return frames


def test_features_are_of_the_published_scale() -> None:
    drawn = torch.cat([features(step) for step in range(STEPS)])
    assert drawn.std().item() == pytest.approx(SPREAD, rel=0.1)
    assert (drawn.amin().item(), drawn.amax().item()) == (-EXTREME, EXTREME)
    kurtosis = ((drawn - drawn.mean()) / drawn.std()).pow(4).mean()
    assert kurtosis > 4
    flat = drawn.flatten(2)
    cosine = torch.cosine_similarity(flat[:, 1:], flat[:, :-1], dim=-1).mean()
    assert 0.8 < cosine < 0.95


@pytest.mark.parametrize(("precision", "variant"), [*(("fp32", name) for name in VARIANTS), ("bf16", "five deep")])
def test_ten_steps_stay_finite_and_gradients_of_a_size(precision: str, variant: str) -> None:
    chosen = VARIANTS[variant]
    fields = MODEL | chosen | {"block_pattern": tuple(chosen["block_pattern"])}
    model = HopePredictor(ModelConfig.model_validate(fields))
    initialise(model, seed=0)
    config = OptimizerConfig.model_validate({"lr": 6e-3})
    optimizer = M3(parameter_groups(model.named_parameters(), config), config)
    losses, lengths = [], torch.tensor([FRAMES, FRAMES - 2])
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(100 + step)
        actions, states = (torch.randn(CLIPS, n, 2, generator=generator) for n in (FRAMES - 1, FRAMES))
        target = torch.tensor([7, 5])
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            found = clip_losses(
                model, ObjectiveConfig(), features(step), actions, states, lengths, torch.ones(CLIPS), target, None
            )
        total = found.teacher / (lengths - 1).sum() + found.jump / CLIPS
        total.backward()
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        # Earlier code grew by a factor of 1e5 a block here.
        assert torch.stack(norms).norm() < 1e3
        for trace in found.traces:
            assert ((trace.norm_ratio > 0.01) & (trace.norm_ratio < 10)).all()
            assert ((trace.retention > 0) & (trace.retention <= 1)).all()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert max(losses) < 1.2 * losses[0]
