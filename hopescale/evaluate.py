"""Held-out error of a predictor, per partition, against the baselines it must beat.

Errors are mean L1 between layer-normalised prediction and truth. Every rank takes its share of the held-out clips;
sums are added up over ranks once, at the end, and only then divided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from data_pipeline.batch import ClipBatch
from data_pipeline.order import rank_share
from data_pipeline.reader.clips import ClipReader
from hopescale.model.ahead import jump, roll_out
from hopescale.model.objective import distance
from hopescale.model.predictor import normalise

SKILLS = ("skill_one_step", "skill_far", "skill_jump", "skill_context")
CONTEXT = 4
"""True frames that the figures called `context` start from."""


@dataclass
class Errors:
    """Sums and counts of errors by name: fp64 [partitions, horizons]."""

    num_partitions: int
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, error: Tensor, valid: Tensor, partitions: Tensor) -> None:
        """Add errors [clips, horizons] where valid, under each clip's partition number."""
        shape = (self.num_partitions, error.shape[1])
        for table, values in ((self.sums, torch.where(valid, error, 0.0)), (self.counts, valid)):
            total = table.setdefault(name, torch.zeros(shape, dtype=torch.float64))
            total.index_add_(0, partitions, values.to("cpu", torch.float64))

    def mean(self, name: str) -> Tensor:
        """Mean error [partitions, horizons]."""
        return self.sums[name] / self.counts[name]

    def overall(self, name: str, horizons: slice) -> Tensor:
        """Mean error of each partition over the given horizons."""
        return self.sums[name][:, horizons].sum(1) / self.counts[name][:, horizons].sum(1)

    def skill(self, name: str, baseline: str, horizons: slice) -> Tensor:
        """1 - sum(error) / sum(baseline error) of each partition, over the given horizons."""
        return 1 - self.sums[name][:, horizons].sum(1) / self.sums[baseline][:, horizons].sum(1)

    def ratio(self, name: str, other: str, horizons: slice) -> Tensor:
        """sum(error of `name`) / sum(error of `other`) of each partition."""
        return self.sums[name][:, horizons].sum(1) / self.sums[other][:, horizons].sum(1)

    def over_ranks(self, all_reduce: Any) -> Errors:
        """The same over all ranks: one reduction of everything packed together."""
        names = sorted(self.sums)
        packed = torch.cat([t[n].flatten() for t in (self.sums, self.counts) for n in names])
        all_reduce(packed)
        pieces = iter(packed.split([t[n].numel() for t in (self.sums, self.counts) for n in names]))
        total = Errors(self.num_partitions)
        for mine, table in ((self.sums, total.sums), (self.counts, total.counts)):
            table.update({n: next(pieces).view_as(mine[n]) for n in names})
        return total


