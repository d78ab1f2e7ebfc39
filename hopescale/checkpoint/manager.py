"""Saving and loading: DCP for tensors, our manifest for the commit."""

from __future__ import annotations

import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.optim import Optimizer

from data_pipeline.cache import sync_path
from hopescale import __version__
from hopescale.errors import CheckpointError, Problem, UserError
from hopescale.parallel.agreement import Together, decide_on_first

from . import contents
from .contents import RunState
from .manifest import describe, read_manifest, write_manifest
from .staging import Staging, committed, step_folder
from .storage import TENSORS_FILE, RawReader, RawWriter

logger = logging.getLogger(__name__)


class CheckpointManager:
    """Saves into a fresh folder, hashes, writes the manifest, renames, then deletes what is too old.

    Every rank calls every method; what one rank cannot do fails on all. A folder `step-…` exists only with a complete
    manifest in it.

    Args:
        root: RUN/checkpoints; what an interrupted save left in it is removed.
        keep: newest committed checkpoints to keep.
        config: resolved configuration, copied into each manifest.
        incarnation: of the run; smaller ones can commit no more from here on.

    Raises:
        Superseded: a larger one has begun.
    """

    def __init__(self, root: Path, keep: int, config: dict[str, Any], incarnation: int = 0) -> None:
        self.root, self.keep, self.config, self.incarnation = root, keep, config, incarnation
        self.rank = dist.get_rank()
        self.staging = decide_on_first(lambda: Staging(root, incarnation))

    def save(self, model: nn.Module, optimizer: Optimizer, state: RunState) -> Path:
        """Commit a checkpoint of this step and return its folder; a step already committed is left as it is.

        Raises:
            UserError: on all ranks, what kept any of them from writing; what was written is removed.
        """
        target = step_folder(self.root, state.step)
        part = decide_on_first(lambda: None if target.exists() else self.staging.fresh_folder(target.name))
        if part is None:
            return target
        try:
            self._write(part, target, model, optimizer, state)
        except UserError:
            # All ranks are here, and the next attempt may need the room.
            decide_on_first(self.staging.clear)
            raise
        return target

    def close(self) -> None:
        """End this incarnation's right to save; what it has committed stays."""
        if self.rank == 0:
            self.staging.close()

    def _write(self, part: Path, target: Path, model: nn.Module, optimizer: Optimizer, state: RunState) -> None:
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            dcp.save(contents.tensors(model, optimizer), storage_writer=RawWriter(part, self.rank), planner=planner)
        except CheckpointException as error:
            reasons = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
            fix = "make room or give this user access, and start again from the checkpoint before"
            raise UserError(Problem("checkpoint", part, f"could not be written ({reasons})", fix)) from error
        own = part / f"rank-{self.rank:05d}.bin"
        with Together():
            described = (own.name, describe(own))
        files: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(files, described)
        decide_on_first(lambda: self._commit(part, target, dict(files), optimizer, state))

    def restore(self, folder: Path, model: nn.Module, optimizer: Optimizer) -> RunState:
        """Load a checkpoint, which one rank has verified, into model and optimizer, on any number of ranks.

        Raises:
            CheckpointError: the checkpoint is of another model or optimizer.
        """
        manifest = read_manifest(folder)
        tensors = contents.tensors(model, optimizer, saved_by=manifest["world_size"])
        load_tensors(folder, tensors)
        contents.restore_rows(model, tensors)
        contents.restore_optimizer_steps(optimizer, manifest["optimizer_steps"])
        return RunState.from_json(manifest["state"])

    def _commit(
        self, part: Path, target: Path, files: dict[str, list[Any]], optimizer: Optimizer, state: RunState
    ) -> None:
        content = {
            "hopescale": __version__,
            "torch": torch.__version__,
            "world_size": dist.get_world_size(),
            "incarnation": self.incarnation,
            "state": state.to_json(),
            "optimizer_steps": contents.optimizer_steps(optimizer),
            "config": self.config,
        }
        write_manifest(part, {**files, TENSORS_FILE: describe(part / TENSORS_FILE)}, content)
        self.staging.commit(part, target)
        sync_path(self.root)
        try:
            for old in committed(self.root)[self.keep :]:
                shutil.rmtree(old.rename(old.with_name(old.name + ".trash")))
        except OSError as error:
            # The new checkpoint is safe; an old one too many must not end the run.
            logger.warning("an old checkpoint could not be deleted: %s", error)


def load_tensors(folder: Path, into: dict[str, torch.Tensor]) -> None:
    """Read a checkpoint's tensors into existing ones of the same names, dtypes and global shapes.

    Works in a process group and without one.

    Raises:
        CheckpointError: a name is missing, or has another dtype or shape.
    """
    reader = RawReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    for name, tensor in into.items():
        entry: Any = stored.get(name)
        if entry is None or entry.size != tensor.shape or entry.properties.dtype != tensor.dtype:
            found = "nothing" if entry is None else f"{list(entry.size)} {entry.properties.dtype}"
            rule = f"{name} must be {list(tensor.shape)} {tensor.dtype}, the checkpoint has {found}"
            raise CheckpointError(
                Problem("checkpoint", folder, rule, "use the configuration the checkpoint was made with")
            )
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        # Without a process group DCP reads in this process, as wanted, and warns about it.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(dict(into), storage_reader=reader, planner=planner)
