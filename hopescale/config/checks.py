"""Rules between sections; rules inside one live in its own schema."""

from __future__ import annotations

from collections.abc import Iterator

from hopescale.errors import Problem
from hopescale.model.passes import most_writes
from hopescale.slurm.schema import seconds_of

from .schema import Config

MAX_CMS_PERIODS = 8
"""Each makes up to three optimizer groups, and metrics take 32 (`metrics/recorder.py`)."""


def cross_section_problems(config: Config) -> Iterator[Problem]:
    """Every rule between sections that a configuration breaks."""
    patience, eval_every = config.run.early_stop.patience, config.train.eval_every
    if patience and not eval_every:
        rule = "counts evaluations, and train.eval_every=0 runs none during training"
        yield Problem("run.early_stop.patience", patience, rule, "set train.eval_every, or leave patience at 0")
    micro_batch = config.train.micro_batch
    if micro_batch is not None and micro_batch > config.train.global_batch:
        rule = f"is larger than train.global_batch={config.train.global_batch}, so it can never be filled"
        yield Problem("train.micro_batch", micro_batch, rule, "lower it")
    elif micro_batch is not None and micro_batch < config.train.global_batch and config.model.shares_memory_over_batch:
        rule = f"splits the batch of {config.train.global_batch} clips, which share memories (model.memory.scope=batch)"
        yield Problem("train.micro_batch", micro_batch, rule, "leave it out, or lower train.global_batch to it")
    yield from _jump_problems(config)
    yield from clip_length_problems(config, config.model.frames, "model.frames")
    yield from _plateau_problems(config)
    yield from _cms_period_problems(config)
    yield from _recompute_problems(config)
    yield from config.parallel.problems()
    strategy = config.optimizer.plan.strategy
    if config.parallel.zero_stage and strategy in ("gram", "block_periodic"):
        rule = f"needs matrices that are cut along one side, and ZeRO {config.parallel.zero_stage} cuts them anywhere"
        yield Problem("optimizer.plan.strategy", strategy, rule, "set it to auto or owner, or train with parallel=fsdp")
    if config.parallel.offload_optimizer and "m3" in {group.algorithm for _, group in config.optimizer.groups}:
        rule = "steps on the host, where no GPU orthogonalises M3's matrices"
        yield Problem("parallel.offload_optimizer", True, rule, "set optimizer=adamw, or leave it out")
    yield from _longterm_problems(config)
    yield from _slurm_problems(config)
    if config.metrics.token_file is not None and config.metrics.listen == "off":
        rule = "is ignored with metrics.listen=off"
        yield Problem("metrics.token_file", config.metrics.token_file, rule, "leave it out, or set metrics.listen=node")
    if config.metrics.discovery is not None and config.metrics.listen == "off":
        rule = "has nothing to name with metrics.listen=off"
        yield Problem("metrics.discovery", config.metrics.discovery, rule, "leave it out, or set metrics.listen=node")
    if config.metrics.textfile is not None and config.metrics.listen != "off":
        rule = f"would have every number read twice with metrics.listen={config.metrics.listen}"
        yield Problem("metrics.textfile", config.metrics.textfile, rule, "leave it out, or set metrics.listen=off")


def _slurm_problems(config: Config) -> Iterator[Problem]:
    cluster = config.cluster
    if cluster.time is not None and seconds_of(cluster.time) <= cluster.grace_seconds:
        rule = f"is over before a job has trained at all: it begins to save {cluster.grace_seconds} s before the end"
        yield Problem("cluster.time", cluster.time, rule, "ask for more time, or lower cluster.grace_seconds")
    if cluster.container is None:
        rule, fix = "is ignored without cluster.container", "leave it out, or name an image"
        if cluster.container_runtime is not None:
            yield Problem("cluster.container_runtime", cluster.container_runtime, rule, fix)
        if cluster.mounts:
            yield Problem("cluster.mounts", ",".join(cluster.mounts), rule, fix)


def _jump_problems(config: Config) -> Iterator[Problem]:
    objective, model = config.objective, config.model
    if not model.can_jump:
        rule = "needs model.temporal_embeddings: without them nothing tells a jump which frame to aim at"
        fix = "set model.temporal_embeddings=true"
        weight = max(stage.jump_weight for stage in objective.stages)
        if weight:
            yield Problem("objective.jump_weight", weight, rule, f"{fix}, or objective.jump_weight=0")
        if config.run.early_stop.patience and config.run.early_stop.metric == "skill_jump":
            yield Problem("run.early_stop.metric", "skill_jump", rule, f"{fix}, or watch another skill")


def clip_length_problems(config: Config, frames: int, whose: str) -> Iterator[Problem]:
    """What clips of so many frames are too short for, in the objective, a phase of its curriculum, or the memories.

    Args:
        config: of the run.
        frames: stored frames of a clip.
        whose: what has so many, for messages.
    """
    yield from _horizon_problems(config, frames, whose)
    yield from _detach_problems(config, frames, whose)
    yield from _auxiliary_problems(config, frames, whose)


