"""The HOPE predictor: frames and actions in, next frames out, all in the encoder's embedding space."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from .block import BlockState, build_block
from .schema import ModelConfig
from .titan import MemoryTrace

FEATURE_NORM_EPS = 1e-6
POSITION_SCALE = 0.5


class Prediction(NamedTuple):
    """One pass of the predictor."""

    frames: Float[Tensor, "batch frames patches channels"]
    """For every input frame the frame after it (or the jump's target), layer-normalised over channels."""
    state: tuple[BlockState, ...] | None
    """What the blocks carry on to the next frames, one entry a block; None unless kept."""
    traces: tuple[MemoryTrace, ...]
    """Figures of the memory writes, one entry an H block."""


def normalise(features: Float[Tensor, "*lead channels"]) -> Float[Tensor, "*lead channels"]:
    """LayerNorm over channels without parameters, in fp32: the scale on which errors are measured."""
    return F.layer_norm(features.float(), features.shape[-1:], eps=FEATURE_NORM_EPS)


def sincos_positions(grid: tuple[int, int], width: int) -> Float[Tensor, "patches width"]:
    """Fixed positions of patch tokens: half of the features tell the row, half the column (as in MAE).

    Scaled to the size of a freshly embedded patch, which full waves would drown.
    """
    quarter = width // 4
    rate = 10000.0 ** -(torch.arange(quarter, dtype=torch.float32) / quarter)
    row, column = (axis.flatten() for axis in torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"))
    waves = [wave(axis[:, None] * rate) for axis in (row, column) for wave in (torch.sin, torch.cos)]
    return POSITION_SCALE * F.pad(torch.cat(waves, dim=1), (0, width - 4 * quarter))


class HopePredictor(nn.Module):
    """Predicts embeddings of future frames from past ones and the actions between them.

    An action reaches every patch token of its frame by addition, besides its own conditioning token. The pass is a
    pure function of its arguments: no dropout state, no counters, no memory between calls.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.embed = nn.Linear(config.encoder_dim, width)
        table = sincos_positions(config.grid, width) if config.patch_position == "sincos" else None
        self.register_buffer("patch_position", table, persistent=False)
        self.action_encoder = nn.Linear(config.action_dim, width)
        self.state_encoder = nn.Linear(config.state_dim, width) if config.state_dim else None
        self.frame_position = nn.Embedding(config.frames + 2, width)
        self.target_position = nn.Embedding(config.frames + 2, width)
        depth = len(config.block_pattern)
        rates = [config.drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            build_block(config, kind, rate) for kind, rate in zip(config.block_pattern, rates, strict=True)
        )
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, config.encoder_dim)

    def forward(
        self,
        features: Float[Tensor, "batch frames patches channels"],
        actions: Float[Tensor, "batch frames action"],
        states: Float[Tensor, "batch frames state"] | None = None,
        *,
        target: Int[Tensor, " batch"] | None = None,
        state: tuple[BlockState, ...] | None = None,
        frame_offset: int = 0,
        draws: Float[Tensor, "batch blocks branches"] | None = None,
        writes: bool = True,
        keep_state: bool = False,
    ) -> Prediction:
        """Predict from consecutive frames of each clip.

        Args:
            features: the frames' embeddings, on any scale.
            actions: action t acts between frame t and frame t + 1.
            states: the frames' states; needed when `model.state_dim` > 0.
            target: number of the frame to jump to, one a clip; None predicts the next frame of every frame.
            state: what an earlier pass over the frames before returned; None for the start of a clip.
            frame_offset: number in the clip of the first given frame.
            draws: uniform numbers in [0, 1) for drop-path; None drops nothing.
            writes: False lets the memories be read only.
            keep_state: return the state after the last frame.

        Raises:
            ValueError: a tensor whose shape is not what the configuration says.
        """
        self._check(features, actions, states, frame_offset)
        newest = normalise(features)
        x = self._tokens(newest, actions, states, target, frame_offset)
        kept, traces = [], []
        for number, block in enumerate(self.blocks):
            x, block_state, trace = block(
                x,
                None if state is None else state[number],
                None if draws is None else draws[:, number],
                frame_offset=frame_offset,
                writes=writes,
                keep_state=keep_state,
            )
            kept.append(block_state)
            if trace is not None:
                traces.append(trace)
        predicted = self.project(self.norm(x[:, :, self.config.num_conditioning :])).float()
        if self.config.output == "residual":
            predicted = newest + predicted
        return Prediction(normalise(predicted), tuple(kept) if keep_state else None, tuple(traces))

    def _tokens(
        self,
        newest: Float[Tensor, "batch frames patches channels"],
        actions: Float[Tensor, "batch frames action"],
        states: Float[Tensor, "batch frames state"] | None,
        target: Int[Tensor, " batch"] | None,
        frame_offset: int,
    ) -> Float[Tensor, "batch frames tokens width"]:
        conditioning = [self.action_encoder(actions)]
        if self.state_encoder is not None and states is not None:
            conditioning.append(self.state_encoder(states))
        place = self.frame_position.weight[frame_offset : frame_offset + newest.shape[1]]
        patches = self.embed(newest) + torch.stack(conditioning).sum(0).unsqueeze(2)
        if self.patch_position is not None:
            patches = patches + self.patch_position
        tokens = torch.cat([*(c.unsqueeze(2) for c in conditioning), patches], dim=2) + place[:, None]
        if target is not None:
            tokens = tokens + self.target_position(target)[:, None, None]
        return tokens

    def _check(self, features: Tensor, actions: Tensor, states: Tensor | None, frame_offset: int) -> None:
        config, shape = self.config, features.shape
        if features.ndim != 4 or shape[2:] != (config.num_patches, config.encoder_dim):
            raise ValueError(
                f"features have shape {tuple(shape)}; the model takes [batch, frames, {config.num_patches} patches, "
                f"{config.encoder_dim} channels]"
            )
        last, longest = frame_offset + shape[1], self.frame_position.num_embeddings
        if last > longest:
            raise ValueError(f"frames up to number {last - 1} are given; model.frames={config.frames} allows {longest}")
        if actions.shape != (*shape[:2], config.action_dim):
            raise ValueError(f"actions have shape {tuple(actions.shape)}; expected {(*shape[:2], config.action_dim)}")
        if config.state_dim and (states is None or states.shape != (*shape[:2], config.state_dim)):
            given = None if states is None else tuple(states.shape)
            raise ValueError(f"states have shape {given}; expected {(*shape[:2], config.state_dim)}")
