"""The training loop: load, step, log, evaluate, save."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import time
from typing import Any, Literal

import torch

from data_pipeline.batch import ClipBatch, StepBatches, not_finite
from data_pipeline.reader.batches import GlobalBatches
from hopescale.checkpoint.contents import RunState
from hopescale.checkpoint.manager import CheckpointManager
from hopescale.config.schema import Config
from hopescale.curriculum import Curriculum
from hopescale.diagnostics import (
    record_evaluation,
    record_flops,
    record_moves,
    record_pace,
    record_parameters,
    record_surprise,
    record_traces,
)
from hopescale.errors import EXIT_SUPERSEDED, Diverged, Problem, UserError, describe
from hopescale.metrics.recorder import Recorder
from hopescale.metrics.throughput import StepClock
from hopescale.optim.m3 import M3
from hopescale.parallel.engine import Engine
from hopescale.resilience.control_word import ControlWord, Interrupted
from hopescale.resilience.figures import record_survival
from hopescale.resilience.goodput import USEFUL, Goodput
from hopescale.resilience.preemption import Stop
from hopescale.run_folder import Attempt
from hopescale.train_step import StepResult, train_step

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 10

Outcome = Literal["finished", "preempted"]


@dataclass
class Trainer:
    """Trains until the run's steps are done, its skill stops rising, or this job is to stop.

    Every branch below depends on the step number or on numbers that were reduced over ranks, so all ranks take it
    together; what can fail on one rank alone (reading, opening, committing) fails on all of them.
    """

    config: Config
    engine: Engine
    data: GlobalBatches
    recorder: Recorder
    checkpoints: CheckpointManager
    evaluate: Callable[[], dict[str, float | None]]
    attempt: Attempt
    account: Goodput
    control: ControlWord
    state: RunState
    device: torch.device
    world_size: int
    clock: StepClock = field(default_factory=StepClock)
    failed_saves: int = 0

    def __post_init__(self) -> None:
        self.first_step = self.attempt.step = self.state.step
        self.logged_step = self.saved_step = self.state.step or None
        self.curriculum = Curriculum(self.config.objective, self.state.curriculum)

    def run(self) -> Outcome:
        """Train until the run or this job ends, with a checkpoint of the last step."""
        self.account.enter("other")
        self.count()
        self.recorder.announce()
        if self.state.unscored:
            self.score()
        for batches in self.batches():
            self.step(batches)
            if self.due(self.config.train.eval_every):
                self.score()
            # Before saving, so that what a log step lets the curriculum decide is in its checkpoint.
            if self.due(self.config.metrics.every):
                self.log()
            if self.due(self.config.checkpoint.every) or self.control.save:
                self.save()
        self.log()
        self.save(last=True)
        return "finished" if self.finished and not self.state.unscored else "preempted"

    def batches(self) -> Iterator[StepBatches]:
        """One for each step, until this job has nothing more to do or is told to stop."""
        batches = iter(self.data)
        while not self.ending:
            taken = self.load(batches)
            # Ranks have just agreed on it. What was taken is not counted: it is the next step's when the run goes on.
            if self.control.stop:
                return
            yield taken

    @property
    def optimizer(self) -> M3:
        """Of the engine."""
        return self.engine.optimizer

    @property
    def ending(self) -> bool:
        """Whether this job has nothing more to do, or is to do no more."""
        stop_after = self.config.train.stop_after
        enough = stop_after is not None and self.state.step - self.first_step >= stop_after
        return self.finished or enough or self.control.stop > Stop.NO

    @property
    def finished(self) -> bool:
        """Whether the whole run is done."""
        patience = self.config.run.early_stop.patience
        lost_patience = patience > 0 and self.state.evaluations_without_gain >= patience
        return self.state.step >= self.config.train.steps or lost_patience

    def due(self, every: int) -> bool:
        """Whether something done every so many steps is to be done after the step just taken."""
        return not self.state.skipped_in_a_row and every > 0 and self.state.step % every == 0

    @property
    def steps_to_log(self) -> int:
        """Steps from the next one to the first that surely is a log step; 0 where the next one is."""
        done, stop_after = self.state.step + 1, self.config.train.stop_after
        ends = [self.config.train.steps] + ([] if stop_after is None else [self.first_step + stop_after])
        return min(-done % self.config.metrics.every, *(end - done for end in ends))

    def load(self, batches: Iterator[StepBatches]) -> StepBatches:
        """The next global batch's share of this rank, on its device; here ranks agree what to do."""
        with self.account.spending("data_wait"), self.control.word(self.state.skipped_steps), self.clock.waiting():
            return next(batches)

    def step(self, batches: StepBatches) -> StepResult:
        """One optimizer step; one whose gradients are not finite consumes its clips and moves nothing else."""
        self.curriculum.arrive(self.state.step)
        with self.account.stepping() as taken:
            result = train_step(
                self.engine,
                batches,
                self.config.model_copy(update={"objective": self.curriculum.objective}),
                attempt=self.state.attempted_steps,
                step=self.state.step,
                report_in=self.steps_to_log,
            )
            taken(self.state.step + 1, result.skipped)
        self.clock.step(batches.num_clips)
        if result.skipped:
            self.report_skipped(batches)
        else:
            self.record(result, batches.micro)
        self.state.attempted_steps += 1
        self.state.step += not result.skipped
        self.state.skipped_in_a_row = self.state.skipped_in_a_row + 1 if result.skipped else 0
        if self.state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            count, after = MAX_SKIPPED_IN_A_ROW, self.state.step
            rule = f"{count} steps in a row had gradients that are not finite, after step {after}"
            fix = "start a new run with a lower optimizer.lr or optimizer.clip.max_norm"
            raise Diverged(Problem("optimizer.lr", self.config.optimizer.lr, rule, fix))
        return result

    def settle(self) -> None:
        """Let the device finish its steps, before something that waits for it anyway and whose time this is not."""
        if self.device.type == "cuda":
            with self.account.settling():
                torch.cuda.synchronize(self.device)

    def report_skipped(self, batches: StepBatches) -> None:
        """Log which of this rank's clips a skipped step consumed."""
        keys = [key for clips in batches.micro for key, w in zip(clips.keys, clips.weights, strict=True) if w > 0]
        broken = [key for clips in batches.micro for key in not_finite(clips)]
        why = f"; the data itself holds values that are not finite: {', '.join(broken)}" if broken else ""
        attempt = self.state.attempted_steps
        logger.warning("skipped attempt %d: gradients are not finite; clips %s%s", attempt, ", ".join(keys), why)

    def record(self, result: StepResult, micro: list[ClipBatch]) -> None:
        """Add up the step's figures where they are; nothing is reduced or copied before a log step."""
        add, objective = self.recorder.add, self.curriculum.objective
        add("loss", result.objective, 1 / self.world_size)
        for clips, losses in zip(micro, result.losses, strict=True):
            for branch, weight in objective.weights.items():
                if weight:
                    add(f"loss_{branch}", getattr(losses, branch), clips.num_frames(*objective.scored[branch]))
            if objective.auxiliary_weight and objective.teacher_weight:
                add("loss_auxiliary", losses.auxiliary, clips.num_frames(0, 1))
            record_traces(self.recorder, losses.traces, clips, self.config.model)
            if self.curriculum.awaited is not None and (self.state.step + 1) % self.config.metrics.every == 0:
                record_surprise(self.recorder, losses.traces, clips, self.config.model)
        for group, norm in zip(self.optimizer.param_groups, result.norms, strict=True):
            add("grad_norm", norm, group=group["name"])
        add("grad_norm", result.norms.square().sum().sqrt())
        record_moves(self.recorder, self.optimizer.param_groups, result.moved)
        if result.dead is not None:
            record_parameters(self.recorder, self.optimizer.param_groups, result.dead, self.engine.shards)
        self.recorder.set("learning_rate", self.config.optimizer.lr * result.rate)
        for group in self.optimizer.param_groups:
            self.recorder.set("learning_rate", group["lr"], group=group["name"])

    def log(self) -> None:
        """Reduce and publish everything recorded since the last log step; the curriculum learns what all ranks know."""
        self.settle()
        window = None if self.state.step == self.logged_step else self.clock.take()
        if window is None:
            return
        recorder, state = self.recorder, self.state
        self.logged_step = state.step
        self.count()
        recorder.set("train_seconds_total", self.clock.total_seconds)
        recorder.record_window(window)
        objective, frames = self.curriculum.objective, self.data.frames
        rate, recompute = window.clips_per_second, self.config.parallel.recompute
        record_flops(recorder, rate, self.config.model, objective, frames, recompute)
        record_pace(recorder, self.optimizer.param_groups, self.config.model, frames)
        recorder.record_reader(self.data.stats())
        recorder.observe_rank("memory_bytes", peak_memory_bytes(self.device))
        recorder.set("curriculum_phase", state.curriculum.phase)
        for branch, weight in self.curriculum.objective.weights.items():
            recorder.set("objective_weight", weight, kind=branch)
        figures = recorder.flush(state.step)
        if "curriculum_surprise" in figures:
            self.curriculum.see(state.step, figures["curriculum_surprise"])

    def count(self) -> None:
        """Set what is known of the whole run at any moment."""
        recorder, state = self.recorder, self.state
        recorder.set("planned_steps", self.config.train.steps)
        recorder.set("attempted_steps_total", state.attempted_steps)
        recorder.set("nonfinite_steps_total", state.skipped_steps)
        recorder.set("clips_total", state.attempted_steps * self.config.train.global_batch)
        # Written down before it is shown, so that a crash takes nothing back.
        self.account.tell(state.step)
        record_survival(recorder, self.account, self.attempt.run.path, self.failed_saves, self.world_size)

    def score(self) -> None:
        """Evaluate on held-out clips, and count evaluations without a gain; cut off where the run is to stop."""
        self.settle()
        with self.clock.paused(), self.account.spending(USEFUL):
            try:
                skills = self.evaluate()
            except Interrupted:
                self.state.unscored = True
                return
            self.state.unscored = False
            record_evaluation(self.recorder, skills)
            self.recorder.flush(self.state.step, kind="eval")
        watch = self.config.run.early_stop
        skill, best = skills[watch.metric], self.state.best
        gained = skill is not None and (best is None or skill > best + watch.min_gain)
        self.state.best = skill if gained else best
        self.state.evaluations_without_gain = 0 if gained else self.state.evaluations_without_gain + 1

    def save(self, *, last: bool = False) -> None:
        """Commit a checkpoint, unless this step has one; one that cannot be written is missed.

        Args:
            last: nothing comes after it, so it must not be missed.

        Raises:
            UserError: on all ranks, what kept the last one from being written, or that this start is superseded.
        """
        self.control.save = False
        if self.saved_step == self.state.step:
            return
        self.settle()
        with self.clock.paused(), self.account.spending("save"):
            began = time()
            self.state.data = place_in_data(self.data, self.state, self.config)
            try:
                folder = self.checkpoints.save(self.engine.model, self.optimizer, self.state)
            except UserError as error:
                # A later start has taken the run over: what this one goes on with is of no use.
                if last or error.exit_code == EXIT_SUPERSEDED:
                    raise
                self.failed_saves += 1
                logger.error("no checkpoint of step %d, training goes on: %s", self.state.step, describe(error))
                return
            self.recorder.set("checkpoint_seconds", time() - began)
            if self.attempt.speaks:
                # Other nodes may not see the folder yet under its name.
                self.recorder.set("checkpoint_bytes", sum(path.stat().st_size for path in folder.iterdir()))
            self.recorder.set("last_checkpoint_timestamp_seconds", time())
            self.recorder.set("last_checkpoint_step", self.state.step)
            self.recorder.flush(self.state.step, kind="checkpoint")
            self.attempt.step = self.saved_step = self.state.step
            self.attempt.say("running")


def place_in_data(data: GlobalBatches, state: RunState, config: Config) -> dict[str, Any]:
    """The reader's state behind the clips of all steps attempted; a batch read for a step not taken does not count."""
    return {**data.state_dict(), "position": state.attempted_steps * config.train.global_batch}


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has used: of its GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
