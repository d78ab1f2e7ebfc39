"""Builds a run in one visible order and trains it. `torchrun … -m hopescale.train experiment=…` starts here."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch
import torch.distributed as dist

import data_pipeline
import hopescale
from data_pipeline.reader.batches import GlobalBatches
from data_pipeline.reader.clips import ClipReader
from hopescale import __version__
from hopescale.checkpoint.contents import RunState
from hopescale.checkpoint.manager import CheckpointManager
from hopescale.checkpoint.manifest import read_manifest
from hopescale.checkpoint.resume import check_same_curve, newest_valid
from hopescale.config.compose import load_config, to_tree
from hopescale.config.schema import Config
from hopescale.dry_run import forget, forget_earlier, rehearsal, rehearse
from hopescale.errors import EXIT_DONE, EXIT_PREEMPTED, EXIT_SUPERSEDED, ConfigError, Problem, UserError, describe
from hopescale.evaluate import held_out_errors, summarise
from hopescale.logs import log_to
from hopescale.metrics.open import open_recorder, serve_node
from hopescale.model.build import build_predictor
from hopescale.model.teaching import at_step
from hopescale.optim.routing import routing_table
from hopescale.optim.schedule_table import schedule_table
from hopescale.parallel.activation_checkpointing import recompute_blocks
from hopescale.parallel.agreement import Together, check_agreement, decide_on_first
from hopescale.parallel.engine import Engine, open_engine
from hopescale.parallel.materialise import parameters_on_meta
from hopescale.parallel.process_group import (
    Launch,
    choose_device,
    end_process,
    prepare_process,
    process_group,
    read_launch,
)
from hopescale.plan.spread import Spread, model_of
from hopescale.preflight import preflight
from hopescale.resilience.control_word import ControlWord
from hopescale.resilience.goodput import Goodput, process_age
from hopescale.resilience.preemption import StopRequests
from hopescale.run_folder import Attempt, RunFolder, make_run_folder
from hopescale.slurm.environment import SlurmJob, read_job
from hopescale.trainer import Trainer, place_in_data

# Not __name__: torchrun starts this file as __main__.
logger = logging.getLogger("hopescale.train")

SECONDS_TO_EXPLAIN = 20.0
"""How long the other ranks of a node wait for the one that prints what is wrong."""


def main(overrides: Sequence[str]) -> int:
    """Train as one rank of a launch, or alone.

    Returns:
        Exit code of this rank: 0 done, 2 the user's mistake, 71 no valid checkpoint, 72 diverged, 75 stopped before
        the end, 73 ranks disagree on what they computed, 74 a later start has taken the run over.
    """
    launch, config, joined = Launch(), None, False
    try:
        launch = read_launch()
        refuse_local_rank(overrides)
        config = load_config(overrides)
        config = rehearsal(config) if config.run.dry_run else config
        device = choose_device(config.parallel, launch)
        readers = preflight(config, launch)
        prepare_process(config.parallel, launch, device)
        with process_group(config.parallel, launch, device):
            joined = True
            return exit_code(train(config, launch, device, *readers), launch)
    except UserError as error:
        # What is wrong on another machine, a port or a folder, only that machine can tell.
        if launch.is_first or (config is not None and launch.local_rank == 0 and launch.rank > 0):
            print(describe(error), file=sys.stderr, flush=True)
        folder = run_folder_of(overrides) if config is None else config.run.dir
        if launch.is_first and folder is not None and error.exit_code != EXIT_SUPERSEDED:
            RunFolder(Path(folder)).refuse(error.exit_code, this_job())
        if launch.rank > 0:
            # The first rank that ends takes the others with it; the one that explains comes first.
            time.sleep(SECONDS_TO_EXPLAIN)
        return exit_code(error.exit_code, launch) if joined else error.exit_code


def exit_code(code: int, launch: Launch) -> int:
    """What a rank of a run that has ended in order exits with; whoever wants to know reads status.json.

    A launcher that may start ranks anew takes everything but 0 for a crash, and would undo a stop.
    """
    return EXIT_DONE if launch.may_restart else code


def run_folder_of(overrides: Sequence[str]) -> str | None:
    """The run folder among settings that are no configuration together."""
    given = [text.partition("=")[2].strip("'\"") for text in overrides if text.startswith("run.dir=")]
    return given[-1] if given else None


def this_job() -> SlurmJob | None:
    """The Slurm job around this process, where its variables make sense."""
    try:
        return read_job()
    except ConfigError:
        return None


def refuse_local_rank(overrides: Sequence[str]) -> None:
    """Explain what launchers add to the command line by themselves.

    Raises:
        ConfigError: one has.
    """
    for text in overrides:
        name, _, value = text.partition("=")
        if name.replace("-", "_") == "__local_rank":
            rule = "ranks are read from the launcher's variables, and this is none of the settings"
            fix = "start with `deepspeed --no_local_rank --module hopescale.train ...`, or with torchrun"
            raise ConfigError(Problem(name, value or "nothing", rule, fix))


def train(config: Config, launch: Launch, device: torch.device, data: ClipReader, held_out: ClipReader) -> int:
    """Train inside a process group and leave the outcome in the run folder."""
    began, job = time.monotonic(), read_job()
    run = RunFolder(decide_on_first(lambda: make_run_folder(config)))
    with ExitStack() as stack:
        requests = StopRequests(run.path if launch.is_first else None, None if job is None else job.ends_at)
        stack.enter_context(requests)
        stack.enter_context(closing(data))
        stack.enter_context(closing(held_out))
        with Together():
            if launch.is_first:
                stack.enter_context(closing(run.claim(job)))
        if config.run.dry_run:
            decide_on_first(lambda: forget_earlier(run))
        attempt = Attempt(run, decide_on_first(run.create), speaks=launch.is_first, job=job)
        if launch.world_size > launch.local_world_size:
            see_one_folder(run, launch)
        log_to(run.logs / f"rank-{launch.rank}.log", console=launch.is_first)
        logger.info("run: %s", run.path)
        stack.enter_context(attempt.failing_aloud())
        attempt.say("running")
        account = Goodput(run.goodput if launch.is_first else None, attempt.incarnation, age=process_age())
        stack.enter_context(account.ending_aloud(lambda: attempt.step))
        with Together():
            entry = serve_node(config, attempt, launch, stack)
        check_agreement({"configuration": config_hash(config), "code": code_hash(), "data": data.fingerprint()})
        report_unread(config, data)
        if launch.is_first:
            report_uneven(config, launch)
        engine = build(config, device, launch.world_size)
        checkpoints = CheckpointManager(run.checkpoints, config.checkpoint.keep, to_tree(config), attempt.incarnation)
        stack.enter_context(closing(checkpoints))
        batches = global_batches(config, launch, device, data, attempt)
        with account.spending("load"):
            state = resume(run, config, batches, checkpoints, engine)
        decide_on_first(lambda: run.write_config(config))
        groups = [group["name"] for group in engine.optimizer.param_groups]
        with Together():
            recorder = open_recorder(config, attempt, launch, groups, state.step, device, stack)
        recorder.set("run_info", 1, **run_info(config, attempt))
        if entry is not None:
            entry.run_has_begun = True
        control = ControlWord(requests)
        trainer = Trainer(
            config=config,
            engine=engine,
            data=stack.enter_context(closing(batches)),
            recorder=recorder,
            checkpoints=checkpoints,
            evaluate=lambda: evaluate(engine, config, held_out, device, launch, state, control),
            attempt=attempt,
            account=account,
            control=control,
            state=state,
            device=device,
            world_size=launch.world_size,
        )
        if config.run.dry_run:
            rehearse(trainer, began)
        else:
            outcome = trainer.run()
            code = EXIT_DONE if outcome == "finished" else EXIT_PREEMPTED
            attempt.say(outcome, code)
            account.outcome = outcome
            requests.granted(stop=True)
    if config.run.dry_run:
        forget(run)
        return EXIT_DONE
    logger.info("%s at step %d of %d: %s", outcome, state.step, config.train.steps, run.path)
    return code


def see_one_folder(run: RunFolder, launch: Launch) -> None:
    """Refuse a run folder that every node has for itself.

    Raises:
        ConfigError: on every rank, naming a node that sees another one.
    """
    mark = decide_on_first(run.leave_mark)
    with Together():
        run.look_for(mark)
    if launch.is_first:
        mark.unlink()


def report_unread(config: Config, data: ClipReader) -> None:
    """Say which fields of the clips the model has no input for, and the other way round."""
    if data.state_dim and not config.model.state_dim:
        logger.info("the %d numbers of the clips' states are not read: model.state_dim=0", data.state_dim)
    if data.extrinsics_dim and not config.model.extrinsics_dim:
        logger.info("the %d numbers of the extrinsics are not read: model.extrinsics_dim=0", data.extrinsics_dim)
    if config.model.extrinsics_dim and not data.extrinsics_dim:
        logger.info("the clips have no extrinsics: model.extrinsics_dim=%d zeros", config.model.extrinsics_dim)


def report_uneven(config: Config, launch: Launch) -> None:
    """Say so where shards pad most parameters."""
    remark = Spread(config, model_of(config), launch.world_size).uneven_shards()
    if remark is not None:
        logger.warning("%s", remark)


def run_info(config: Config, attempt: Attempt) -> dict[str, str]:
    """What the metric `hopescale_run_info` says of this incarnation."""
    return {
        "version": __version__,
        "torch": torch.__version__,
        "config_hash": config_hash(config),
        "incarnation": str(attempt.incarnation),
    }


def global_batches(
    config: Config, launch: Launch, device: torch.device, data: ClipReader, attempt: Attempt
) -> GlobalBatches:
    """This rank's share of every global batch."""
    return GlobalBatches(
        data,
        global_batch=config.train.global_batch,
        rank=launch.rank,
        world_size=launch.world_size,
        micro_batch=config.train.micro_batch or config.train.global_batch,
        device=device,
        bad_clips=attempt.run.logs / f"bad-clips-{launch.rank}.jsonl",
    )


