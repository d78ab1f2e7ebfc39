"""The HOPE predictor: frames and actions in, next frames out, all in the encoder's embedding space."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from .block import BlockState, build_block
from .precision import at_least_fp32
from .schema import ModelConfig
from .teaching import awaiting, joined, taught
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
    """Figures of the memory writes, one entry an H or U block."""


class _Call(NamedTuple):
    """What a pass is told besides its tokens; see `HopePredictor.forward`."""

    frame_offset: int
    draws: Float[Tensor, "batch blocks branches"] | None
    writes: bool
    keep_state: bool
    consolidate: Float[Tensor, "batch frames"] | None
    auxiliary: Float[Tensor, "batch frames"] | None


def normalise(features: Float[Tensor, "*lead channels"]) -> Float[Tensor, "*lead channels"]:
    """LayerNorm over channels without parameters, in fp32 or wider: the scale on which errors are measured."""
    return F.layer_norm(at_least_fp32(features), features.shape[-1:], eps=FEATURE_NORM_EPS)


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
        self.extrinsics_encoder = nn.Linear(config.extrinsics_dim, width) if config.extrinsics_dim else None
        positions = config.max_frames if config.temporal_embeddings else 0
        self.frame_position = nn.Embedding(positions, width) if positions else None
        self.target_position = nn.Embedding(positions, width) if positions else None
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
        extrinsics: Float[Tensor, "batch frames numbers"] | None = None,
        target: Int[Tensor, " batch"] | None = None,
        state: tuple[BlockState, ...] | None = None,
        frame_offset: int = 0,
        draws: Float[Tensor, "batch blocks branches"] | None = None,
        writes: bool = True,
        keep_state: bool = False,
        teach_factor: float = 1.0,
        consolidate: Float[Tensor, "batch frames"] | None = None,
        auxiliary: Float[Tensor, "batch frames"] | None = None,
    ) -> Prediction:
        """Predict from consecutive frames of each clip.

        Args:
            features: the frames' embeddings, on any scale.
            actions: action t acts between frame t and frame t + 1.
            states: the frames' states; needed when `model.state_dim` > 0, and not looked at when it is 0.
            extrinsics: of the frames' cameras, where `model.extrinsics_dim` > 0; None counts as zeros.
            target: number of the frame to jump to, one a clip; None predicts the next frame of every frame.
            state: what an earlier pass over the frames before returned; None for the start of a clip.
            frame_offset: number in the clip of the first given frame.
            draws: uniform numbers in [0, 1) for drop-path; None drops nothing.
            writes: False lets the memories be read only.
            keep_state: return the state after the last frame.
            teach_factor: on the teach scales of CMS levels that learn within a clip; it changes nothing for others.
            consolidate: weights of frames in the changes of long-term memories that the traces then hold: 0 for frames
                past the end of a clip, and for clips that do not count. None leaves the changes out.
            auxiliary: weights of frames in the auxiliary loss that the traces then hold; None leaves it out.

        Raises:
            ValueError: a tensor whose shape is not what the configuration says, or extrinsics or a target that the
                model has no use for.
        """
        check_input(self.config, features, actions, states, extrinsics, target, frame_offset)
        newest = normalise(features)
        x = self._tokens(newest, actions, states, extrinsics, target, frame_offset)
        call = _Call(frame_offset, draws, writes, keep_state, consolidate, auxiliary)
        if self.config.cms.mode == "online":
            return self._frame_by_frame(newest, x, state, call, target is None, teach_factor * writes)
        return self._pass(newest, x, state, call)

    def _frame_by_frame(
        self,
        newest: Float[Tensor, "batch frames patches channels"],
        x: Float[Tensor, "batch frames tokens width"],
        state: tuple[BlockState, ...] | None,
        call: _Call,
        awaits: bool,
        teach_factor: float,
    ) -> Prediction:
        """One pass a frame, each with what the frame before it taught; `awaits` whether the next frame is predicted."""
        clip, frames, traces = self.config.cms.online.teach_clip, [], []
        for t in range(newest.shape[1]):
            now = slice(t, t + 1)
            if state is not None:
                state = taught(state, newest[:, now], self.project.weight, clip, teach_factor)
            alone = call._replace(
                frame_offset=call.frame_offset + t,
                keep_state=call.keep_state or t + 1 < newest.shape[1],
                consolidate=None if call.consolidate is None else call.consolidate[:, now],
                auxiliary=None if call.auxiliary is None else call.auxiliary[:, now],
            )
            passed = self._pass(newest[:, now], x[:, now], state, alone)
            state = awaiting(passed.state, passed.frames) if passed.state and awaits else passed.state
            frames.append(passed.frames)
            traces.append(passed.traces)
        return Prediction(torch.cat(frames, dim=1), state, tuple(joined(block) for block in zip(*traces, strict=True)))

    def _pass(
        self,
        newest: Float[Tensor, "batch frames patches channels"],
        x: Float[Tensor, "batch frames tokens width"],
        state: tuple[BlockState, ...] | None,
        call: _Call,
    ) -> Prediction:
        kept, traces = [], []
        for number, block in enumerate(self.blocks):
            x, block_state, trace = block(
                x,
                None if state is None else state[number],
                None if call.draws is None else call.draws[:, number],
                frame_offset=call.frame_offset,
                writes=call.writes,
                keep_state=call.keep_state,
                consolidate=call.consolidate,
                auxiliary=call.auxiliary,
            )
            kept.append(block_state)
            if trace is not None:
                traces.append(trace)
        predicted = at_least_fp32(self.project(self.norm(x[:, :, self.config.num_conditioning :])))
        if self.config.output == "residual":
            predicted = newest + predicted
        return Prediction(normalise(predicted), tuple(kept) if call.keep_state else None, tuple(traces))

    def _tokens(
        self,
        newest: Float[Tensor, "batch frames patches channels"],
        actions: Float[Tensor, "batch frames action"],
        states: Float[Tensor, "batch frames state"] | None,
        extrinsics: Float[Tensor, "batch frames numbers"] | None,
        target: Int[Tensor, " batch"] | None,
        frame_offset: int,
    ) -> Float[Tensor, "batch frames tokens width"]:
        conditioning = [self.action_encoder(actions)]
        if self.state_encoder is not None and states is not None:
            conditioning.append(self.state_encoder(states))
        added = torch.stack(conditioning).sum(0)
        if self.extrinsics_encoder is not None:
            if extrinsics is None:
                extrinsics = actions.new_zeros(*actions.shape[:2], self.config.extrinsics_dim)
            added = added + self.extrinsics_encoder(extrinsics)
        patches = self.embed(newest) + added.unsqueeze(2)
        if self.patch_position is not None:
            patches = patches + self.patch_position
        tokens = torch.cat([*(c.unsqueeze(2) for c in conditioning), patches], dim=2)
        if self.frame_position is not None:
            tokens = tokens + self.frame_position.weight[frame_offset : frame_offset + newest.shape[1], None]
        if self.target_position is not None and target is not None:
            tokens = tokens + self.target_position(target)[:, None, None]
        return tokens


def check_input(
    config: ModelConfig,
    features: Tensor,
    actions: Tensor,
    states: Tensor | None,
    extrinsics: Tensor | None,
    target: Tensor | None,
    frame_offset: int,
) -> None:
    """Refuse tensors that do not fit the configuration.

    Raises:
        ValueError: naming the first of them.
    """
    shape = features.shape
    if features.ndim != 4 or shape[2:] != (config.num_patches, config.encoder_dim):
        raise ValueError(
            f"features have shape {tuple(shape)}; the model takes [batch, frames, {config.num_patches} patches, "
            f"{config.encoder_dim} channels]"
        )
    if not shape[1]:
        raise ValueError("features hold no frame; a pass predicts from at least one")
    last, longest = frame_offset + shape[1], config.max_frames
    if last > longest:
        raise ValueError(f"frames up to number {last - 1} are given; model.frames={config.frames} allows {longest}")
    if actions.shape != (*shape[:2], config.action_dim):
        raise ValueError(f"actions have shape {tuple(actions.shape)}; expected {(*shape[:2], config.action_dim)}")
    if config.state_dim and (states is None or states.shape != (*shape[:2], config.state_dim)):
        given = None if states is None else tuple(states.shape)
        raise ValueError(f"states have shape {given}; expected {(*shape[:2], config.state_dim)}")
    expected = (*shape[:2], config.extrinsics_dim)
    if config.extrinsics_dim and extrinsics is not None and extrinsics.shape != expected:
        raise ValueError(f"extrinsics have shape {tuple(extrinsics.shape)}; expected {expected}")
    if target is not None and not config.can_jump:
        raise ValueError("a jump has no target to aim at with model.temporal_embeddings=false")
