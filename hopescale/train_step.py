"""One optimizer step: micro-batches forward and backward, clip, step, in that order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_pipeline.batch import ClipBatch, StepBatches
from hopescale.config.schema import Config
from hopescale.draws import drop_path_draws, jump_targets
from hopescale.model.block import MAX_BRANCHES
from hopescale.model.objective import ClipLosses, clip_losses
from hopescale.model.objective_schema import Branch
from hopescale.model.teaching import at_step
from hopescale.optim.m3 import Moved
from hopescale.optim.schedules import rate_factor
from hopescale.optim.state import is_spread
from hopescale.parallel.consolidation import added_changes, consolidate
from hopescale.parallel.engine import Engine
from hopescale.parallel.gradients import clip_gradients, dead_numbers, group_norms


class StepResult(NamedTuple):
    """What one step leaves to be recorded; tensors stay on the device."""

    losses: list[ClipLosses]
    """This rank's micro-batches."""
    objective: Tensor
    """This rank's share of the step's objective; the sum over ranks is the mean over the global batch."""
    norms: Tensor
    """Norm of the whole gradient of each optimizer group, before clipping."""
    dead: Tensor | None
    """Numbers of this rank's pieces of each group that got no gradient; None but on the step of a report."""
    moved: list[Moved | None]
    """How far each group moved on its last firing before a report; None on other steps."""
    rate: float
    """Factor on the learning rates."""
    skipped: bool
    """Whether the gradients were not finite, so that nothing moved."""


def train_step(
    engine: Engine,
    batches: StepBatches,
    config: Config,
    *,
    attempt: int,
    step: int,
    report_in: int | None = None,
) -> StepResult:
    """Train on one global batch.

    Args:
        engine: predictor and optimizer, spread over ranks; both in place.
        batches: this rank's micro-batches, as many as on every other rank.
        config: of the run, with the objective of its phase.
        attempt: attempted steps so far; random draws depend on it.
        step: optimizer steps so far; the learning rate depends on it, and how much CMS levels learn within a clip.
        report_in: steps from this one to the next report of figures that cost passes over parameters; None for none.
    """
    model, optimizer = engine.model, engine.optimizer
    rate = rate_factor(config.optimizer.schedule, step, config.train.steps)
    for group in optimizer.param_groups:
        group["lr"] = config.optimizer.lr * group["lr_scale"] * rate
    losses, changes, objective = [], [], torch.zeros((), device=batches.micro[0].features.device)
    for number, clips in enumerate(batches.micro):
        engine.begin_micro_batch(last=number == len(batches.micro) - 1)
        loss = micro_losses(at_step(model, config.model.cms, step), clips, config, attempt)
        share = objective_share(loss, batches, config)
        engine.backward(share)
        changes = added_changes(changes, loss.traces)
        losses.append(detached(loss))
        objective += share.detach()
    seen = _Update(engine, config, report_in)
    engine.step(seen.update)
    if not seen.skipped:
        consolidate(model, changes, batches.num_clips, step, spread=is_spread(optimizer))
    return StepResult(losses, objective, seen.norms, seen.dead, seen.moved, rate, seen.skipped)


class _Update:
    """What happens to one step's gradients, at the moment when the engine has them."""

    def __init__(self, engine: Engine, config: Config, report_in: int | None) -> None:
        groups = engine.optimizer.param_groups
        self._engine, self._config, self._report_in = engine, config, report_in
        # What holds if an engine finds gradients that are not finite itself.
        self.norms = torch.full((len(groups),), torch.nan, dtype=torch.float64)
        self.dead: Tensor | None = None
        self.moved: list[Moved | None] = []
        self.skipped = True

    def update(self) -> None:
        """Measure, clip, step; nothing moves if a gradient is not finite."""
        optimizer = self._engine.optimizer
        self.norms = group_norms(optimizer.param_groups, self._engine.shard_group)
        # The norms are those of the whole gradient, so every rank comes to the same answer.
        self.skipped = not bool(torch.isfinite(self.norms).all())
        self.dead = dead_numbers(optimizer.param_groups) if self._report_in == 0 else None
        if not self.skipped:
            clip_gradients(optimizer.param_groups, self.norms, self._config.optimizer.clip)
            optimizer.step(finite=True, report_in=self._report_in)
            self.moved = optimizer.moved


def micro_losses(model: nn.Module, clips: ClipBatch, config: Config, attempt: int) -> ClipLosses:
    """Forward of one micro-batch."""
    seed, device = config.train.seed, clips.features.device
    positions, lengths = clips.positions.numpy(), clips.lengths.numpy()
    horizons, context = config.objective.jump_horizons, config.objective.jump_context
    targets = jump_targets(seed, attempt, positions, lengths, horizons, context)
    draws = None
    if config.model.drop_path:
        depth = len(config.model.block_pattern)
        draws = drop_path_draws(seed, attempt, positions, depth, MAX_BRANCHES).to(device, non_blocking=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.parallel.precision == "bf16"):
        return clip_losses(
            model,
            config.objective,
            clips.features,
            clips.actions,
            clips.states,
            clips.lengths.to(device, non_blocking=True),
            clips.weights.to(device, non_blocking=True),
            targets.to(device, non_blocking=True),
            draws,
            extrinsics=clips.extrinsics,
            consolidate=config.model.longterm is not None,
        )


def objective_share(loss: ClipLosses, batches: StepBatches, config: Config) -> Tensor:
    """A micro-batch's part of the global batch's mean: every branch is divided by the whole batch's count."""
    weights, scored = config.objective.weights, config.objective.scored
    sums: dict[Branch, Tensor] = {"teacher": loss.teacher, "jump": loss.jump, "rollout": loss.rollout}
    # Where no clip of the batch is long enough for a branch, its sum is 0.
    means = [weights[branch] * total / max(batches.num_frames(*scored[branch]), 1) for branch, total in sums.items()]
    return torch.stack([*means, config.objective.auxiliary_weight * loss.auxiliary / batches.num_clips]).sum()


def detached(loss: ClipLosses) -> ClipLosses:
    """The same figures without their graph, and without the wide changes of long-term memories."""
    traces = tuple(trace._replace(longterm=None, auxiliary=None) for trace in loss.traces)
    return ClipLosses(loss.teacher.detach(), loss.jump.detach(), loss.rollout.detach(), loss.auxiliary.detach(), traces)
