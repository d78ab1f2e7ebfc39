"""Runs as jobs of a real Slurm: they train over nodes, and go on after all that can happen to a job."""

from __future__ import annotations

import fcntl
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.pixels.simulate import SimulationSpec, simulate
from hopescale.checkpoint.manifest import read_manifest
from hopescale.checkpoint.staging import committed
from hopescale.resilience.goodput import read_history
from tests.conftest import Torchrun
from tests.interruptions import curve, final_state
from tests.slurm_nodes import SlurmNodes
from tests.user_process import REPO_ROOT

pytestmark = [pytest.mark.integration, pytest.mark.requires("slurm")]

STEPS = 16
"""Each of half a second where nobody else computes: a strike at one of them leaves enough of them to notice it."""
START = 240
"""Seconds that a start may take: torch is imported twice a node, on a machine that others use."""


@pytest.fixture
def settings(small_run: list[str]) -> list[str]:
    cluster = ("nodes=2", "gpus_per_node=1", "options=['--exclusive']")
    return [
        *(text for text in small_run if not text.startswith(("run.dir=", "train.", "model.width="))),
        f"train.steps={STEPS}",
        "checkpoint.every=4",
        "model.width=128",
        "train.global_batch=12",
        "checkpoint.keep=100",
        "parallel.device=cpu",
        # As many as two ranks of one machine have.
        "parallel.threads_per_rank=1",
        "metrics.listen=off",
        "metrics.tensorboard=false",
        *(f"cluster.{text}" for text in cluster),
    ]


Submit = Callable[..., str]


@pytest.fixture
def submit(slurm: SlurmNodes, settings: list[str]) -> Submit:
    """Submit a run as its user does; the job's number."""

    def run(folder: Path, *more: str) -> str:
        command = [sys.executable, "-m", "hopescale.cli", "slurm", "submit", *settings, *more, f"run.dir={folder}"]
        ended = slurm.run(*command, "--json", timeout=120)
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout.splitlines()[-1])["job"]

    return run


def said(run: Path) -> str:
    """All output of a run's jobs, for messages."""
    return "\n".join(path.read_text() for path in sorted((run / "logs").glob("slurm-*.out")))


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        path = run / "metrics.jsonl"
        if path.is_file() and any(f'"step": {step},' in line for line in path.read_text().splitlines()):
            return
        time.sleep(0.05)
    pytest.fail(f"step {step} was not reached\n{said(run)}")


def finished(run: Path) -> dict:
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", STEPS), said(run)
    return status


