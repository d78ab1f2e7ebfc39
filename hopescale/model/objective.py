"""Training losses as sums, so that ranks and micro-batches add up to the same mean whatever their sizes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from .ahead import jump, roll_out
from .objective_schema import ObjectiveConfig
from .predictor import normalise
from .titan import MemoryTrace


class ClipLosses(NamedTuple):
    """Weighted sums over the clips of one micro-batch; 0 for a branch that is not run."""

    teacher: Float[Tensor, ""]
    """Sum over transitions of the mean error of a predicted frame."""
    jump: Float[Tensor, ""]
    """Sum over clips of the mean error of the jump's target frame."""
    rollout: Float[Tensor, ""]
    """Sum over frames predicted from predictions of their mean error."""
    auxiliary: Float[Tensor, ""]
    """Sum over clips, blocks and written chunks of how far keys and values are from agreeing (`auxiliary_weight`)."""
    traces: tuple[MemoryTrace, ...]
    """Figures of the memory writes of the teacher branch."""


def distance(prediction: Tensor, target: Tensor, loss: str, delta: float = 1.0) -> Tensor:
    """Mean distance over the last two dims (patches, channels), one number a frame; `delta` is huber's knee."""
    if loss == "l1":
        error = (prediction - target).abs()
    elif loss == "l2":
        error = (prediction - target).square()
    else:
        error = F.huber_loss(prediction, target, reduction="none", delta=delta)
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
    *,
    extrinsics: Float[Tensor, "batch transitions numbers"] | None = None,
    consolidate: bool = False,
) -> ClipLosses:
    """Run every branch of the objective, each from a fresh memory state.

    A sum is to be divided by the number of frames its branch scores in the whole global batch: those of
    `config.scored` that are valid; the auxiliary one by the number of clips.

    Args:
        predictor: maps frames and actions to a `Prediction`.
        config: weights and kind of the branches; a branch of weight 0 is not run.
        features: stored frames of each clip.
        actions: action t acts between frames t and t + 1.
        states: the frames' states, if the model takes them.
        lengths: stored frames of each clip that are valid; later ones are padding.
        weights: 0 for a clip that only fills up a micro-batch, else 1.
        jump_target: number of the frame each clip's jump predicts, jump_context .. length - 1; a clip too short for
            any is not scored.
        draws: uniform numbers for drop-path; all branches of a clip drop the same.
        extrinsics: of the cameras of the frames that are predicted from, if the model takes them.
        consolidate: let the traces hold by how much the clips of weight 1 changed long-term memories.

    Raises:
        ValueError: the clips have fewer frames than the rollout.
    """
    truth = normalise(features)
    zero = truth.new_zeros(())

    def valid(first: int, count: int) -> Tensor:
        """Which of the frames first, first + 1, ... each clip has."""
        return torch.arange(first, first + count, device=truth.device) < lengths[:, None]

    def scored(predicted: Tensor, goal: Tensor, first: int) -> Tensor:
        """Sum of the errors of frames first, first + 1, ... of the clips that have them."""
        error = distance(predicted, goal, config.loss, config.huber_delta)
        return (torch.where(valid(first, error.shape[1]), error, 0.0) * weights[:, None]).sum()

    teacher, jumped, rolled, auxiliary, traces = zero, zero, zero, zero, ()
    if config.teacher_weight:
        past_states = None if states is None else states[:, :-1]
        wanted = {"consolidate": consolidate, "auxiliary": config.auxiliary_weight > 0}
        counted = valid(1, truth.shape[1] - 1) * weights[:, None]
        more = {name: counted for name, asked in wanted.items() if asked}
        prediction = predictor(features[:, :-1], actions, past_states, extrinsics=extrinsics, draws=draws, **more)
        teacher, traces = scored(prediction.frames, truth[:, 1:], 1), prediction.traces
        apart = [trace.auxiliary for trace in traces if trace.auxiliary is not None]
        auxiliary = torch.stack(apart).sum() if apart else zero
    if config.jump_weight:
        context = config.jump_context
        predicted = jump(
            predictor, features, actions, states, [jump_target], extrinsics=extrinsics, context=context, draws=draws
        )
        goal = truth[torch.arange(len(truth), device=truth.device), jump_target]
        jumped = scored(predicted, goal.unsqueeze(1), context)
    if config.rollout.weight:
        context, steps = config.rollout.context, config.rollout.steps
        reset_every = config.rollout.reset_every
        predicted = roll_out(
            predictor,
            features,
            actions,
            states,
            extrinsics=extrinsics,
            context=context,
            steps=steps,
            reset_every=reset_every,
            draws=draws,
        )
        rolled = scored(predicted, truth[:, context : context + steps], context)
    return ClipLosses(teacher, jumped, rolled, auxiliary, traces)
