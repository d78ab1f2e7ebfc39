"""Saving and loading: DCP for tensors, our manifest for the commit."""

from __future__ import annotations

import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.optim import Optimizer

from data_pipeline.cache import sync_folder
from hopescale import __version__
from hopescale.errors import CheckpointError, Problem

from . import contents
from .contents import RunState
from .manifest import describe, verify, write_manifest
from .storage import TENSORS_FILE, RawReader, RawWriter

STEP_FOLDER = re.compile(r"step-(\d{9,})")


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step-{step:09d}"


def committed(root: Path) -> list[Path]:
    """Folders of committed checkpoints, newest first; what an interrupted save left is not among them."""
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if STEP_FOLDER.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


class CheckpointManager:
    """Saves into a fresh folder, hashes, writes the manifest, renames, then deletes what is too old.

    Every rank calls every method. A folder `step-…` exists only with a complete manifest in it.

    Args:
        root: RUN/checkpoints.
        keep: newest committed checkpoints to keep.
        config: resolved configuration, copied into each manifest.
    """

    def __init__(self, root: Path, keep: int, config: dict[str, Any]) -> None:
        self.root, self.keep, self.config = root, keep, config
        self.rank = dist.get_rank()

    def save(self, model: nn.Module, optimizer: Optimizer, state: RunState) -> Path:
        """Commit a checkpoint of this step and return its folder; a step already committed is left as it is."""
        target = step_folder(self.root, state.step)
        part = self.root / f"{target.name}.{self._agreed_token()}.part"
        if target.exists():
            return target
        if self.rank == 0:
            part.mkdir(parents=True)
        dist.barrier()
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        dcp.save(contents.tensors(model, optimizer), storage_writer=RawWriter(part, self.rank), planner=planner)
        files: list[Any] = [None] * dist.get_world_size()
        own = part / f"rank-{self.rank:05d}.bin"
        dist.all_gather_object(files, (own.name, describe(own)))
        if self.rank == 0:
            content = {
                "hopescale": __version__,
                "torch": torch.__version__,
                "world_size": dist.get_world_size(),
                "state": state.to_json(),
                "optimizer_steps": contents.optimizer_steps(optimizer),
                "config": self.config,
            }
            write_manifest(part, {**dict(files), TENSORS_FILE: describe(part / TENSORS_FILE)}, content)
            part.rename(target)
            sync_folder(self.root)
            self._delete_old()
        dist.barrier()
        return target

    def restore(self, folder: Path, model: nn.Module, optimizer: Optimizer) -> RunState:
        """Load a verified checkpoint into model and optimizer, on any number of ranks.

        Raises:
            CheckpointError: the checkpoint is damaged, or of another model or optimizer.
        """
        manifest = verify(folder)
        load_tensors(folder, contents.tensors(model, optimizer))
        contents.restore_optimizer_steps(optimizer, manifest["optimizer_steps"])
        return RunState.from_json(manifest["state"])

    def _agreed_token(self) -> str:
        token = [secrets.token_hex(4)]
        dist.broadcast_object_list(token, src=0)
        return token[0]

    def _delete_old(self) -> None:
        for old in committed(self.root)[self.keep :]:
            trash = old.with_name(old.name + ".trash")
            old.rename(trash)
            shutil.rmtree(trash)
        for stale in self.root.glob("step-*.trash"):
            shutil.rmtree(stale)


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
    dcp.load(dict(into), storage_reader=reader, planner=planner)
