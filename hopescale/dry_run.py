"""`run.dry_run=true`: one step and one checkpoint of a job, on the machines that it will run on, and nothing is kept.

What would end a run in its first hour ends a dry run in its first minute: memory that does not suffice, ranks that
cannot talk to each other, a port, data or a folder that one node does not see. It makes no evaluation and sees no later
phase of a curriculum. One that fails leaves its folder with the logs in it, until the next one of the same `run.dir`.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from hopescale.checkpoint.staging import committed
from hopescale.config.schema import Config
from hopescale.logs import close_files
from hopescale.parallel.agreement import Together, decide_on_first
from hopescale.run_folder import RunFolder
from hopescale.trainer import Trainer, peak_memory_bytes

logger = logging.getLogger(__name__)

SUFFIX = ".dry-run"


def beside(folder: Path) -> Path:
    """Where the dry run of a run in this folder leaves what it writes."""
    folder = folder.absolute()
    return folder.with_name(folder.name + SUFFIX)


def rehearsal(config: Config) -> Config:
    """The same run in a folder of its own beside the one it will have, so that nothing is resumed or overwritten."""
    run = config.run
    folder = None if run.dir is None else str(beside(Path(run.dir)))
    return config.model_copy(update={"run": run.model_copy(update={"dir": folder, "name": f"{run.name}{SUFFIX}"[:80]})})


def rehearse(trainer: Trainer, began: float) -> None:
    """Read a batch, take a step, publish its figures, save and load a checkpoint.

    Args:
        trainer: Of a run that has not taken a step.
        began: When building began, by the monotonic clock.

    Raises:
        UserError: What the run itself would end with, on all ranks.
    """
    seconds = {"build": time.monotonic() - began}

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        seconds[what] = time.monotonic() - started

    with timed("read a batch"):
        batches = trainer.load(iter(trainer.data))
    with timed("take a step"):
        result = trainer.step(batches)
        # The host runs ahead of a device.
        float(result.objective)
    with timed("publish figures"):
        trainer.log()
    with timed("save"):
        trainer.save()
    newest = committed(trainer.checkpoints.root)[0]
    written = sum(path.stat().st_size for path in newest.iterdir())
    with timed("load"):
        trainer.checkpoints.restore(newest, trainer.engine.model, trainer.engine.optimizer)
        trainer.engine.take_loaded()
    memory = torch.tensor(float(peak_memory_bytes(trainer.device)), dtype=torch.float64)
    dist.all_reduce(memory, dist.ReduceOp.MAX)
    for what, spent in seconds.items():
        logger.info("  %-16s %8.2f s", what, spent)
    logger.info("  %-16s %8.2f GiB on the rank that needs most", "memory", float(memory) / 2**30)
    logger.info("  %-16s %8.2f GiB", "checkpoint", written / 2**30)
    if result.skipped:
        logger.warning("the gradients of this batch are not finite: a run would skip it")


def forget(run: RunFolder) -> None:
    """Remove all that a dry run has left, once nothing in it is open any more, and say so."""
    with Together():
        close_files()
    decide_on_first(lambda: shutil.rmtree(run.path))
    logger.info(
        "dry run: the job starts, reads, steps, saves and loads on %d ranks; nothing was kept", dist.get_world_size()
    )


def forget_earlier(run: RunFolder) -> None:
    """Remove the checkpoints of a dry run that failed: none is to be resumed."""
    if run.checkpoints.is_dir():
        shutil.rmtree(run.checkpoints)
