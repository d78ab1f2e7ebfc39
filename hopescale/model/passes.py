"""The calls of the predictor that an objective makes for one clip, for whoever counts what they cost."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .objective_schema import ObjectiveConfig
from .schema import ModelConfig


@dataclass(frozen=True)
class Pass:
    """One call of the predictor on consecutive frames of a clip."""

    frames: int
    first: int = 0
    """Number of its first frame in the clip."""
    carried: tuple[int, ...] = ()
    """Frames of each earlier pass whose state it goes on from."""
    keep_state: bool = False
    fed_back: bool = False
    """Its frames are predictions, which pass gradients on."""
    scored: bool = True
    """False where only the state it leaves is used."""
    consolidates: bool = False
    """Long-term memories take in what it writes."""
    auxiliary: bool = False
    """Keys and values are taught to agree."""


def passes(model: ModelConfig, objective: ObjectiveConfig, frames: int) -> list[Pass]:
    """All of them for one clip of `frames` stored frames, over the branches of weight above 0."""
    found = []
    if objective.teacher_weight:
        found.append(
            Pass(frames - 1, consolidates=model.longterm is not None, auxiliary=objective.auxiliary_weight > 0)
        )
    if objective.jump_weight:
        found += jump_passes(objective.jump_context)
    if objective.rollout.weight:
        rollout = objective.rollout
        found += rollout_passes(rollout.context, rollout.steps, rollout.reset_every)
    return found


def jump_passes(context: int) -> list[Pass]:
    """A jump from the last of `context` frames; those before it are read and written first."""
    if context == 1:
        return [Pass(1)]
    return [Pass(context - 1, keep_state=True, scored=False), Pass(1, context - 1, (context - 1,))]


def rollout_passes(context: int, steps: int, reset_every: int | None = None) -> list[Pass]:
    """The context in one pass, then one prediction after the other."""
    found, carried, first, given = [], (), 0, context
    for number in range(1, steps + 1):
        keep_state = number < steps and (reset_every is None or number % reset_every > 0)
        found.append(Pass(given, first, carried, keep_state, fed_back=number > 1))
        carried, first, given = (*carried, given) if keep_state else (), first + given, 1
    return found


def frame_by_frame(call: Pass) -> list[Pass]:
    """The same frames in one pass each, as `cms.mode: online` takes them."""
    return [
        replace(
            call,
            frames=1,
            first=call.first + t,
            carried=(*call.carried, *[1] * t),
            keep_state=call.keep_state or t + 1 < call.frames,
        )
        for t in range(call.frames)
    ]


def executed_passes(model: ModelConfig, objective: ObjectiveConfig, frames: int) -> list[Pass]:
    """The same as `passes`, cut as this implementation runs them."""
    calls = passes(model, objective, frames)
    return [single for call in calls for single in frame_by_frame(call)] if model.cms.mode == "online" else calls


def most_writes(model: ModelConfig, objective: ObjectiveConfig, frames: int) -> int:
    """Writes of a memory from a clip's start to the end of the pass that has made most; 0 where none are made."""
    if not (model.has_memory and model.memory.self_modify):
        return 0
    ends = [
        sum(len(chunk_tokens(model, part)) for part in (*call.carried, call.frames)) - (not call.keep_state)
        for call in passes(model, objective, frames)
    ]
    return max(ends, default=0)


def chunk_tokens(model: ModelConfig, frames: int) -> list[int]:
    """Tokens of each chunk of a pass."""
    size = model.memory.chunk_size
    return [min(size, frames - begin) * model.num_tokens for begin in range(0, frames, size)]


def active_frames(model: ModelConfig, level: int, call: Pass) -> int:
    """Frames of a pass that a CMS level touches."""
    period = model.cms.frame_periods[level]
    return len(range(-call.first % period, call.frames, period))
