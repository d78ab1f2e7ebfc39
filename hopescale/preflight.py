"""Checks that need more than the configuration: data, ports, extras, folders. All of them before any process group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from data_pipeline.reader.clips import ClipReader
from hopescale.config.checks import clip_length_problems
from hopescale.config.schema import Config
from hopescale.errors import ConfigError, DataError, Problem, UserError
from hopescale.evaluate import CONTEXT
from hopescale.metrics.sinks.prometheus import check_endpoint
from hopescale.metrics.sinks.tensorboard import summary_writer
from hopescale.parallel.deepspeed import import_deepspeed
from hopescale.parallel.mesh import degrees_of
from hopescale.parallel.process_group import Launch
from hopescale.plan.optimizer import check_plan
from hopescale.plan.spread import Spread, model_of
from hopescale.run_folder import RunFolder

T = TypeVar("T")


def preflight(config: Config, launch: Launch) -> tuple[ClipReader, ClipReader]:
    """Check everything training needs, and open the training and the held-out clips.

    Raises:
        UserError: all problems at once.
    """
    problems: list[Problem] = []
    readers = _collect(problems, lambda: _open_readers(config, launch))
    _collect(problems, lambda: _check_run_folder(config))
    problems += config.cluster.started_differently(launch.world_size, launch.local_world_size)
    if _collect(problems, lambda: degrees_of(config.parallel, launch.world_size)) is not None:
        _collect(problems, lambda: check_plan(Spread(config, model_of(config), launch.world_size)))
    if config.parallel.engine == "deepspeed":
        _collect(problems, lambda: import_deepspeed(config.parallel))
    if config.metrics.tensorboard:
        _collect(problems, summary_writer)
    if launch.local_rank == 0:
        _collect(problems, lambda: check_endpoint(config.metrics))
    if readers is None or problems:
        raise UserError(problems)
    return readers


def open_held_out(config: Config) -> ClipReader:
    """The held-out clips alone, checked against the model.

    Raises:
        DataError: they are not there or do not fit.
    """
    reader = ClipReader(config.data, split="heldout", seed=config.train.seed)
    problems = _shape_problems(config, reader)
    if problems:
        raise DataError(problems)
    return reader


def _collect(problems: list[Problem], check: Callable[[], T]) -> T | None:
    try:
        return check()
    except UserError as error:
        problems.extend(error.problems)
        return None


def _open_readers(config: Config, launch: Launch) -> tuple[ClipReader, ClipReader]:
    train = ClipReader(config.data, split="train", seed=config.train.seed)
    problems = [*_shape_problems(config, train), *_size_problems(config, launch, train)]
    if problems:
        raise DataError(problems)
    return train, open_held_out(config)


def _check_run_folder(config: Config) -> None:
    folder = Path(config.run.dir if config.run.dir is not None else config.run.root).absolute()
    first = next(p for p in (folder, *folder.parents) if p.exists())
    if not first.is_dir():
        field = "run.dir" if config.run.dir is not None else "run.root"
        raise ConfigError(Problem(field, folder, f"{first} is not a folder", f"set {field} to another path"))
    if config.run.dir is not None and first == folder and RunFolder(folder).is_foreign:
        rule = "holds files, and they are not those of a run"
        raise ConfigError(Problem("run.dir", folder, rule, "name a new folder, an empty one, or one of an earlier run"))


def _shape_problems(config: Config, reader: ClipReader) -> list[Problem]:
    model, path = config.model, config.data.path
    pairs = [
        ("model.encoder_dim", model.encoder_dim, reader.encoder_dim, "channels a token"),
        ("model.grid", model.num_patches, reader.tokens, "tokens a frame"),
        ("model.action_dim", model.action_dim, reader.action_dim, "numbers an action"),
    ]
    if model.state_dim:
        pairs.append(("model.state_dim", model.state_dim, reader.state_dim, "numbers a state"))
    if model.extrinsics_dim and reader.extrinsics_dim:
        pairs.append(("model.extrinsics_dim", model.extrinsics_dim, reader.extrinsics_dim, "numbers of extrinsics"))
    problems = [
        Problem(field, mine, f"the data in {path} has {theirs} {what}", f"set {field} to fit the data")
        for field, mine, theirs, what in pairs
        if mine != theirs
    ]
    if reader.frames > model.frames:
        fix = f"set model.frames={reader.frames}, or data.frames to read less"
        problems.append(
            Problem("model.frames", model.frames, f"the data in {path} has clips of {reader.frames} frames", fix)
        )
    return [*problems, *_length_problems(config, reader.frames)]


def _length_problems(config: Config, frames: int) -> Iterator[Problem]:
    """What the clips are too short for."""
    objective, memory = config.objective, config.model.memory
    yield from clip_length_problems(config, frames, "a clip")
    watch = config.run.early_stop
    if watch.patience and watch.metric == "skill_context" and frames <= CONTEXT:
        rule = f"is of the frames after {CONTEXT} true ones, and the clips have {frames}"
        yield Problem("run.early_stop.metric", watch.metric, rule, "watch another skill")
    if config.model.has_memory and memory.chunk_size >= frames:
        rule = f"is more than the {frames - 1} frames that a clip of {frames} has to read"
        yield Problem("model.memory.chunk_size", memory.chunk_size, rule, "lower it")
    elif objective.waits_for_plateau and memory.chunk_size >= frames - 1:
        rule = f"leaves clips of {frames} frames without a memory write, so no plateau of their surprise is ever seen"
        yield Problem("model.memory.chunk_size", memory.chunk_size, rule, "lower it, or give the phases a start")


def _size_problems(config: Config, launch: Launch, train: ClipReader) -> Iterable[Problem]:
    batch = config.train.global_batch
    if batch < launch.world_size:
        rule = f"must be at least one clip for each of {launch.world_size} ranks"
        yield Problem("train.global_batch", batch, rule, "raise it, or start fewer ranks")
    if config.model.shares_memory_over_batch and launch.world_size > 1:
        rule = f"lets the clips of a batch share memories, so that it cannot be spread over {launch.world_size} ranks"
        fix = "start one rank" if config.model.compat != "none" else "start one rank, or set model.memory.scope=clip"
        yield Problem("model.memory.scope", config.model.memory.scope, rule, fix)
    if train.num_clips < batch:
        rule = f"has only {train.num_clips} training clips, fewer than train.global_batch={batch}"
        yield Problem("data.path", config.data.path, rule, "add clips or lower train.global_batch")
