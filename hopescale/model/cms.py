"""Continuum Memory System: a chain of residual MLPs, each with its own pace (Nested Learning, Eq. 70-75)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .schema import CmsConfig


class CmsLayer(nn.Module):
    """One level: z + fc2(GELU(fc1(LayerNorm z)))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, z: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Apply the level."""
        return z + self.fc2(F.gelu(self.fc1(self.norm(z))))


class ContinuumMemory(nn.Module):
    """Levels applied in order; level l touches only the frames whose number is a multiple of its period."""

    def __init__(self, config: CmsConfig, width: int) -> None:
        super().__init__()
        self.periods = tuple(level.period for level in config.levels)
        self.levels = nn.ModuleList(CmsLayer(width, round(level.hidden_multiplier * width)) for level in config.levels)

    def forward(
        self, z: Float[Tensor, "batch frames tokens width"], frame_offset: int = 0
    ) -> Float[Tensor, "batch frames tokens width"]:
        """Apply the active levels.

        Args:
            z: tokens of consecutive frames.
            frame_offset: number in the clip of the first of them, so that a rollout fed frame by frame keeps the pace.
        """
        for period, level in zip(self.periods, self.levels, strict=True):
            first = -frame_offset % period
            if first >= z.shape[1]:
                continue
            if period == 1:
                z = level(z)
            else:
                z = torch.slice_scatter(z, level(z[:, first::period]), dim=1, start=first, end=z.shape[1], step=period)
        return z

    def active_levels(self, num_frames: int, frame_offset: int = 0) -> list[list[bool]]:
        """Which level touches which frame: one row a level, one column a frame."""
        return [[(frame_offset + t) % p == 0 for t in range(num_frames)] for p in self.periods]
