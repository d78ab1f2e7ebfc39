"""The kinds of block a predictor is built from: S, T (attention), H (HOPE) and U (attention and HOPE in one).

Every block maps (x, state) to (x, state, trace) and keeps nothing: `None` as state means a fresh clip.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Attention, KeyValueCache
from .cms import ContinuumMemory
from .cms_online import OnlineMemory, OnlineState
from .compact_titan import CompactTitan
from .schema import ModelConfig
from .spatial_mixing import SpatialMixing
from .titan import FastWeights, MemoryTrace, TitanMemory


class HopeState(NamedTuple):
    """What an H or U block carries on within a clip."""

    memory: FastWeights
    cms: OnlineState | None = None
    """None unless the levels learn within a clip."""
    attention: KeyValueCache | None = None
    """Of a U block."""


BlockState = HopeState | KeyValueCache | None

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
        consolidate: Float[Tensor, "batch frames"] | None = None,
        auxiliary: Float[Tensor, "batch frames"] | None = None,
    ) -> tuple[Tensor, KeyValueCache | None, None]:
        """Apply the block; `writes`, `consolidate` and `auxiliary` are for blocks with memories and change nothing."""
        del writes, consolidate, auxiliary
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
        self.memory = TitanMemory(config.memory, config.width, config.longterm)
        self.norm2 = nn.LayerNorm(config.width) if config.cms.levels else None
        self.cms = build_cms(config) if config.cms.levels else None
        self.norm3 = nn.LayerNorm(config.width) if config.spatial_mixing else None
        self.spatial_mixing = SpatialMixing(config.num_tokens) if config.spatial_mixing else None

    def forward(
        self,
        x: Float[Tensor, "batch frames tokens width"],
        state: HopeState | None = None,
        draws: Float[Tensor, "batch branches"] | None = None,
        *,
        frame_offset: int = 0,
        writes: bool = True,
        keep_state: bool = False,
        consolidate: Float[Tensor, "batch frames"] | None = None,
        auxiliary: Float[Tensor, "batch frames"] | None = None,
    ) -> tuple[Tensor, HopeState | None, MemoryTrace]:
        """Apply the block to consecutive frames, the first of which has number `frame_offset` in its clip."""
        fast, levels = (None, None) if state is None else (state.memory, state.cms)
        recalled, fast, trace = self.memory(
            self.norm1(x),
            fast,
            writes=writes,
            keep_state=keep_state,
            consolidate=consolidate,
            auxiliary=auxiliary,
        )
        x = x + drop_path(recalled, draws, 0, self.drop_rate)
        if self.norm2 is not None and self.cms is not None:
            z, levels, ratios = apply_cms(self.cms, self.norm2(x), levels, frame_offset, keep_state)
            trace = trace._replace(level_ratio=ratios)
            x = x + drop_path(z, draws, 1, self.drop_rate)
        if self.norm3 is not None and self.spatial_mixing is not None:
            x = x + drop_path(self.spatial_mixing(self.norm3(x)), draws, 2, self.drop_rate)
        return x, None if fast is None else HopeState(fast, levels), trace


class UnifiedBlock(nn.Module):
    """Attention over all frames, then a single memory, then CMS, each pre-norm and residual."""

    def __init__(self, config: ModelConfig, drop_rate: float) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config.width, config.attention.heads, config.grid, "clip")
        self.norm2 = nn.LayerNorm(config.width)
        self.memory = CompactTitan(config.memory, config.width, config.longterm)
        self.norm3 = nn.LayerNorm(config.width) if config.cms.levels else None
        self.cms = build_cms(config) if config.cms.levels else None

    def forward(
        self,
        x: Float[Tensor, "batch frames tokens width"],
        state: HopeState | None = None,
        draws: Float[Tensor, "batch branches"] | None = None,
        *,
        frame_offset: int = 0,
        writes: bool = True,
        keep_state: bool = False,
        consolidate: Float[Tensor, "batch frames"] | None = None,
        auxiliary: Float[Tensor, "batch frames"] | None = None,
    ) -> tuple[Tensor, HopeState | None, MemoryTrace]:
        """Apply the block to consecutive frames, the first of which has number `frame_offset` in its clip."""
        fast, levels, cache = (None, None, None) if state is None else state
        attended, cache = self.attention(self.norm1(x), cache, frame_offset=frame_offset, keep_state=keep_state)
        x = x + drop_path(attended, draws, 0, self.drop_rate)
        recalled, fast, trace = self.memory(
            self.norm2(x),
            fast,
            writes=writes,
            keep_state=keep_state,
            consolidate=consolidate,
            auxiliary=auxiliary,
        )
        x = x + drop_path(recalled, draws, 1, self.drop_rate)
        if self.norm3 is not None and self.cms is not None:
            z, levels, ratios = apply_cms(self.cms, self.norm3(x), levels, frame_offset, keep_state)
            trace = trace._replace(level_ratio=ratios)
            x = x + drop_path(z, draws, 2, self.drop_rate)
        return x, None if fast is None else HopeState(fast, levels, cache), trace


def apply_cms(
    cms: ContinuumMemory | OnlineMemory,
    z: Float[Tensor, "batch frames tokens width"],
    state: OnlineState | None,
    frame_offset: int,
    keep_state: bool,
) -> tuple[Float[Tensor, "batch frames tokens width"], OnlineState | None, Float[Tensor, "batch frames levels"]]:
    """All levels, what a clip has made of them if they learn within it, and how much each adds (`added_ratio`)."""
    if isinstance(cms, OnlineMemory):
        z, state, ratios = cms.traced(z, state, frame_offset=frame_offset, keep_state=keep_state)
    else:
        z, ratios = cms.traced(z, frame_offset)
    return z, state, torch.stack(ratios, dim=-1)


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


def build_cms(config: ModelConfig) -> ContinuumMemory | OnlineMemory:
    """The CMS of `model.cms.mode`."""
    if config.cms.mode == "online":
        return OnlineMemory(config.cms, config.width, config.max_frames)
    return ContinuumMemory(config.cms, config.width)


def build_block(config: ModelConfig, kind: str, drop_rate: float) -> AttentionBlock | HopeBlock | UnifiedBlock:
    """The block of one letter of `model.block_pattern`."""
    if kind == "H":
        return HopeBlock(config, drop_rate)
    if kind == "U":
        return UnifiedBlock(config, drop_rate)
    return AttentionBlock(config, "S" if kind == "S" else "T", drop_rate)
