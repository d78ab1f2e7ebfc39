"""The command line as a user starts it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm_nodes import SlurmNodes
from tests.small_run import SMALL_MODEL, pack_small_data
from tests.user_process import run_as_user


@pytest.fixture
def hopescale(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `hopescale ARGUMENTS` in an empty folder and return exit code and output."""

    def run(*arguments: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
        return run_as_user([sys.executable, "-m", "hopescale.cli", *arguments], tmp_path, timeout)

    return run


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random clips of 6 tokens and 16 channels, 5 or 4 frames long."""
    return pack_small_data(tmp_path_factory.mktemp("small"))


@pytest.fixture
def small_run(small_data: Path, tmp_path: Path) -> list[str]:
    """Settings that train a tiny model on the small data."""
    return [*SMALL_MODEL, f"data.path={small_data}", f"run.dir={tmp_path / 'run'}", "metrics.port=0"]


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmNodes]:
    """Three nodes with 4 CPUs each, for all tests; `slurm` gives them in order to one test."""
    with SlurmNodes(tmp_path_factory.mktemp("slurm"), nodes=3) as nodes:
        yield nodes


@pytest.fixture
def slurm(slurm_cluster: SlurmNodes) -> Iterator[SlurmNodes]:
    """A Slurm cluster with three idle nodes. What a test leaves of jobs and faults is undone after it."""
    yield slurm_cluster
    slurm_cluster.restore()
