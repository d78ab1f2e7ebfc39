"""Joining the other ranks: the only place that reads the launcher's variables and starts a process group."""

from __future__ import annotations

import atexit
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from hopescale.errors import ConfigError, Problem

from .rendezvous import Place, meet
from .schema import ParallelConfig

STARTED_BY = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}
"""How many processes other launchers say that they have started."""


@dataclass(frozen=True)
class Launch:
    """Which rank this process is, as the launcher says (torchrun or deepspeed), or the only one."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launched: bool = False
    """Whether a launcher started this process."""
    may_restart: bool = False
    """Whether the launcher starts ranks anew that end with another code than 0."""

    @property
    def is_first(self) -> bool:
        """Rank 0 of all."""
        return self.rank == 0


def read_launch() -> Launch:
    """Read the variables of torchrun or deepspeed; without them this is a run of one rank.

    Raises:
        ConfigError: some of the variables are set and others are not, or one is not a number, or a rank is not below
            how many there are; or none is set, and this is one of several processes that srun or mpirun has started.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if "LOCAL_SIZE" in os.environ:
        # As deepspeed calls it.
        given.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
    if not given:
        _refuse_untold()
        return Launch()
    bad = [name for name in names if not given.get(name, "").isdecimal()]
    if bad:
        rule = f"must be a whole number: a launcher sets all of {', '.join(names)}"
        raise ConfigError([Problem(name, given.get(name), rule, "start with torchrun, or export it") for name in bad])
    may_restart = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    launch = Launch(*(int(given[name]) for name in names), launched=True, may_restart=may_restart)
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if int(given[rank]) >= int(given[size]):
            rule = f"ranks count from 0 to {size}={given[size]} less 1"
            raise ConfigError(Problem(rank, given[rank], rule, "start every node with the same numbers, once"))
    return launch


def _refuse_untold() -> None:
    """Refuse to be one of many processes that would each train alone, into folders of their own."""
    for name, launcher in STARTED_BY.items():
        if os.environ.get(name, "1") not in ("", "1"):
            rule = f"{launcher} has started so many processes, and none is told its rank"
            fix = f"let it start one process a node, and that one the ranks: {launcher} torchrun ... -m hopescale.train"
            raise ConfigError(Problem(name, os.environ[name], rule, fix))


def read_place() -> Place:
    """Read where the launcher lets ranks meet.

    Raises:
        ConfigError: torchrun may start the ranks of several nodes anew around one store. Its agents count restarts each
            for itself, so that ranks would meet what an earlier round has left there.
    """
    held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restarts, nodes = (os.environ.get(name, "0") for name in ("TORCHELASTIC_MAX_RESTARTS", "GROUP_WORLD_SIZE"))
    if held and int(nodes) > 1 and int(restarts) > 0:
        rule = f"must be 1 where torchrun may start ranks of {nodes} nodes anew (--max-restarts {restarts})"
        fix = "export it on every node, with --rdzv-backend c10d; or start with --max-restarts 0"
        name = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
        raise ConfigError(Problem(name, os.environ.get(name), rule, fix))
    return Place(
        address=os.environ.get("MASTER_ADDR", ""),
        port=os.environ.get("MASTER_PORT", ""),
        held=held,
        attempt=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if held else "0",
    )


def choose_device(config: ParallelConfig, launch: Launch) -> torch.device:
    """The device of this rank.

    Raises:
        ConfigError: CUDA is asked for and there is none, or there are fewer devices than ranks on this node.
    """
    found = torch.cuda.device_count() if config.device != "cpu" else 0
    if config.device == "cpu" or (config.device == "auto" and found == 0):
        return torch.device("cpu")
    if found < launch.local_world_size:
        raise ConfigError(
            Problem(
                "parallel.device",
                config.device,
                f"needs one CUDA device for each of this node's {launch.local_world_size} ranks, found {found}",
                "start fewer ranks a node, or set parallel.device=cpu",
            )
        )
    return torch.device("cuda", launch.local_rank)


def prepare_process(config: ParallelConfig, launch: Launch, device: torch.device) -> None:
    """Set threads, denormals and the CUDA device of this process."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(config.threads_per_rank or max(1, usable // launch.local_world_size))
    # Decaying momenta and fast weights reach denormals, on which CPUs compute tens of times slower.
    torch.set_flush_denormal(True)
    if device.type == "cuda":
        torch.cuda.set_device(device)


@contextmanager
def process_group(config: ParallelConfig, launch: Launch, device: torch.device) -> Iterator[None]:
    """A process group for the length of the block: NCCL on CUDA, gloo on CPU.

    A run of one rank gets a group of one, so that it takes the same path as many.

    Raises:
        ConfigError: the ranks do not fit together, or not all of them come.
    """
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=config.timeout_seconds)
    with tempfile.TemporaryDirectory() as folder:
        alone = None if launch.launched else dist.FileStore(str(Path(folder) / "store"), 1)
        store = alone or meet(launch.rank, launch.world_size, read_place(), timeout)
        dist.init_process_group(backend, rank=launch.rank, world_size=launch.world_size, timeout=timeout, store=store)
        lacks_rank = config.engine == "deepspeed" and not launch.launched
        if lacks_rank:
            # DeepSpeed reads it as it trains, also in a process that no launcher has started.
            os.environ["LOCAL_RANK"] = str(launch.local_rank)
        try:
            yield
        finally:
            if lacks_rank:
                del os.environ["LOCAL_RANK"]
            dist.destroy_process_group()


def name_accelerator(config: ParallelConfig) -> None:
    """Tell DeepSpeed what it would otherwise find out by looking for compilers and drivers, with remarks on both.

    Raises:
        ConfigError: The environment tells it another device than the configuration.
    """
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    given = os.environ.get("DS_ACCELERATOR", device)
    if given != device:
        rule = f"DeepSpeed would use {given}, and parallel.device={config.device} is {device} here"
        raise ConfigError(Problem("DS_ACCELERATOR", given, rule, "unset it, or set parallel.device"))
    os.environ["DS_ACCELERATOR"] = device


def end_process(code: int) -> NoReturn:
    """End this process with an exit code after a process group lived in it, without finalizing the interpreter.

    Functional collectives, and so DTensor and FSDP2, keep gloo's worker threads alive after `destroy_process_group`.
    Such a thread takes the GIL to release the tensors of its last collective; if by then the interpreter is being
    finalized, the thread is unwound through C++ frames that forbid it and the process aborts: "terminate called without
    an active exception", and a finished run reports signal 6. (https://github.com/pytorch/pytorch/pull/179291)
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
