"""Builds a run in one visible order and trains it. `torchrun … -m hopescale.train experiment=…` starts here."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from data_pipeline.reader import ClipReader, GlobalBatches
from hopescale import __version__
from hopescale.checkpoint.contents import RunState
from hopescale.checkpoint.manager import CheckpointManager
from hopescale.checkpoint.manifest import read_manifest
from hopescale.checkpoint.resume import check_same_curve, newest_valid
from hopescale.config.compose import load_config, to_tree
from hopescale.config.schema import Config
from hopescale.errors import EXIT_DONE, EXIT_PREEMPTED, DataError, Problem, UserError
from hopescale.evaluate import held_out_errors, summarise
from hopescale.logs import log_to
from hopescale.metrics.open import open_recorder
from hopescale.model.init import initialise
from hopescale.model.predictor import HopePredictor
from hopescale.optim.m3 import M3
from hopescale.optim.routing import parameter_groups, routing_table
from hopescale.parallel.activation_checkpointing import recompute_blocks
from hopescale.parallel.agreement import check_agreement, decide_on_first
from hopescale.parallel.fsdp import shard_model
from hopescale.parallel.mesh import build_mesh
from hopescale.parallel.process_group import Launch, choose_device, prepare_process, process_group, read_launch
from hopescale.preflight import check_ports, describe_error, open_readers
from hopescale.run_folder import RunFolder, new_run_path
from hopescale.trainer import Trainer

# Not __name__: torchrun starts this file as __main__.
logger = logging.getLogger("hopescale.train")


def main(overrides: Sequence[str]) -> int:
    """Train as one rank of a launch, or alone.

    Returns:
        Exit code of this rank: 0 done, 2 the user's mistake, 71 no valid checkpoint, 75 stopped before the end.
    """
    launch = Launch()
    try:
        launch = read_launch()
        config = load_config(overrides)
        device = choose_device(config.parallel, launch)
        readers = open_readers(config, launch)
        check_ports(config, launch)
        prepare_process(config.parallel, launch, device)
        with process_group(config.parallel, launch, device):
            return train(config, launch, device, *readers)
    except UserError as error:
        if launch.is_first:
            print(describe_error(error), file=sys.stderr, flush=True)
        return error.exit_code


def train(config: Config, launch: Launch, device: torch.device, data: ClipReader, held_out: ClipReader) -> int:
    """Train inside a process group and leave the outcome in the run folder."""
    run = RunFolder(Path(decide_on_first(lambda: str(new_run_path(config)))))
    incarnation = decide_on_first(lambda: run.create(config))
    log_to(run.logs / f"rank-{launch.rank}.log", console=launch.is_first)
    check_agreement({"configuration": config_hash(config), "data": data.fingerprint()})
    state = RunState()

    def report(name: str, code: int) -> int:
        if launch.is_first:
            run.write_status(name, code=code, step=state.step, incarnation=incarnation)  # type: ignore[arg-type]
        return code

    report("running", EXIT_DONE)
    try:
        model, optimizer = build(config, device, launch.world_size)
        checkpoints = CheckpointManager(run.checkpoints, config.checkpoint.keep, to_tree(config))
        state = resume(run, config, data, checkpoints, model, optimizer)
        batches = GlobalBatches(
            data,
            global_batch=config.train.global_batch,
            seed=config.train.seed,
            rank=launch.rank,
            world_size=launch.world_size,
            micro_batch=config.train.micro_batch,
            start_step=state.attempted_steps,
        )
        groups = [group["name"] for group in optimizer.param_groups]
        info = {"version": __version__, "torch": torch.__version__}
        info |= {"config_hash": config_hash(config), "incarnation": str(incarnation)}
        recorder, endpoint = open_recorder(config, run, launch, groups, info, state.step, device)

        def evaluate() -> dict[str, float | None]:
            errors = held_out_errors(
                model,
                held_out,
                jump_horizons=config.objective.jump_horizons,
                device=device,
                rank=launch.rank,
                world_size=launch.world_size,
            )
            return summarise(errors.over_ranks(dist.all_reduce), sorted(set(held_out.partitions)))

        with endpoint, closing(batches), closing(recorder):
            trainer = Trainer(
                config,
                model,
                optimizer,
                batches,
                recorder,
                checkpoints,
                evaluate,
                state,
                device,
                launch.world_size,
            )
            outcome = trainer.run()
    except UserError as error:
        report("failed", error.exit_code)
        raise
    except BaseException:
        report("failed", 1)
        raise
    return report(outcome, EXIT_DONE if outcome == "finished" else EXIT_PREEMPTED)


def build(config: Config, device: torch.device, world_size: int) -> tuple[nn.Module, M3]:
    """Predictor and optimizer: build, initialise, recompute, shard, then route parameters to groups."""
    model = HopePredictor(config.model)
    initialise(model, config.train.seed)
    model.to(device)
    recompute_blocks(list(model.blocks), config.parallel.recompute)
    mesh = build_mesh(device, world_size)
    shard_model(model, list(model.blocks), mesh, reshard_after_forward=config.parallel.reshard_after_forward)
    groups = parameter_groups(model.named_parameters(), config.optimizer)
    if dist.get_rank() == 0:
        logger.info("%s", routing_table(groups))
    return model, M3(groups, config.optimizer)


def resume(
    run: RunFolder, config: Config, data: ClipReader, checkpoints: CheckpointManager, model: nn.Module, optimizer: M3
) -> RunState:
    """Go on from the newest valid checkpoint of the run folder, or start at step 0."""
    order = {"seed": config.train.seed, "global_batch": config.train.global_batch, "data": data.fingerprint()}
    folder = decide_on_first(lambda: newest_valid(run.checkpoints))
    if folder is None:
        return RunState(order=order)
    check_same_curve(read_manifest(folder)["config"], to_tree(config))
    state = checkpoints.restore(folder, model, optimizer)
    if state.order != order:
        raise DataError(
            Problem(
                "data.path",
                config.data.path,
                f"this run counts its position in other data: {state.order}, now {order}",
                "resume with the same data set and data.view, or start a new run",
            )
        )
    logger.info("resumed from %s at step %d", folder, state.step)
    return state


def config_hash(config: Config) -> str:
    """12 hex digits that identify a resolved configuration."""
    return hashlib.sha256(json.dumps(to_tree(config), sort_keys=True).encode()).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
