"""`launch/torchrun.sh` trains on ranks of this machine and exits with what the run says of itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.user_process import REPO_ROOT, run_as_user

pytestmark = pytest.mark.integration

INSTALLED = "REPO_ROOT={root}\nVENV={venv}\nprepare_environment() {{ :; }}\n"
"""What takes the place of `environment.sh`: this environment is the one to train in."""


@pytest.fixture
def torchrun_sh(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `launch/torchrun.sh ARGUMENTS`."""
    launch, python = tmp_path / "launch", tmp_path / "venv" / "bin" / "python"
    for folder in (launch, python.parent):
        folder.mkdir(parents=True)
    shutil.copy(REPO_ROOT / "launch" / "torchrun.sh", launch)
    (launch / "environment.sh").write_text(INSTALLED.format(root=REPO_ROOT, venv=python.parents[1]))
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run_as_user(["bash", str(launch / "torchrun.sh"), *arguments], tmp_path)

    return run


def test_a_dry_run_ends_well_and_leaves_nothing(torchrun_sh, small_run: list[str], tmp_path: Path) -> None:
    unnamed = [setting for setting in small_run if not setting.startswith("run.dir=")]
    for settings in (small_run, [*unnamed, f"run.root={tmp_path / 'runs'}"]):
        ended = torchrun_sh("2", *settings, "run.dry_run=true")
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert "saves and loads on 2 ranks; nothing was kept" in ended.stdout + ended.stderr
    assert not list(tmp_path.glob("run*/*"))


def test_it_exits_with_the_code_of_the_run(torchrun_sh, small_run: list[str], tmp_path: Path) -> None:
    stopped = torchrun_sh("1", *small_run, "train.stop_after=2")
    assert stopped.returncode == 75, stopped.stderr
    assert f"preempted: {tmp_path / 'run'}" in stopped.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["step"] == 2
    mistaken = torchrun_sh("1", *small_run, "optimizer.lr=-1")
    assert mistaken.returncode == 2
    assert mistaken.stderr.count("error: optimizer.lr=-1") == 1