@torch.no_grad()
def held_out_errors(
    model: nn.Module,
    reader: ClipReader,
    *,
    jump_horizons: int,
    jump_context: int = 1,
    context: int = CONTEXT,
    device: torch.device,
    batch_size: int = 16,
    rank: int = 0,
    world_size: int = 1,
    shuffled: bool = False,
    ablations: bool = False,
    guard: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Errors:
    """Errors of every held-out clip of this rank's share.

    Args:
        model: predictor; left as it is.
        reader: of the held-out clips.
        jump_horizons: jump targets are this many last frames; 0 for a model that cannot jump.
        jump_context: true frames a jump is made from; copy-last repeats the last of them.
        context: true frames given before the rollout called `context`, which clips no longer than that have no part in.
        device: of the model.
        batch_size: clips in one forward.
        rank: of this process.
        world_size: processes that share the clips.
        shuffled: also predict one step with rotated actions, which costs one more pass over the true frames.
        ablations: that, and also run rollouts with rotated actions, with memory writes disabled, and without the frames
            before the newest.
        guard: wraps each read, so that ranks can share what goes wrong in one.
    """
    names = sorted(set(reader.partitions))
    errors = Errors(len(names))
    mean_frame = reader.mean_frame().to(device)
    partners = _next_in_partition(reader.partitions) if shuffled or ablations else None
    for rows, real_rows in _rows(reader.num_clips, batch_size, rank, world_size):
        with guard():
            clips = reader.read(rows)
            others = None if partners is None else reader.read_actions(partners[rows]).to(device)
        clips = (clips if real_rows else clips.without_weight()).to(device)
        part = torch.tensor([names.index(p) for p in clips.partitions])
        # A sharded model gathers on every call, so a rank whose clips have run out still takes part, with weight 0.
        real = clips.weights.to(device)[:, None] > 0
        truth = normalise(clips.features)
        later = real & (torch.arange(1, truth.shape[1], device=device) < clips.lengths.to(device)[:, None])

        def add(name: str, error: Tensor, valid: Tensor = later, part: Tensor = part) -> None:
            errors.add(name, error, valid, part)

        add("one_step", one_step_error(model, clips, truth))
        add("one_step_copy_last", distance(truth[:, :-1], truth[:, 1:], "l1"))
        predicted = rollout(model, clips)
        add("rollout", distance(predicted, truth[:, 1:], "l1"))
        add("copy_last", distance(truth[:, :1], truth[:, 1:], "l1"))
        add("mean_frame", distance(mean_frame, truth[:, 1:], "l1"))
        if jump_horizons:
            aims, newest = slice(truth.shape[1] - 1 - jump_horizons, None), slice(jump_context - 1, jump_context)
            add("jump", jump_error(model, clips, truth, jump_horizons, jump_context), later[:, aims])
            add("jump_copy_last", distance(truth[:, newest], truth[:, 1:], "l1")[:, aims], later[:, aims])
        if truth.shape[1] > context:
            for name, error in context_errors(model, clips, truth, context, ablations=ablations):
                add(name, error, later[:, context - 1 :])
        if ablations:
            add("one_step_writes_off", one_step_error(model, clips, truth, writes=False))
            add("rollout_writes_off", distance(rollout(model, clips, writes=False), truth[:, 1:], "l1"))
            add("rollout_shuffled", distance(rollout(model, clips, actions=others), truth[:, 1:], "l1"))
        if others is not None:
            add("one_step_shuffled", one_step_error(model, clips, truth, actions=others))
    return errors


def one_step_error(
    model: nn.Module, clips: ClipBatch, truth: Tensor, *, actions: Tensor | None = None, writes: bool = True
) -> Float[Tensor, "clips transitions"]:
    """Error of predicting frame t + 1 from the true frames 0 .. t."""
    past_states = None if clips.states is None else clips.states[:, :-1]
    given = clips.actions if actions is None else actions
    prediction = model(clips.features[:, :-1], given, past_states, extrinsics=clips.extrinsics, writes=writes)
    return distance(prediction.frames, truth[:, 1:], "l1")


def rollout(
    model: nn.Module,
    clips: ClipBatch,
    *,
    actions: Tensor | None = None,
    first: int = 0,
    context: int = 1,
    writes: bool = True,
) -> Float[Tensor, "clips predicted patches channels"]:
    """The frames after true frames first .. first + context - 1, feeding each prediction back and carrying the state.

    All actions are given. A clip looked at from a later `first` frame on begins there: frames are numbered anew.
    """
    given = clips.actions if actions is None else actions
    states = None if clips.states is None else clips.states[:, first:]
    steps = given.shape[1] + 1 - first - context
    return roll_out(
        model,
        clips.features[:, first:],
        given[:, first:],
        states,
        extrinsics=None if clips.extrinsics is None else clips.extrinsics[:, first:],
        context=context,
        steps=steps,
        writes=writes,
    )


def context_errors(
    model: nn.Module, clips: ClipBatch, truth: Tensor, context: int, *, ablations: bool
) -> Iterator[tuple[str, Float[Tensor, "clips predicted"]]]:
    """Errors, by name, of the frames after `context` true ones, against copying the newest of these.

    Without writes, or seeing the newest alone, the model cannot know what only the frames before it told.
    """
    newest, goal = context - 1, truth[:, context:]
    yield "context", distance(rollout(model, clips, context=context), goal, "l1")
    yield "context_copy_last", distance(truth[:, newest:context], goal, "l1")
    if ablations:
        yield "context_writes_off", distance(rollout(model, clips, context=context, writes=False), goal, "l1")
        yield "context_no_past", distance(rollout(model, clips, first=newest), goal, "l1")


def jump_error(
    model: nn.Module, clips: ClipBatch, truth: Tensor, horizons: int, context: int
) -> Float[Tensor, "clips horizons"]:
    """Error of predicting each of the last `horizons` frames straight from the first `context`."""
    last = range(truth.shape[1] - horizons, truth.shape[1])
    targets = [torch.full((len(truth),), frame, device=truth.device) for frame in last]
    predicted = jump(
        model, clips.features, clips.actions, clips.states, targets, extrinsics=clips.extrinsics, context=context
    )
    return distance(predicted, truth[:, -horizons:], "l1")


def summarise(errors: Errors, partitions: Sequence[str]) -> dict[str, Any]:
    """Skills, ratios and baselines of each partition, and their mean over partitions.

    Returns:
        Means at the top level; each partition's own under "partitions"; None where no clip is long enough, or the
        model cannot do it.
    """
    every, last = slice(None), slice(-1, None)
    columns = {
        "skill_one_step": errors.skill("one_step", "one_step_copy_last", every),
        "skill_far": errors.skill("rollout", "copy_last", last),
        "skill_jump": torch.full((len(partitions),), torch.nan),
        "skill_context": torch.full((len(partitions),), torch.nan),
    }
    if "jump" in errors.sums:
        columns["skill_jump"] = errors.skill("jump", "jump_copy_last", every)
    if "context" in errors.sums:
        columns["skill_context"] = errors.skill("context", "context_copy_last", every)
    if "one_step_shuffled" in errors.sums:
        columns["action_sensitivity"] = errors.overall("one_step_shuffled", every) - errors.overall("one_step", every)
    if "rollout_shuffled" in errors.sums:
        for kind in ("shuffled", "writes_off"):
            columns[f"{kind}_ratio_one_step"] = errors.ratio(f"one_step_{kind}", "one_step", every)
            columns[f"{kind}_ratio_far"] = errors.ratio(f"rollout_{kind}", "rollout", last)
    if "context_no_past" in errors.sums:
        for kind in ("writes_off", "no_past"):
            columns[f"{kind}_ratio_context"] = errors.ratio(f"context_{kind}", "context", every)
    baselines = {
        "copy_last_one_step": errors.overall("one_step_copy_last", every),
        "copy_last_far": errors.overall("copy_last", last),
        "mean_frame_one_step": errors.overall("mean_frame", every),
        "mean_frame_far": errors.overall("mean_frame", last),
    }

    def row(pick: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        return {name: _defined(pick(values)) for name, values in columns.items()} | {
            "baselines": {name: _defined(pick(values)) for name, values in baselines.items()}
        }

    rows = {name: row(lambda values, number=number: values[number]) for number, name in enumerate(partitions)}
    return {**row(torch.nanmean), "partitions": rows}


def _defined(value: Tensor) -> float | None:
    """A number, or None where there was nothing to measure (a partition whose clips are too short for a horizon)."""
    return float(value) if value.isfinite() else None


@torch.no_grad()
def surprise_by_frame(model: nn.Module, reader: ClipReader, chunk_size: int, device: torch.device) -> np.ndarray:
    """Mean surprise of each block with memories at each true frame of the held-out clips: [blocks, transitions].

    Frames written together, `chunk_size` of them, share their write's surprise. No rows where no memory is written.
    """
    sums, counts = torch.zeros((), dtype=torch.float64), torch.zeros(())
    for rows, _ in _rows(reader.num_clips, 16, 0, 1):
        clips = reader.read(rows).to(device)
        states = None if clips.states is None else clips.states[:, :-1]
        traces = model(
            clips.features[:, :-1], clips.actions, states, extrinsics=clips.extrinsics, keep_state=True
        ).traces
        transitions = clips.actions.shape[1]
        by_write = torch.stack([trace.surprise for trace in traces]) if traces else torch.zeros(0, 0, 0)
        if not by_write.numel():
            return np.zeros((0, transitions), np.float32)
        by_frame = by_write.repeat_interleave(chunk_size, dim=2)[:, :, :transitions]
        valid = torch.arange(1, transitions + 1, device=device) < clips.lengths.to(device)[:, None]
        sums = sums + torch.where(valid, by_frame, 0.0).sum(1).double().cpu()
        counts = counts + valid.sum(0).cpu()
    return (sums / counts).float().numpy()


def _rows(num_clips: int, size: int, rank: int, world_size: int) -> Iterator[tuple[np.ndarray, bool]]:
    """Rows of this rank's batches, each clip once over all ranks, and whether they count.

    Every rank yields as many batches as the others; one whose clips have run out gets a row that does not count.
    """
    start, count = rank_share(num_clips, rank, world_size)
    largest = rank_share(num_clips, 0, world_size)[1]
    for begin in range(0, largest, size):
        rows = np.arange(start + min(begin, count), start + min(begin + size, count))
        yield (rows, True) if len(rows) else (np.array([0]), False)


def _next_in_partition(partitions: Sequence[str]) -> np.ndarray:
    """Row of the next clip of the same partition, the last one's being the first."""
    labels, following = np.asarray(partitions), np.arange(len(partitions))
    for name in np.unique(labels):
        rows = np.flatnonzero(labels == name)
        following[rows] = np.roll(rows, -1)
    return following
