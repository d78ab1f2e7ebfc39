"""The kinds of block a predictor is built from: S, T (attention) and H (HOPE).

Every block maps (x, state) to (x, state, trace) and keeps nothing: `None` as state means a fresh clip.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Attention, KeyValueCache
from .cms import ContinuumMemory
from .schema import ModelConfig
from .spatial_mixing import SpatialMixing
from .titan import FastWeights, MemoryTrace, TitanMemory

BlockState = FastWeights | KeyValueCache | None

MAX_BRANCHES = 3
"""Residual branches of a block; each has its own drop-path draw."""


class AttentionBlock(nn.Module):
    """Pre-norm attention and MLP: S within each frame, T over all frames up to the query's."""

    def __init__(self, config: ModelConfig, kind: Literal["S", "T"], drop_rate: float) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        hidden = round(config.attention.mlp_multiplier * config.width)
        self.norm1 = nn.LayerNorm(config.width)
        scope = "frame" if kind == "S" else "clip"
        self.attention = Attention(config.width, config.attention.heads, config.grid, scope)
        self.norm2 = nn.LayerNorm(config.width)
        self.fc1 = nn.Linear(config.width, hidden)
        self.fc2 = nn.Linear(hidden, config.width)

    def forward(
        self,
        x: Float[Tensor, "batch frames tokens width"],
        state: KeyValueCache | None = None,
        draws: Float[Tensor, "batch branches"] | None = None,
        *,
        frame_offset: int = 0,
        writes: bool = True,
        keep_state: bool = False,
    ) -> tuple[Tensor, KeyValueCache | None, None]:
        """Apply the block; `writes` is for H blocks and changes nothing here."""
        del writes
        attended, state = self.attention(self.norm1(x), state, frame_offset=frame_offset, keep_state=keep_state)
        x = x + drop_path(attended, draws, 0, self.drop_rate)
        x = x + drop_path(self.fc2(F.gelu(self.fc1(self.norm2(x)))), draws, 1, self.drop_rate)
        return x, state, None


class HopeBlock(nn.Module):
    """Titan memories, then CMS, then (optionally) mixing over a frame's tokens, each pre-norm and residual."""

    def __init__(self, config: ModelConfig, drop_rate: float) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.norm1 = nn.LayerNorm(config.width)
        self.memory = TitanMemory(config.memory, config.width)
        self.norm2 = nn.LayerNorm(config.width) if config.cms.levels else None
        self.cms = ContinuumMemory(config.cms, config.width) if config.cms.levels else None
        self.norm3 = nn.LayerNorm(config.width) if config.spatial_mixing else None
        self.spatial_mixing = SpatialMixing(config.num_tokens) if config.spatial_mixing else None

    def forward(
        self,
        x: Float[Tensor, "batch frames tokens width"],
        state: FastWeights | None = None,
        draws: Float[Tensor, "batch branches"] | None = None,
        *,
        frame_offset: int = 0,
        writes: bool = True,
        keep_state: bool = False,
    ) -> tuple[Tensor, FastWeights | None, MemoryTrace]:
        """Apply the block to consecutive frames, the first of which has number `frame_offset` in its clip."""
        recalled, state, trace = self.memory(self.norm1(x), state, writes=writes, keep_state=keep_state)
        x = x + drop_path(recalled, draws, 0, self.drop_rate)
        if self.norm2 is not None and self.cms is not None:
            x = x + drop_path(self.cms(self.norm2(x), frame_offset), draws, 1, self.drop_rate)
        if self.norm3 is not None and self.spatial_mixing is not None:
            x = x + drop_path(self.spatial_mixing(self.norm3(x)), draws, 2, self.drop_rate)
        return x, state, trace


def drop_path(
    branch: Float[Tensor, "batch frames tokens width"],
    draws: Float[Tensor, "batch branches"] | None,
    number: int,
    rate: float,
) -> Float[Tensor, "batch frames tokens width"]:
    """Drop a residual branch for the clips whose draw in [0, 1) is below `rate`; scale the others to keep the mean.

    The draws come in from outside, so that they depend on a clip's place in the global batch and on nothing else.
    """
    if draws is None or rate == 0:
        return branch
    kept = torch.where(draws[:, number] >= rate, 1 / (1 - rate), 0.0)
    return branch * kept.to(branch.dtype)[:, None, None, None]


def build_block(config: ModelConfig, kind: str, drop_rate: float) -> AttentionBlock | HopeBlock:
    """The block of one letter of `model.block_pattern`."""
    if kind == "H":
        return HopeBlock(config, drop_rate)
    return AttentionBlock(config, "S" if kind == "S" else "T", drop_rate)
