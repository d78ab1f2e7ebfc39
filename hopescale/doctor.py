"""`hopescale doctor`: whether this machine has what a run needs, line by line, with the fix of each line that fails."""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.cuda.nccl import version as nccl_version

from data_pipeline.dataset.manifest import load_manifest
from hopescale.config.schema import Config
from hopescale.errors import UserError
from hopescale.parallel.deepspeed import TESTED
from hopescale.parallel.rendezvous import Place

State = Literal["ok", "note", "FAIL"]

PYTHONS = ((3, 11), (3, 14))
TORCHES = ((2, 13), (2, 14))
MOST_SKEW_SECONDS = 2.0
LEAST_FREE_BYTES = 10 << 30
SLOW_FSYNC_SECONDS = 1.0
CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        what: That was looked at.
        state: ok; note, for what is worth knowing and keeps nothing from working; FAIL.
        found: What there is.
        fix: What to do about it; empty if nothing.
    """

    what: str
    state: State
    found: str
    fix: str = ""


def examine(config: Config) -> list[Finding]:
    """Look at everything; what one check stumbles over is its finding and keeps no other from being made.

    Args:
        config: `run.root` and `run.dir`, `data.path` and `parallel` say what is needed.
    """
    checks: list[tuple[str, Callable[[Config], Iterator[Finding]]]] = [
        ("python", _python),
        ("torch", _torch),
        ("devices", _devices),
        ("deepspeed", _deepspeed),
        ("network", _network),
        ("rendezvous", _rendezvous),
        ("file system", _file_system),
        ("data", _data),
        ("slurm", _slurm),
    ]
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings += check(config)
        except Exception as error:
            findings.append(Finding(name, "FAIL", f"{type(error).__name__}: {error}", "see the message"))
    return findings


def _python(config: Config) -> Iterator[Finding]:
    del config
    fits = PYTHONS[0] <= sys.version_info[:2] < PYTHONS[1]
    fix = "" if fits else "make the environment with Python 3.11, 3.12 or 3.13"
    yield Finding("python", "ok" if fits else "FAIL", f"{platform.python_version()} at {sys.executable}", fix)


def _torch(config: Config) -> Iterator[Finding]:
    del config
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    fits = TORCHES[0] <= version < TORCHES[1]
    yield Finding(
        "torch", "ok" if fits else "FAIL", torch.__version__, "" if fits else "pip install 'torch>=2.13,<2.14'"
    )
    backends = [name for name in ("gloo", "nccl") if getattr(dist, f"is_{name}_available")()]
    yield Finding("collectives", "ok" if "gloo" in backends else "FAIL", ", ".join(backends) or "none")


def _devices(config: Config) -> Iterator[Finding]:
    count = torch.cuda.device_count()
    wanted = config.parallel.device == "cuda"
    if count:
        names = sorted({torch.cuda.get_device_name(number) for number in range(count)})
        nccl = ".".join(map(str, nccl_version())) if dist.is_nccl_available() else "none"
        yield Finding("gpus", "ok", f"{count}: {', '.join(names)}; CUDA {torch.version.cuda}, NCCL {nccl}")
    else:
        why = "torch is a build for CPUs" if torch.version.cuda is None else "no device is seen"
        fix = "install torch for CUDA, or set parallel.device=cpu" if wanted else ""
        yield Finding("gpus", "FAIL" if wanted else "note", f"none: {why}", fix)
    planned = config.cluster.gpus_per_node
    if planned is not None and count and planned != count:
        fix = "start as many ranks a node as planned, or change cluster.gpus_per_node"
        yield Finding(
            "cluster.gpus_per_node", "FAIL" if planned > count else "note", f"{planned}, and here are {count}", fix
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("cores", "ok", f"{cores} that this process may use")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield Finding("memory", "ok", _size(memory))


def _deepspeed(config: Config) -> Iterator[Finding]:
    wanted = config.parallel.engine == "deepspeed"
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        state: State = "FAIL" if wanted else "note"
        fix = "pip install 'hopescale[deepspeed]'" if wanted else ""
        yield Finding("deepspeed", state, "not installed; only parallel=deepspeed_zero* needs it", fix)
        return
    if version not in TESTED:
        state = "FAIL" if wanted else "note"
        yield Finding("deepspeed", state, f"{version}, which is not known here", f"pip install deepspeed=={TESTED[-1]}")
        return
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser()
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    with_what = "a compiler is there" if compiler else "there is no compiler"
    # Our settings need no extension, so neither is needed; whoever sees DeepSpeed compile wants to know all the same.
    yield Finding("deepspeed", "ok", f"{version}; it builds nothing at start ({with_what}, extensions in {folder})")


def _network(config: Config) -> Iterator[Finding]:
    del config
    names = [name for _, name in socket.if_nameindex()]
    yield Finding("interfaces", "ok", ", ".join(names))
    chosen = {name: os.environ[name] for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if name in os.environ}
    for variable, value in chosen.items():
        absent = _absent_interfaces(variable, value, names)
        fix = f"there is no {', '.join(absent)}: set {variable} to one of {', '.join(names)}" if absent else ""
        yield Finding(variable, "FAIL" if fix else "ok", value, fix)
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        fix = f"add {host} to /etc/hosts or DNS; other nodes look for the first one by its name"
        yield Finding("own name", "note", f"{host} cannot be resolved ({error})", fix)
        return
    loopback = address.startswith("127.")
    fix = "on several nodes give torchrun the first node's address in the cluster: --rdzv-endpoint=ADDRESS:PORT"
    yield Finding("own name", "note" if loopback else "ok", f"{host} is {address}", fix if loopback else "")


def _absent_interfaces(variable: str, value: str, names: list[str]) -> list[str]:
    """Wanted ones that are not there: gloo takes whole names and needs all of them, NCCL beginnings and needs one."""
    wanted = value.lstrip("=").split(",")
    if variable.startswith("GLOO"):
        return [name for name in wanted if name not in names]
    if value.startswith("^"):
        return []
    exact = value.startswith("=")
    there = any(name == one if exact else name.startswith(one) for one in wanted for name in names)
    return [] if there else wanted


def _rendezvous(config: Config) -> Iterator[Finding]:
    del config
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if address is not None and port is not None:
        yield _place(address, port)
    store = dist.TCPStore("127.0.0.1", 0, 1, True, timeout=timedelta(seconds=CONNECT_SECONDS))
    store.set("hopescale", "doctor")
    yield Finding("store", "ok", f"a TCPStore on this machine answers: {store.get('hopescale').decode()}")


def _place(address: str, port: str) -> Finding:
    if not Place(address, port).is_named:
        return Finding("rendezvous", "FAIL", f"{address}:{port}", "set MASTER_PORT to a number from 1 to 65535")
    try:
        with socket.create_connection((address, int(port)), timeout=CONNECT_SECONDS):
            return Finding("rendezvous", "ok", f"{address}:{port} answers")
    except ConnectionRefusedError:
        fix = "nobody listens there before rank 0 has started; if it has, check MASTER_PORT and the firewall"
        return Finding("rendezvous", "note", f"{address} can be reached, port {port} refuses", fix)
    except OSError as error:
        fix = "check MASTER_ADDR, the network between the nodes, and the firewall"
        return Finding("rendezvous", "FAIL", f"{address}:{port} cannot be reached ({error})", fix)


def _file_system(config: Config) -> Iterator[Finding]:
    wanted = Path(config.run.dir if config.run.dir is not None else config.run.root).expanduser().absolute()
    folder = next(path for path in (wanted, *wanted.parents) if path.exists())
    try:
        with _scratch(folder) as scratch:
            yield from _operations(scratch, folder)
    except OSError as error:
        fix = "name another folder by run.root or run.dir, or give this user the right to write"
        yield Finding("runs", "FAIL", f"nothing can be made in {folder} ({error.strerror})", fix)
        return
    free = shutil.disk_usage(folder).free
    fix = "make room, or keep fewer checkpoints: checkpoint.keep" if free < LEAST_FREE_BYTES else ""
    yield Finding("free space", "note" if fix else "ok", f"{_size(free)} in {folder}", fix)


def _operations(scratch: Path, folder: Path) -> Iterator[Finding]:
    part, whole = scratch / "a.part", scratch / "a"
    whole.write_bytes(b"old")
    began = time.monotonic()
    with part.open("wb") as file:
        file.write(b"new")
        file.flush()
        os.fsync(file.fileno())
    spent = time.monotonic() - began
    part.replace(whole)
    replaced = whole.read_bytes() == b"new" and not part.exists()
    fix = "checkpoints are committed by a rename: keep runs on a file system that has one"
    yield Finding("atomic rename", "ok" if replaced else "FAIL", f"in {folder}", "" if replaced else fix)
    slow = spent > SLOW_FSYNC_SECONDS
    fix = "checkpoints wait for it several times: keep runs on a faster file system" if slow else ""
    yield Finding("fsync", "note" if slow else "ok", f"{1000 * spent:.1f} ms", fix)
    yield _lock(scratch / "lock")
    skew = time.time() - whole.stat().st_mtime
    far = abs(skew) > MOST_SKEW_SECONDS
    fix = "let the nodes and the file server keep time: chronyc tracking" if far else ""
    yield Finding("time", "FAIL" if far else "ok", f"this node is {skew:+.2f} s from the file system", fix)


def _lock(path: Path) -> Finding:
    with path.open("w") as first, path.open("w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            fix = "mount it with locks, or keep runs elsewhere: nothing else keeps two jobs out of one run folder"
            return Finding("locks", "FAIL", f"cannot be taken ({error.strerror})", fix)
        with suppress(BlockingIOError):
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return Finding("locks", "FAIL", "two holders at once", "mount it with locks, or keep runs elsewhere")
    return Finding("locks", "ok", "one holder at a time")


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    if not os.access(folder, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    with tempfile.TemporaryDirectory(prefix=".hopescale-doctor-", dir=folder) as scratch:
        yield Path(scratch)


def _data(config: Config) -> Iterator[Finding]:
    path = config.data.path
    if path is None:
        yield Finding("data", "note", "none was named", "data.path=FOLDER looks at a data set too")
        return
    if "://" in path:
        yield Finding("data", "note", f"{path} is looked at when a run starts", "run.dry_run=true reads from it")
        return
    try:
        manifest = load_manifest(Path(path))
    except UserError as error:
        problem = error.problems[0]
        yield Finding("data", "FAIL", f"{problem.value}: {problem.rule}", problem.fix)
        return
    size = sum(shard.bytes for shard in manifest.shards)
    yield Finding("data", "ok", f"{manifest.num_clips} clips in {len(manifest.shards)} shards, {_size(size)}")


def _slurm(config: Config) -> Iterator[Finding]:
    job = {name: os.environ[name] for name in os.environ if name.startswith("SLURM_")}
    if "SLURM_JOB_ID" not in job:
        there = shutil.which("sbatch")
        yield Finding("slurm", "note", f"not in a job; sbatch is {there or 'not installed'}")
        return
    names = ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_NODEID", "SLURM_PROCID")
    found = ", ".join(f"{name.removeprefix('SLURM_')}={job[name]}" for name in names if name in job)
    nodes, tasks = job.get("SLURM_JOB_NUM_NODES"), job.get("SLURM_NTASKS")
    fix = ""
    if nodes is not None and tasks is not None and tasks != nodes:
        fix = "give srun one task a node (--ntasks-per-node=1): torchrun starts the ranks of its node"
    yield Finding("slurm", "note" if fix else "ok", found, fix)
    planned = config.cluster.nodes
    if planned is not None and nodes is not None and str(planned) != nodes:
        fix = "submit with as many nodes as planned, or change cluster.nodes: a run started so is refused"
        yield Finding("cluster.nodes", "FAIL", f"{planned}, and the job has {nodes}", fix)


def _size(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB"
