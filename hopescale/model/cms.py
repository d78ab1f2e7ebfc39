"""Continuum Memory System: a chain of residual MLPs, each with its own pace (Nested Learning, Eq. 70-75)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .precision import at_least_fp32
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
    """Levels applied in order.

    frame_mask: level l touches only the frames whose number is a multiple of its period. param_period: every level
    touches every frame, and its period is the optimizer's business (`CmsConfig.parameter_periods`).
    """

    def __init__(self, config: CmsConfig, width: int) -> None:
        super().__init__()
        self.periods = config.frame_periods
        self.levels = nn.ModuleList(CmsLayer(width, round(level.hidden_multiplier * width)) for level in config.levels)

    def forward(
        self, z: Float[Tensor, "batch frames tokens width"], frame_offset: int = 0
    ) -> Float[Tensor, "batch frames tokens width"]:
        """Apply the active levels.

        Args:
            z: tokens of consecutive frames.
            frame_offset: number in the clip of the first of them, so that a rollout fed frame by frame keeps the pace.
        """
        return self.traced(z, frame_offset)[0]

    def traced(
        self, z: Float[Tensor, "batch frames tokens width"], frame_offset: int = 0
    ) -> tuple[Float[Tensor, "batch frames tokens width"], list[Float[Tensor, "batch frames"]]]:
        """The same, and each level's `added_ratio`, 0 for frames it passes by."""
        ratios = []
        for period, level in zip(self.periods, self.levels, strict=True):
            first, ratio = -frame_offset % period, at_least_fp32(z.new_zeros(z.shape[:2]))
            if first < z.shape[1]:
                before = z[:, first::period]
                after = level(before)
                z = after if period == 1 else _scatter(z, after, first, period)
                ratio = _scatter(ratio, added_ratio(before, after), first, period)
            ratios.append(ratio)
        return z, ratios

    def active_levels(self, num_frames: int, frame_offset: int = 0) -> list[list[bool]]:
        """Which level touches which frame: one row a level, one column a frame."""
        return [[(frame_offset + t) % p == 0 for t in range(num_frames)] for p in self.periods]


@torch.no_grad()
def added_ratio(
    before: Float[Tensor, "batch frames tokens width"], after: Float[Tensor, "batch frames tokens width"]
) -> Float[Tensor, "batch frames"]:
    """Norm of what was added to a frame's tokens over their norm before."""
    return _frame_norm(after - before) / _frame_norm(before)


def _frame_norm(z: Float[Tensor, "batch frames tokens width"]) -> Float[Tensor, "batch frames"]:
    return torch.linalg.vector_norm(at_least_fp32(z), dim=(-2, -1))


def _scatter(z: Tensor, part: Tensor, first: int, period: int) -> Tensor:
    """Replace every period-th frame from the first on."""
    return torch.slice_scatter(z, part, dim=1, start=first, end=z.shape[1], step=period)
