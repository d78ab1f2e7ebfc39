"""Looking further ahead than one frame: rollouts, which feed predictions back, and jumps, which aim at a late frame.

Both start from a fresh state, like every use of a predictor, and pass on only what a later pass reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def roll_out(
    predictor: nn.Module,
    features: Float[Tensor, "batch stored patches channels"],
    actions: Float[Tensor, "batch transitions action"],
    states: Float[Tensor, "batch stored state"] | None = None,
    *,
    extrinsics: Float[Tensor, "batch transitions numbers"] | None = None,
    context: int = 1,
    steps: int,
    reset_every: int | None = None,
    draws: Float[Tensor, "batch blocks branches"] | None = None,
    writes: bool = True,
) -> Float[Tensor, "batch steps patches channels"]:
    """Predict frames context .. context + steps - 1 from the frames before them.

    The context goes through in one pass, then each prediction in a pass of its own that goes on from the state of the
    one before: context + steps - 1 frames in all. Gradients reach through every pass. With `memory.chunk_size` above 1
    a fed-back frame still is a chunk of its own, for the next one cannot be known before it is read.

    Args:
        predictor: maps frames and actions to a `Prediction`.
        features: true frames of each clip, of which the first `context` are used.
        actions: true actions; action t acts between frame t and frame t + 1.
        states: true states of the frames, predicted ones included, if the model takes them.
        extrinsics: of the frames' cameras, likewise.
        context: true frames given.
        steps: frames predicted.
        reset_every: predicted frames after which memories and attention caches start afresh, so that the next pass
            sees the last prediction alone (frames keep their numbers); None carries them to the end.
        draws: uniform numbers for drop-path, the same in every pass.
        writes: False lets the memories be read only.

    Raises:
        ValueError: there are not so many actions.
    """
    if context + steps - 1 > actions.shape[1]:
        raise ValueError(
            f"{context} frames of context and {steps} predicted ones need {context + steps - 1} actions; "
            f"got {actions.shape[1]}"
        )
    given, state, start, predicted = features[:, :context], None, 0, []
    for number in range(1, steps + 1):
        stop = start + given.shape[1]
        resets = reset_every is not None and number % reset_every == 0
        prediction = predictor(
            given,
            actions[:, start:stop],
            None if states is None else states[:, start:stop],
            extrinsics=None if extrinsics is None else extrinsics[:, start:stop],
            state=state,
            frame_offset=start,
            draws=draws,
            writes=writes,
            keep_state=number < steps and not resets,
        )
        given, state, start = prediction.frames[:, -1:], prediction.state, stop
        predicted.append(given)
    return torch.cat(predicted, dim=1)


def jump(
    predictor: nn.Module,
    features: Float[Tensor, "batch stored patches channels"],
    actions: Float[Tensor, "batch transitions action"],
    states: Float[Tensor, "batch stored state"] | None,
    targets: Sequence[Int[Tensor, " batch"]],
    *,
    extrinsics: Float[Tensor, "batch transitions numbers"] | None = None,
    context: int = 1,
    draws: Float[Tensor, "batch blocks branches"] | None = None,
) -> Float[Tensor, "batch targets patches channels"]:
    """Predict late frames straight from the first ones and their actions, each target in a pass of its own.

    The target's embedding goes to the last frame of the context only; frames before it are read, and written into the
    memories, as in teacher forcing. A jump itself writes nothing.

    Args:
        predictor: maps frames and actions to a `Prediction`.
        features: true frames of each clip, of which the first `context` are used.
        actions: action t acts between frame t and frame t + 1.
        states: the frames' states, if the model takes them.
        targets: numbers of the frames to jump to, each at least `context`.
        extrinsics: of the frames' cameras, if the model takes them.
        context: true frames given.
        draws: uniform numbers for drop-path, the same in every pass.
    """
    state, last = None, context - 1
    if last:
        past = None if states is None else states[:, :last]
        cameras = None if extrinsics is None else extrinsics[:, :last]
        seen = predictor(features[:, :last], actions[:, :last], past, extrinsics=cameras, draws=draws, keep_state=True)
        state = seen.state
    newest = slice(last, context)
    predicted = [
        predictor(
            features[:, newest],
            actions[:, newest],
            None if states is None else states[:, newest],
            extrinsics=None if extrinsics is None else extrinsics[:, newest],
            target=target,
            state=state,
            frame_offset=last,
            draws=draws,
        ).frames
        for target in targets
    ]
    return torch.cat(predicted, dim=1)
