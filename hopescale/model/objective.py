"""Training losses as sums, so that ranks and micro-batches add up to the same mean whatever their sizes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from .predictor import normalise
from .schema import ObjectiveConfig
from .titan import MemoryTrace


class ClipLosses(NamedTuple):
    """Weighted sums over the clips of one micro-batch."""

    teacher: Float[Tensor, ""]
    """Sum over transitions of the mean error of a predicted frame."""
    jump: Float[Tensor, ""]
    """Sum over clips of the mean error of the jump's target frame."""
    traces: tuple[MemoryTrace, ...]


def distance(prediction: Tensor, target: Tensor, loss: str) -> Tensor:
    """Mean distance over the last two dims (patches, channels), one number a frame."""
    if loss == "l1":
        error = (prediction - target).abs()
    elif loss == "l2":
        error = (prediction - target).square()
    else:
        error = F.huber_loss(prediction, target, reduction="none")
    return error.mean(dim=(-2, -1))


def clip_losses(
    predictor: nn.Module,
    config: ObjectiveConfig,
    features: Float[Tensor, "batch stored patches channels"],
    actions: Float[Tensor, "batch transitions action"],
    states: Float[Tensor, "batch stored state"] | None,
    lengths: Int[Tensor, " batch"],
    weights: Float[Tensor, " batch"],
    jump_target: Int[Tensor, " batch"],
    draws: Float[Tensor, "batch blocks branches"] | None,
) -> ClipLosses:
    """Run every branch of the objective, each from a fresh memory state.

    Args:
        predictor: maps frames and actions to a `Prediction`.
        config: weights and kind of the branches; a branch of weight 0 is not run.
        features: stored frames of each clip.
        actions: action t acts between frames t and t + 1.
        states: the frames' states, if the model takes them.
        lengths: stored frames of each clip that are valid; later ones are padding.
        weights: 0 for a clip that only fills up a micro-batch, else 1.
        jump_target: number of the frame each clip's jump predicts, 1 .. length - 1.
        draws: uniform numbers for drop-path; teacher and jump of a clip drop the same branches.
    """
    truth = normalise(features)
    zero = truth.new_zeros(())
    teacher, jump, traces = zero, zero, ()
    if config.teacher_weight:
        past_states = None if states is None else states[:, :-1]
        prediction = predictor(features[:, :-1], actions, past_states, draws=draws)
        error = distance(prediction.frames, truth[:, 1:], config.loss)
        valid = torch.arange(1, truth.shape[1], device=truth.device) < lengths[:, None]
        teacher = (torch.where(valid, error, 0.0) * weights[:, None]).sum()
        traces = prediction.traces
    if config.jump_weight:
        first_state = None if states is None else states[:, :1]
        prediction = predictor(features[:, :1], actions[:, :1], first_state, target=jump_target, draws=draws)
        goal = truth[torch.arange(len(truth), device=truth.device), jump_target]
        jump = (distance(prediction.frames[:, 0], goal, config.loss) * weights).sum()
    return ClipLosses(teacher, jump, traces)