@pytest.fixture
def expected(torchrun: Torchrun, settings: list[str], tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A run of the same settings on two ranks of this machine, to its end; test processes share it."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "without-slurm"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            alone = [text for text in settings if not text.startswith("cluster.")]
            ended = torchrun(2, "hopescale.train", *alone, f"run.dir={folder}")
            assert ended.returncode == 0, ended.stderr
    finished(folder)
    return folder


def test_a_run_on_two_nodes_saves_when_its_time_is_over_and_goes_on_to_the_same_bits(
    slurm: SlurmNodes, submit: Submit, expected: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(run)
    wait_for_step(run, 3)
    slurm.signal(job, "USR1")
    assert slurm.wait(job, "COMPLETED", timeout=START)["Restarts"] == "1"
    assert finished(run)["incarnation"] == 1
    assert "preempted (code 75)" in said(run)
    assert curve(run) == curve(expected)
    assert final_state(run) == final_state(expected)
    history = read_history(run / "goodput.jsonl")
    assert (history.restarts, history.preemptions) == (1, 1)
    assert (run / "logs" / "rank-1.log").is_file()
    assert read_manifest(committed(run / "checkpoints")[0])["world_size"] == 2
    assert "2 nodes, 1 ranks each, meeting at 10.77.0.11:" in said(run)
    told = slurm.run(sys.executable, "-m", "hopescale.cli", "slurm", "status", str(run), "--json", timeout=60)
    shown = json.loads(told.stdout.splitlines()[-1])
    assert (shown["state"], shown["step"], shown["steps"], shown["restarts"]) == ("finished", STEPS, STEPS, 1)


def test_a_run_goes_on_without_a_node_that_has_crashed(
    slurm: SlurmNodes, submit: Submit, expected: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(run, "parallel.timeout_seconds=60")
    wait_for_step(run, 6)
    slurm.crash(2)
    fields = slurm.wait(job, "COMPLETED", timeout=2 * START)
    assert (fields["Restarts"], fields["NodeList"]) == ("1", "n[1,3]")
    finished(run)
    assert curve(run) == curve(expected)
    assert final_state(run) == final_state(expected)


def test_ranks_that_were_cut_off_commit_nothing_once_the_run_goes_on_elsewhere(
    slurm: SlurmNodes, submit: Submit, expected: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(run, "parallel.timeout_seconds=60")
    wait_for_step(run, 6)
    # Rank 0 lives on: it still reaches the file system, which is this machine's.
    slurm.cut(1)
    assert slurm.wait(job, "COMPLETED", timeout=2 * START)["NodeList"] == "n[2-3]"
    assert finished(run)["incarnation"] == 1
    assert curve(run) == curve(expected)
    assert final_state(run) == final_state(expected)


def test_a_run_that_was_cancelled_leaves_nothing_running_and_can_be_submitted_again(
    slurm: SlurmNodes, submit: Submit, expected: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "run"
    by_slurm = submit(run)
    wait_for_step(run, 3)
    slurm.cancel(by_slurm)
    slurm.wait(by_slurm, "CANCELLED", timeout=60)
    assert slurm.run("pgrep", "-f", f"run.dir={run}").stdout == ""
    told = slurm.run(sys.executable, "-m", "hopescale.cli", "runs", "ls", str(run.parent), "--json", timeout=60)
    (shown,) = json.loads(told.stdout.splitlines()[-1])["runs"]
    # Slurm gives it a few seconds, which are enough for a checkpoint or not. The job must not take itself back.
    assert shown["state"] in ("crashed", "preempted")
    assert slurm.job(by_slurm)["Restarts"] == "0"

    by_us = submit(run)
    wait_for_step(run, curve(run)["loss"][-1][0] + 1)
    cancelled = slurm.run(sys.executable, "-m", "hopescale.cli", "slurm", "cancel", str(run), timeout=60)
    assert "saves and ends" in cancelled.stdout, cancelled.stderr
    slurm.wait(by_us, "FAILED", timeout=START)
    assert json.loads((run / "status.json").read_text())["state"] == "preempted"

    slurm.wait(submit(run), "COMPLETED", timeout=START)
    finished(run)
    assert curve(run) == curve(expected)
    assert final_state(run) == final_state(expected)


REFUSALS = {
    "cluster.partition=nowhere": "invalid partition specified: nowhere",
    "cluster.nodes=9": "Node count specification invalid",
    "cluster.time=9-00:00:00": "Requested time limit is invalid",
}
SUBMIT_EACH = """
import contextlib, io, json, sys
from hopescale.cli import main
settings, told = json.loads(sys.argv[1]), {}
for number, asked in enumerate(sys.argv[2:]):
    sys.argv = ["hopescale", "slurm", "submit", *settings, f"run.dir=refused-{number}", asked]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            code = main()
        except SystemExit as ended:
            code = ended.code
    told[asked] = code, said.getvalue()
print(json.dumps(told))
"""


def test_what_slurm_refuses_is_told_in_its_words(slurm: SlurmNodes, settings: list[str]) -> None:
    ended = slurm.run(sys.executable, "-c", SUBMIT_EACH, json.dumps(settings), *REFUSALS, timeout=120)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    assert [code for code, _ in told.values()] == [2] * len(REFUSALS)
    for asked, expected in REFUSALS.items():
        assert expected in told[asked][1]


@pytest.mark.requires("demo")
def test_arrays_encode_and_pack_a_data_set_in_parts(slurm: SlurmNodes, tmp_path: Path) -> None:
    pixels, features, out = (tmp_path / name for name in ("pixels", "features", "data"))
    simulate(SimulationSpec(partitions=("base",), num_train=5, num_heldout=2, frames=3, size=32), pixels)
    script, env = REPO_ROOT / "launch" / "slurm" / "shard.sbatch", {"HOPESCALE_PYTHON": sys.executable}
    encoded = slurm.submit("--array=0-1", script, pixels, features, env=env | {"HOPESCALE_DATA": "encode"})
    packed = slurm.submit(f"--dependency=afterok:{encoded}", "--array=0-1", script, features, out, env=env)
    command = f"{sys.executable} -m hopescale.cli data merge {out}"
    merge = slurm.submit(f"--dependency=afterok:{packed}", f"--wrap={command}")
    slurm.wait(merge, "COMPLETED", timeout=START)
    assert json.loads((out / "manifest.json").read_text())["num_clips"] == 7
    checked = slurm.run(sys.executable, "-m", "hopescale.cli", "data", "verify", str(out), "level=full", timeout=60)
    assert checked.returncode == 0, checked.stdout
