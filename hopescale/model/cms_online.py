"""CMS levels that learn within a clip from the predictor's own errors (Nested Learning, Eq. 70-71, inside a clip).

Every clip has its own copy of each level's two matrices: the trained ones plus a change. Once the true frame t + 1 is
there, the prediction made at frame t has an error, and `teaching.py` turns it into a teach signal d [N, D]: which way
the tokens of frame t should not have gone. Each level then descends <d, its output at frame t>, differentiated through
that level alone, in closed form:

    U = LN(z)    A = U W1^T + b1    H = gelu(A)    out = z + H W2^T + b2
    G1 = ((d W2) * gelu'(A))^T U                   G2 = d^T H

Conditioning tokens have d = 0. Gradients of several frames add up; when frame i comes in and i is a multiple of the
level's period, change <- change - scale * sum, and the sum starts anew (Eq. 71 with i counted in frames). A sum that is
left at the end of a clip could only change weights that no frame reads any more, so it goes with the clip's state.

The change has no graph: the outer gradient sees parameter + constant, so every frame trains the parameters and no
gradient runs through a write. Biases and norms are the same for all clips. Nothing is kept on the module.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .cms import CmsLayer, added_ratio
from .schema import CmsConfig


class LevelWeights(NamedTuple):
    """One tensor for each matrix of a level."""

    fc1: Float[Tensor, "*batch hidden width"]
    fc2: Float[Tensor, "*batch width hidden"]


class LevelState(NamedTuple):
    """What a clip has made of one level; nothing here has a graph."""

    change: LevelWeights | None
    """Added to the trained matrices; None before the first write."""
    waiting: LevelWeights | None
    """Sum of the gradients since the last write; None if there are none."""
    normed: Float[Tensor, "batch tokens width"]
    """U of the newest frame."""
    pre: Float[Tensor, "batch tokens hidden"]
    """A of the newest frame."""


class OnlineState(NamedTuple):
    """What a clip has made of all levels of a block."""

    levels: tuple[LevelState, ...]
    prediction: Float[Tensor, "batch 1 patches channels"] | None = None
    """The predictor's output at the newest frame, until the next frame shows its error."""
    signal: Float[Tensor, "batch patches width"] | None = None
    """Teach signal of the newest frame, once it is known."""


