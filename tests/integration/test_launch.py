"""`launch/torchrun.sh` trains on ranks of one machine or of several and exits with what the run says of itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
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

    def run(*arguments: str, within: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        return run_as_user([*within, "bash", str(launch / "torchrun.sh"), *arguments], tmp_path)

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


HEAD = "10.88.0.1"
MACHINES = f"""
set -e
ip link set lo up
ip address add {HEAD}/32 dev lo
for node in 0 1; do
  "$1" "$2" "$3" --node $node/2 --head {HEAD}:29400 "${{@:4}}" >out-$node 2>&1 & pids[node]=$!
done
for node in 0 1; do code=0; wait ${{pids[node]}} || code=$?; echo $code; done
"""
"""A network of their own in which two machines are called for; prints the code of each."""


@pytest.mark.requires("2ranks", "namespaces")
def test_two_machines_train_one_run_and_stop_together(torchrun_sh, small_run: list[str], tmp_path: Path) -> None:
    def start(*settings: str) -> list[int]:
        within = ["unshare", "--net", "bash", "-c", MACHINES, "machines"]
        ended = torchrun_sh("1", *small_run, *settings, "metrics.port=0", within=within)
        assert ended.returncode == 0, ended.stderr
        return [int(code) for code in ended.stdout.split()]

    def told() -> list[str]:
        return [(tmp_path / f"out-{node}").read_text() for node in (0, 1)]

    assert start("train.stop_after=2") == [75, 75], told()
    assert all(f"preempted: {tmp_path / 'run'}" in text for text in told())
    assert start() == [0, 0], told()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["incarnation"]) == ("finished", 1)
    ranks = {path.stem for path in (tmp_path / "run" / "logs").glob("rank-*.log")}
    assert {"rank-0", "rank-1"} <= {name[:6] for name in ranks}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["0"], "NUM_RANKS=0: must be a whole number above 0"),
        (["two"], "NUM_RANKS=two: must be a whole number above 0"),
        (["1", "--nodes", "2"], "--nodes: is no option"),
        (["1", "--node"], "--node needs a value"),
        (["1", "--node", "2/2"], "--node 2/2: must be I/N"),
        (["1", "--node", "0"], "--node 0: must be I/N"),
        (["1", "--head", "10.0.0.5"], "--head 10.0.0.5: must be ADDRESS:PORT"),
        (["1", "--head", "10.0.0.5:70000"], "--head 10.0.0.5:70000: must be ADDRESS:PORT"),
        (["1", "--head", "10.0.0.5:29400"], "one machine meets nobody"),
        (["1", "--node", "0/2", "run.dir=r"], "--head is missing"),
        (["1", "--node", "0/2", "--head", "127.0.0.1:29400", "run.dir=r"], "2 machines cannot meet there"),
        (["1", "--node", "1/2", "--head", "0x7f000001:29400", "run.dir=r"], "leads to this machine itself"),
        (["1", "--node", "0/2", "--head", "10.0.0.5:29400"], "run.dir is missing"),
    ],
)
def test_machines_that_could_not_meet_are_refused_before_anything_starts(
    torchrun_sh, arguments: list[str], told: str, tmp_path: Path
) -> None:
    refused = torchrun_sh(*arguments)
    assert refused.returncode == 2
    assert told in refused.stderr
    assert not (tmp_path / "r").exists()


def test_machines_that_share_the_repository_install_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    shutil.copy(REPO_ROOT / "launch" / "environment.sh", tmp_path / "launch")
    installs = "bring_up_to_date() { echo begins; sleep 0.3; echo ends; }"
    script = f"source launch/environment.sh; {installs}; prepare_environment demo & prepare_environment demo & wait"
    ended = run_as_user(["bash", "-c", script], tmp_path)
    assert ended.stdout.split() == ["begins", "ends", "begins", "ends"], ended.stderr