def _horizon_problems(config: Config, frames: int, whose: str) -> Iterator[Problem]:
    objective = config.objective
    goals, horizons = frames - objective.jump_context, max(stage.jump_horizons for stage in objective.stages)
    if config.model.can_jump and goals < 1:
        rule = f"is too large: of the {frames} frames of {whose} there are none to jump to"
        yield Problem("objective.jump_context", objective.jump_context, rule, "set a smaller number")
    elif config.model.can_jump and horizons > goals:
        rule = f"is too many: of the {frames} frames of {whose} there are only {goals} frames to jump to"
        yield Problem("objective.jump_horizons", horizons, rule, "set a smaller number, in phases too")
    context = objective.rollout.context
    steps = max((stage.rollout.steps for stage in objective.stages if stage.rollout.weight), default=0)
    if steps and context + steps > frames:
        rule = f"with rollout.context={context} goes past the {frames} frames of {whose}"
        yield Problem("objective.rollout.steps", steps, rule, "set smaller numbers, in phases too")


def _plateau_problems(config: Config) -> Iterator[Problem]:
    every, model = config.metrics.every, config.model
    waiting = [(number, phase.plateau) for number, phase in enumerate(config.objective.curriculum) if phase.plateau]
    for number, plateau in waiting:
        if plateau.patience % every:
            field = f"objective.curriculum.{number}.plateau.patience"
            rule = f"must be a multiple of metrics.every={every}, the steps at which all ranks learn the surprise"
            yield Problem(field, plateau.patience, rule, "change one of them")
    if waiting and not (model.memory.self_modify and model.has_memory):
        rule = "writes no memory whose surprise could reach the plateau that objective.curriculum waits for"
        fix = "put an H block into it and a memory into model.memory.self_modify, or give the phase a start"
        yield Problem("model.block_pattern", "-".join(model.block_pattern), rule, fix)


def _cms_period_problems(config: Config) -> Iterator[Problem]:
    periods, group = config.model.cms.parameter_periods, config.optimizer.groups.cms.period
    if periods and group != 1:
        rule = "is ignored with model.cms.mode=param_period, where each level's own period counts"
        yield Problem("optimizer.groups.cms.period", group, rule, "leave it out, or set model.cms.mode=frame_mask")
    distinct = len(set(periods.values()) - {1})
    if distinct > MAX_CMS_PERIODS:
        rule = f"with mode=param_period may have at most {MAX_CMS_PERIODS} different periods above 1"
        yield Problem("model.cms.levels", f"{distinct} periods", rule, "let levels share a period")


def _longterm_problems(config: Config) -> Iterator[Problem]:
    if config.model.longterm is not None and not any(stage.teacher_weight for stage in config.objective.stages):
        rule = "carries over what the teacher branch leaves in memories, and that has no weight in any phase"
        fix = "leave model.longterm out, or set objective.teacher_weight above 0"
        yield Problem("model.longterm", config.model.longterm, rule, fix)


def _detach_problems(config: Config, frames: int, whose: str) -> Iterator[Problem]:
    model, memory = config.model, config.model.memory
    most = max(most_writes(model, stage, frames) for stage in config.objective.stages)
    # keep_start cuts before a write, all after it.
    if model.has_memory and memory.detach_interval > max(most - (memory.detach_rule == "keep_start"), 0):
        rule = f"never cuts anything: over {frames} frames of {whose} no pass writes a memory more than {most} times"
        yield Problem("model.memory.detach_interval", memory.detach_interval, rule, "lower it, or set 0")


def _auxiliary_problems(config: Config, frames: int, whose: str) -> Iterator[Problem]:
    weight, model = config.objective.auxiliary_weight, config.model
    chunk, transitions = model.memory.chunk_size, frames - 1
    reasons = (
        (not model.has_memory, f"model.block_pattern={'-'.join(model.block_pattern)}"),
        (not model.memory.self_modify, "model.memory.self_modify=[]"),
        (transitions <= chunk, f"model.memory.chunk_size={chunk} and the {transitions} transitions of {whose}"),
    )
    for holds, reason in reasons:
        if weight and holds:
            rule = f"is ignored with {reason}, where no memory is written"
            yield Problem("objective.auxiliary_weight", weight, rule, "leave it out")
            return


def _recompute_problems(config: Config) -> Iterator[Problem]:
    model = config.model
    if config.parallel.recompute != "chunk":
        return
    pattern = "-".join(model.block_pattern)
    reasons = (
        (not model.has_memory, f"model.block_pattern={pattern} has no block with a memory"),
        (model.memory.chunk_rule == "scan", "model.memory.chunk_rule=scan computes all chunks at once"),
        (not model.memory.self_modify, "model.memory.self_modify=[] writes no chunk"),
    )
    for holds, reason in reasons:
        if holds:
            rule = f"would recompute nothing: {reason}"
            yield Problem("parallel.recompute", "chunk", rule, "set parallel.recompute to block or none")
            return