class OnlineMemory(nn.Module):
    """Levels applied in order to every frame; level l is written before frames whose number its period divides.

    The parameters are those of `ContinuumMemory`, by the same names.

    Args:
        config: of the CMS, with mode online.
        width: features of a token.
        longest: frames of the longest clip; a level with a period as long is never written.
    """

    def __init__(self, config: CmsConfig, width: int, longest: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(CmsLayer(width, round(level.hidden_multiplier * width)) for level in config.levels)
        self.periods, self.longest = tuple(level.period for level in config.levels), longest
        given = [level.teach_scale for level in config.levels]
        self.scales = tuple(config.online.teach_scale if scale is None else scale for scale in given)

    def forward(
        self,
        z: Float[Tensor, "batch frames tokens width"],
        state: OnlineState | None = None,
        *,
        frame_offset: int = 0,
        keep_state: bool = False,
    ) -> tuple[Float[Tensor, "batch frames tokens width"], OnlineState | None]:
        """Learn from the frame before, if it has a teach signal, then apply all levels.

        Args:
            z: tokens of one frame, or, if no state is given or kept, of several.
            state: what the clip has made of the levels so far; None takes them as trained.
            frame_offset: number in the clip of the first frame of z.
            keep_state: return the state after this frame.

        Raises:
            ValueError: several frames at once with a state, which would leave all but the last untaught.
        """
        z, state, _ = self.traced(z, state, frame_offset=frame_offset, keep_state=keep_state)
        return z, state

    def traced(
        self,
        z: Float[Tensor, "batch frames tokens width"],
        state: OnlineState | None = None,
        *,
        frame_offset: int = 0,
        keep_state: bool = False,
    ) -> tuple[Float[Tensor, "batch frames tokens width"], OnlineState | None, list[Float[Tensor, "batch frames"]]]:
        """The same, and each level's `added_ratio`."""
        if (keep_state or state is not None) and z.shape[1] != 1:
            raise ValueError(f"z holds {z.shape[1]} frames; levels that learn within a clip take one frame at a time")
        kept, ratios = [], []
        for number, level in enumerate(self.levels):
            assert isinstance(level, CmsLayer)
            seen = None if state is None else state.levels[number]
            if seen is not None and state is not None and state.signal is not None:
                seen = self._learn(number, seen, state.signal, frame_offset, keep_state)
            change = None if seen is None else seen.change
            weights = changed(LevelWeights(level.fc1.weight, level.fc2.weight), change)
            normed = level.norm(z)
            pre = apply_linear(normed, weights.fc1, level.fc1.bias)
            before, z = z, z + apply_linear(F.gelu(pre), weights.fc2, level.fc2.bias)
            ratios.append(added_ratio(before, z))
            if keep_state:
                waiting = None if seen is None else seen.waiting
                kept.append(LevelState(change, waiting, normed[:, -1].detach(), pre[:, -1].detach()))
        return z, OnlineState(tuple(kept)) if keep_state else None, ratios

    def active_levels(self, num_frames: int, frame_offset: int = 0) -> list[list[bool]]:
        """Which level touches which frame: every level every frame."""
        del frame_offset
        return [[True] * num_frames for _ in self.levels]

    @torch.no_grad()
    def _learn(
        self, number: int, seen: LevelState, signal: Float[Tensor, "batch patches width"], frame: int, more: bool
    ) -> LevelState:
        """Take in the teach signal of the frame before `frame`, and write if the level is due.

        Where it is not due, and no more frames follow or none that is far enough, the gradient would serve nothing.
        """
        level, period = self.levels[number], self.periods[number]
        due = frame % period == 0
        if not due and not (more and period < self.longest):
            return seen
        assert isinstance(level, CmsLayer)
        weights = changed(LevelWeights(level.fc1.weight.detach(), level.fc2.weight.detach()), seen.change)
        patches = signal.shape[1]
        gradient = local_gradient(signal, seen.normed[:, -patches:], seen.pre[:, -patches:], weights.fc2)
        gradient = changed(gradient, seen.waiting)
        if not due:
            return seen._replace(waiting=gradient)
        write = LevelWeights(-self.scales[number] * gradient.fc1, -self.scales[number] * gradient.fc2)
        return seen._replace(change=changed(write, seen.change), waiting=None)


def local_gradient(
    signal: Float[Tensor, "batch patches width"],
    normed: Float[Tensor, "batch patches width"],
    pre: Float[Tensor, "batch patches hidden"],
    fc2: Float[Tensor, "*batch width hidden"],
) -> LevelWeights:
    """Gradient of <signal, level output> in the level's matrices, one a clip, as wide as the signal."""
    pre = pre.to(signal.dtype)
    slope = torch.ops.aten.gelu_backward((signal @ fc2).to(signal.dtype), pre)
    fc1, fc2 = slope.mT @ normed.to(signal.dtype), signal.mT @ F.gelu(pre)
    return LevelWeights(fc1.to(signal.dtype), fc2.to(signal.dtype))


def changed(weights: LevelWeights, change: LevelWeights | None) -> LevelWeights:
    """The sum of the two, at least as wide as the change."""
    return weights if change is None else LevelWeights(weights.fc1 + change.fc1, weights.fc2 + change.fc2)


def apply_linear(
    x: Float[Tensor, "batch frames tokens inputs"],
    weight: Float[Tensor, "*batch outputs inputs"],
    bias: Float[Tensor, " outputs"],
) -> Float[Tensor, "batch frames tokens outputs"]:
    """A linear layer whose matrix is shared by all clips, or each clip's own."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    return torch.baddbmm(bias, x.flatten(1, 2), weight.mT).unflatten(1, x.shape[1:3])
