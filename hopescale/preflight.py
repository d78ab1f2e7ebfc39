"""Checks that need more than the configuration: data, ports, ranks. All of them before any process group exists."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.reader import ClipReader
from hopescale.config.schema import Config
from hopescale.errors import ConfigError, DataError, Problem, UserError
from hopescale.metrics.sinks.prometheus import check_endpoint
from hopescale.parallel.process_group import Launch


def open_readers(config: Config, launch: Launch) -> tuple[ClipReader, ClipReader]:
    """The training and the held-out clips, checked against the rest of the configuration.

    Raises:
        UserError: every rule that is broken.
    """
    if config.data.path is None:
        raise ConfigError(
            Problem("data.path", "null", "must name a folder made by `hopescale data shard`", "set data.path=FOLDER")
        )
    folder = Path(config.data.path)
    train = ClipReader(folder, config.data, split="train", seed=config.train.seed)
    held_out = ClipReader(folder, config.data, split="heldout", seed=config.train.seed)
    problems = [*_shape_problems(config, train), *_size_problems(config, launch, train, held_out)]
    if problems:
        raise DataError(problems)
    return train, held_out


def check_ports(config: Config, launch: Launch) -> None:
    """Refuse a metrics port that is taken, on the rank that would serve it.

    Raises:
        UserError: the port cannot be bound, or the endpoint's settings do not fit together.
    """
    if launch.local_rank == 0:
        check_endpoint(config.metrics)


def _shape_problems(config: Config, reader: ClipReader) -> list[Problem]:
    model = config.model
    pairs = [
        ("model.encoder_dim", model.encoder_dim, reader.encoder_dim, "channels a token"),
        ("model.grid", model.num_patches, reader.tokens, "tokens a frame"),
        ("model.action_dim", model.action_dim, reader.action_dim, "numbers an action"),
        ("model.state_dim", model.state_dim, reader.state_dim, "numbers a state"),
    ]
    problems = [
        Problem(field, mine, f"the data in {config.data.path} has {theirs} {what}", f"set {field} to fit the data")
        for field, mine, theirs, what in pairs
        if mine != theirs and not (field == "model.state_dim" and mine == 0)
    ]
    if reader.frames > model.frames:
        rule = f"the data in {config.data.path} has clips of {reader.frames} frames"
        problems.append(
            Problem(
                "model.frames", model.frames, rule, f"set model.frames={reader.frames}, or data.frames to read less"
            )
        )
    if config.objective.jump_weight and config.objective.jump_horizons > reader.frames - 1:
        rule = f"a clip of {reader.frames} frames has only {reader.frames - 1} frames to jump to"
        problems.append(
            Problem("objective.jump_horizons", config.objective.jump_horizons, rule, "set a smaller number")
        )
    return problems


def _size_problems(config: Config, launch: Launch, train: ClipReader, held_out: ClipReader) -> list[Problem]:
    batch, problems = config.train.global_batch, []
    if batch < launch.world_size:
        rule = f"must be at least one clip for each of {launch.world_size} ranks"
        problems.append(Problem("train.global_batch", batch, rule, "raise it, or start fewer ranks"))
    if train.num_clips < batch:
        rule = f"{config.data.path} has only {train.num_clips} training clips, fewer than one global batch of {batch}"
        problems.append(Problem("data.path", config.data.path, rule, "add clips or lower train.global_batch"))
    if held_out.num_clips == 0:
        rule = "has no held-out clips to evaluate on"
        problems.append(Problem("data.path", config.data.path, rule, "shard again with a held-out split"))
    return problems


def describe_error(error: UserError) -> str:
    """What a user sees: one paragraph a problem, no traceback."""
    return "\n".join(f"error: {problem}" for problem in error.problems)
