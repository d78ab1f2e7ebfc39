"""What a run shows of its inner workings: traces, gradients and updates under the names of the metrics catalog.

Sums are formed where the figures are and stay there until the recorder's next flush; nothing here waits for the device.
What depends on clips counts only clips of weight 1, and of them only frames that a true frame follows: what a padded
frame writes is nobody's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import filter as matching
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.batch import ClipBatch
from hopescale.metrics.catalog import OF_THE_RUN
from hopescale.metrics.recorder import Recorder
from hopescale.model.flops import Recompute, flops_executed
from hopescale.model.objective_schema import ObjectiveConfig
from hopescale.model.schema import MEMORIES, ModelConfig
from hopescale.model.titan import NO_FIGURES, MemoryTrace
from hopescale.optim.m3 import Moved
from hopescale.parallel.gradients import local_size, parameter_squares

SKILL = "skill_"


def labels(model: ModelConfig) -> dict[str, list[str]]:
    """Values of the labels `frame` (the first one of each chunk) and `level`, the first ones if there are too many."""
    frames = range(0, model.frames - 1, model.memory.chunk_size)
    named = {"frame": frames, "level": range(len(model.cms.levels))}
    return {label: [str(number) for number in numbers[: OF_THE_RUN[label]]] for label, numbers in named.items()}


def record_traces(recorder: Recorder, traces: Sequence[MemoryTrace], clips: ClipBatch, model: ModelConfig) -> None:
    """Figures of the memories and CMS levels in one micro-batch's pass over true frames.

    Args:
        recorder: takes the sums.
        traces: of the pass, one a block.
        clips: of the micro-batch.
        model: its configuration.
    """
    if not traces:
        return
    trace, holders = _stacked(traces)
    counts, weights = _counted(clips, trace.level_ratio.shape[2])
    _record_levels(recorder, trace.level_ratio, counts, weights, model)
    if trace.longterm_gate.shape[-1]:
        gates = _weighed(trace.longterm_gate, weights.unsqueeze(-1))
        recorder.add("memory_longterm_gate", gates.sum(), len(traces) * float(counts.sum()))
    chunks = _written(trace.surprise, model)
    if trace.surprise.shape[2]:
        _record_writes(recorder, trace, counts[:, chunks], weights[:, chunks])
        _record_memories(recorder, trace, holders, counts[:, chunks], weights[:, chunks])


def record_surprise(recorder: Recorder, traces: Sequence[MemoryTrace], clips: ClipBatch, model: ModelConfig) -> None:
    """The surprise of one micro-batch of a log step alone, which the curriculum is decided by."""
    if not traces:
        return
    surprise = torch.stack([trace.surprise for trace in traces])
    counts, weights = _counted(clips, traces[0].level_ratio.shape[1])
    chunks = _written(surprise, model)
    total = _weighed(surprise, weights[:, chunks]).sum()
    recorder.add("curriculum_surprise", total, len(surprise) * float(counts[:, chunks].sum()))


def _counted(clips: ClipBatch, frames: int) -> tuple[Float[np.ndarray, "clips frames"], Float[Tensor, "clips frames"]]:
    """Which frames count, on the host and on the device."""
    counts = clips.weights.numpy()[:, None] * (np.arange(frames) + 1 < clips.lengths.numpy()[:, None])
    return counts, torch.from_numpy(counts).to(clips.features.device, non_blocking=True)


def _written(surprise: Float[Tensor, "blocks clips writes"], model: ModelConfig) -> slice:
    """The first frame of every written chunk."""
    return slice(None, surprise.shape[2] * model.memory.chunk_size, model.memory.chunk_size)


def _stacked(traces: Sequence[MemoryTrace]) -> tuple[MemoryTrace, list[int]]:
    """Figures of all blocks, with a column for every memory, and how many blocks hold each.

    A block with fewer memories holds the last ones, for main is the last; its other columns are 0.
    """
    missing = [len(MEMORIES) - trace.drift.shape[-1] for trace in traces]
    by_memory = ("write_ratio", "limited", "norm_ratio", "drift")
    figures: dict[str, Any] = {
        name: torch.stack(
            [
                F.pad(getattr(trace, name), (absent if name in by_memory else 0, 0))
                for trace, absent in zip(traces, missing, strict=True)
            ]
        )
        for name in MemoryTrace._fields
        if name not in NO_FIGURES
    }
    return MemoryTrace(**figures), [sum(absent <= memory for absent in missing) for memory in range(len(MEMORIES))]


def _record_writes(
    recorder: Recorder,
    trace: MemoryTrace,
    counts: Float[np.ndarray, "clips writes"],
    weights: Float[Tensor, "clips writes"],
) -> None:
    """What all memories of a block share."""
    every = len(trace.surprise) * counts.sum(0)
    surprise, named = _weighed(trace.surprise, weights).sum((0, 1)), OF_THE_RUN["frame"]
    recorder.add_each("memory_surprise", surprise[:named], every[:named].tolist())
    for name, total in (
        ("memory_surprise", surprise),
        ("memory_retention", _weighed(trace.retention, weights)),
        ("memory_step_size", _weighed(trace.step_size, weights)),
        ("memory_step_size_p99", _weighed(trace.step_size_p99, weights)),
        ("memory_gate_rate", _weighed(trace.gate, weights)),
    ):
        recorder.add(name, total.sum(), float(every.sum()))
    smallest = torch.where(weights > 0, trace.retention_min, 1.0).amin(dim=(0, 2))
    recorder.add("memory_retention_min", _weighed(smallest, weights[:, 0]).sum(), float(counts[:, 0].sum()))


def _record_memories(
    recorder: Recorder,
    trace: MemoryTrace,
    holders: Sequence[int],
    counts: Float[np.ndarray, "clips writes"],
    weights: Float[Tensor, "clips writes"],
) -> None:
    """What each memory has of its own; `holders` are the numbers of blocks that have it."""
    # A write of nothing is none: behind the gate, or after all that would have read it.
    each = _weighed((trace.write_ratio > 0).to(weights.dtype), weights.unsqueeze(-1))
    recorder.add_each("memory_write_ratio", _weighed(trace.write_ratio, each).sum((0, 1, 2)), each.sum((0, 1, 2)))
    recorder.add_each("memory_limited_ratio", _weighed(trace.limited, each).sum((0, 1, 2)), each.sum((0, 1, 2)))
    ends = [float(n * counts[:, -1].sum()) for n in holders]
    recorder.add_each("memory_fast_norm_ratio", _weighed(trace.norm_ratio, weights[:, -1:]).sum((0, 1)), ends)
    recorder.add_each("memory_drift", _weighed(trace.drift, weights[:, -1:]).sum((0, 1)), ends)


def _record_levels(
    recorder: Recorder,
    ratios: Float[Tensor, "blocks clips frames levels"],
    counts: Float[np.ndarray, "clips frames"],
    weights: Float[Tensor, "clips frames"],
    model: ModelConfig,
) -> None:
    if not ratios.shape[-1]:
        return
    totals, by_frame = _weighed(ratios, weights.unsqueeze(-1)).sum((0, 1, 2)), len(ratios) * counts.sum(0)
    touched = [float(by_frame[::period].sum()) for period in model.cms.frame_periods]
    named = OF_THE_RUN["level"]
    recorder.add_each("cms_output_ratio", totals[:named], touched[:named])


def record_pace(recorder: Recorder, groups: Sequence[Mapping[str, Any]], model: ModelConfig, frames: int) -> None:
    """How often each CMS level is applied and trained.

    Args:
        recorder: takes the numbers.
        groups: of the optimizer.
        model: its configuration.
        frames: stored frames of a whole clip.
    """
    for level, period in zip(labels(model)["level"], model.cms.frame_periods, strict=False):
        pattern = f"*.cms.levels.{level}.fc1.weight"
        steps = [group["num_steps"] // group["period"] for group in groups if matching(group["param_names"], pattern)]
        if steps:
            recorder.set("cms_active_frames", len(range(0, frames - 1, period)), level=level)
            recorder.set("cms_parameter_steps_total", steps[0], level=level)


def record_parameters(
    recorder: Recorder, groups: list[dict[str, Any]], dead: Int[Tensor, " groups"], world_size: int
) -> None:
    """Size of each group's parameters, and how many of them had no gradient.

    Args:
        recorder: takes the sums.
        groups: of the optimizer, in the order of the label `group`.
        dead: numbers of this rank's pieces of each group without a gradient (`parallel.gradients.dead_numbers`).
        world_size: ranks that the parameters are sharded over.
    """
    # Counts of all ranks add up to 1, squares to those of the whole parameters.
    squares, share = parameter_squares(groups), 1 / world_size
    recorder.add_each("param_norm", squares, [share] * len(groups))
    recorder.add("param_norm", squares.sum(), share)
    sizes = [float(local_size(group)) for group in groups]
    recorder.add_each("dead_fraction", dead, sizes)
    recorder.add("dead_fraction", dead.sum(), sum(sizes))


def record_moves(recorder: Recorder, groups: Sequence[Mapping[str, Any]], moved: Sequence[Moved | None]) -> None:
    """How far the groups that were measured moved."""
    for group, move in zip(groups, moved, strict=True):
        if move is not None:
            recorder.add("update_ratio", move.change, move.before, group=group["name"])


def record_flops(
    recorder: Recorder,
    clips_per_second: float,
    model: ModelConfig,
    objective: ObjectiveConfig,
    frames: int,
    recompute: Recompute,
) -> None:
    """Rate at which all ranks execute matrix products; there is no count of them for compatibility models.

    Args:
        recorder: takes the number.
        clips_per_second: of all ranks.
        model: the predictor.
        objective: in its current phase.
        frames: stored frames of a clip.
        recompute: `parallel.recompute`.
    """
    if model.compat == "none":
        each = flops_executed(model, objective, frames, recompute).total
        recorder.set("flops_per_second", clips_per_second * each)


def record_evaluation(recorder: Recorder, scores: Mapping[str, float | None]) -> None:
    """Scores on held-out clips, as `evaluate.summarise` gives them; those that are None are left out."""
    for name, score in scores.items():
        if score is not None and name.startswith(SKILL):
            recorder.set("skill", score, kind=name.removeprefix(SKILL))
            recorder.set("identity_ratio", 1 - score, kind=name.removeprefix(SKILL))
    sensitivity = scores.get("action_sensitivity")
    if sensitivity is not None:
        recorder.set("action_sensitivity", sensitivity)


def _weighed(figures: Tensor, weights: Tensor) -> Tensor:
    """Figures times weights, also where a figure of weight 0 is no number."""
    return torch.where(weights > 0, figures, 0.0) * weights