def evaluate(
    engine: Engine,
    config: Config,
    held_out: ClipReader,
    device: torch.device,
    launch: Launch,
    state: RunState,
    control: ControlWord,
) -> dict[str, float | None]:
    """Skills on all held-out clips, shared among the ranks, after the steps done.

    Raises:
        Interrupted: on all ranks: the run is to stop.
    """
    try:
        errors = held_out_errors(
            at_step(engine.model, config.model.cms, state.step),
            held_out,
            jump_horizons=config.objective.jump_horizons if config.model.can_jump else 0,
            jump_context=config.objective.jump_context,
            device=device,
            rank=launch.rank,
            world_size=launch.world_size,
            shuffled=True,
            guard=lambda: control.part_of_evaluation(state.skipped_steps),
        )
    finally:
        engine.finish_evaluation()
    return summarise(errors.over_ranks(dist.all_reduce), sorted(set(held_out.partitions)))


def build(config: Config, device: torch.device, world_size: int) -> Engine:
    """Predictor and optimizer: build without memory, recompute, compile, spread, initialise, route to groups."""
    with parameters_on_meta():
        model = build_predictor(config.model)
    recompute_blocks(list(model.blocks), config.parallel.recompute)
    if config.parallel.compile:
        for block in model.blocks:
            block.compile()
    engine = open_engine(model, config, device, world_size)
    if dist.get_rank() == 0:
        logger.info("%s", routing_table(engine.optimizer.param_groups))
        for schedule in engine.optimizer.schedules():
            logger.info("%s", schedule_table(schedule))
    return engine


def resume(
    run: RunFolder,
    config: Config,
    batches: GlobalBatches,
    checkpoints: CheckpointManager,
    engine: Engine,
) -> RunState:
    """Go on from the newest valid checkpoint of the run folder, or start at step 0."""
    folder = decide_on_first(lambda: newest_valid(run.checkpoints))
    if folder is None:
        return RunState()
    check_same_curve(read_manifest(folder)["config"], to_tree(config))
    state = checkpoints.restore(folder, engine.model, engine.optimizer)
    engine.take_loaded()
    # An imported checkpoint has a place in no data yet: it starts behind the clips that its steps would have taken.
    batches.load_state_dict(state.data or place_in_data(batches, state, config))
    logger.info("resumed from %s at step %d", folder, state.step)
    return state


def config_hash(config: Config) -> str:
    """12 hex digits that identify a resolved configuration."""
    return hashlib.sha256(json.dumps(to_tree(config), sort_keys=True).encode()).hexdigest()[:12]


def code_hash() -> str:
    """12 hex digits over this package's and the data pipeline's sources: what a node with another copy differs in."""
    digest = hashlib.sha256()
    for package in (hopescale, data_pipeline):
        root = Path(package.__path__[0])
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
