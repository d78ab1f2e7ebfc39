"""`launch/torchrun.sh` trains on ranks of one machine or of several and exits with what the run says of itself."""

from __future__ import annotations

import json
import shutil
import signal
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
hostname machine-0
unshare --net --uts sleep infinity &
other=$!
trap 'kill $other' EXIT
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.01; done
there() {{ nsenter --target $other --net --uts "$@"; }}
there hostname machine-1
ip link add eth0 type veth peer name eth0 netns $other
ip address add {HEAD}/24 dev eth0
there ip address add 10.88.0.2/24 dev eth0
for link in lo eth0; do ip link set $link up; there ip link set $link up; done
export GLOO_SOCKET_IFNAME=eth0
"$1" "$2" "$3" --node 0/2 --head {HEAD}:29400 "${{@:4}}" >out-0 2>&1 & first=$!
there "$1" "$2" "$3" --node 1/2 --head {HEAD}:29400 "${{@:4}}" >out-1 2>&1 & second=$!
for machine in $first $second; do code=0; wait $machine || code=$?; echo $code; done
"""
"""Two machines of names that lead nowhere, and a network of their own; prints with what code each ends."""


@pytest.mark.requires("2ranks", "networks")
def test_two_machines_train_one_run_and_stop_together(torchrun_sh, small_run: list[str], tmp_path: Path) -> None:
    def start(*settings: str) -> list[int]:
        within = ["unshare", "--net", "--uts", "bash", "-c", MACHINES, "machines"]
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
    assert (tmp_path / "run" / "logs" / "rank-1.log").is_file()


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
        (["1", "--head", "10.0.0.5:29400"], "--node I/N is missing"),
        (["1", "--node", "0/1", "--head", "10.0.0.5:29400"], "one machine meets nobody"),
        (["1", "--node", "08/16", "--head", "10.0.0.5:29400", "run.dir=r"], "--node 08/16: must be I/N"),
        (["1", "--node", "0/2", "--head", "[::1]:29400", "run.dir=r"], "2 machines cannot meet there"),
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


LOCKED = """
source launch/environment.sh
is_prepared() { [ -f prepared ]; }
install_environment() { echo begins; sleep 0.3; touch prepared; echo ends; }
"""


def installing(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a repository whose installation is a short sleep."""
    (folder / "launch").mkdir()
    shutil.copy(REPO_ROOT / "launch" / "environment.sh", folder / "launch")
    return run_as_user(["bash", "-c", LOCKED + script], folder)


def test_machines_that_share_the_repository_install_once(tmp_path: Path) -> None:
    ended = installing(tmp_path, "prepare_environment demo & sleep 0.1; prepare_environment demo; wait")
    assert ended.stdout.split() == ["begins", "ends"], ended.stderr
    assert "waiting for somebody else" in ended.stderr


def test_an_installation_goes_on_where_files_cannot_be_locked(tmp_path: Path) -> None:
    ended = installing(tmp_path, "flock() { return 71; }; prepare_environment demo")
    assert (ended.returncode, ended.stdout.split()) == (0, ["begins", "ends"]), ended.stderr
    assert "cannot be locked on this file system" in ended.stderr


def test_nothing_is_locked_where_nothing_is_to_be_installed(tmp_path: Path) -> None:
    ended = installing(tmp_path, "touch prepared; prepare_environment demo")
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr
    assert not (tmp_path / ".venv.lock").exists()


def test_a_start_that_is_ended_before_the_run_begins_leaves_no_request(
    torchrun_sh, small_run: list[str], tmp_path: Path
) -> None:
    settings = ["--node", "0/2", "--head", "10.88.0.9:29400", *small_run]
    command = ["bash", str(tmp_path / "launch" / "torchrun.sh"), "1", *settings]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as started:
        assert started.stderr is not None
        for line in started.stderr:
            if "waiting at 10.88.0.9:29400" in line:
                started.send_signal(signal.SIGINT)
            elif "stopped before the run began" in line:
                break
        assert started.wait(60) == 1
    assert not (tmp_path / "run" / "stop").exists()
