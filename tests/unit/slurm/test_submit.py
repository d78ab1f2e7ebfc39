"""Submitting with programs of Slurm that a test has written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hopescale.cli import app
from hopescale.errors import ConfigError, UserError
from hopescale.run_folder import Attempt, RunFolder
from hopescale.slurm import submit as submit_module
from hopescale.slurm.status import runs, status
from tests.stand_ins import write_program


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.chdir(tmp_path)
    # What is trained on is another test's.
    monkeypatch.setattr(submit_module, "preflight", lambda *_: ())
    return folder


def program(folder: Path, name: str, does: str) -> None:
    write_program(folder, name, f"printf '%s\\n' \"{name} $*\" >>calls", does)


def call(*arguments: str) -> str:
    ended = CliRunner().invoke(app, list(arguments))
    if ended.exception is not None and not isinstance(ended.exception, SystemExit):
        raise ended.exception
    return ended.stdout


SUBMIT = ("slurm", "submit", "experiment=demo", "data.path=/data", "run.dir=run", "train.steps=50")


def test_a_run_is_handed_over_with_all_it_needs_in_its_folder(programs: Path, tmp_path: Path) -> None:
    program(programs, "sbatch", "echo '42;cluster'")
    answer = json.loads(call(*SUBMIT, "cluster.partition=gpu", "--json").splitlines()[-1])
    run = tmp_path / "run"
    assert answer == {"job": "42", "run": str(run), "script": str(run / "slurm" / "job.sbatch")}
    assert (run / "slurm" / "settings").read_text().splitlines() == [
        "experiment=demo",
        "data.path=/data",
        "train.steps=50",
        "cluster.partition=gpu",
    ]
    assert "#SBATCH --partition=gpu" in (run / "slurm" / "job.sbatch").read_text()
    assert (tmp_path / "calls").read_text() == f"sbatch --parsable {run}/slurm/job.sbatch\n"


def test_a_token_that_the_job_would_not_find_is_missed_before_it_waits_for_its_turn(
    programs: Path, tmp_path: Path
) -> None:
    program(programs, "sbatch", "echo 42")
    with pytest.raises(UserError, match=r"metrics\.token_file=metrics-token: must be a readable file"):
        call(*SUBMIT, "cluster=slurm")
    assert not (tmp_path / "calls").exists()
    # Where the nodes have it the login node need not.
    call(*SUBMIT, "cluster=slurm", "metrics.token_file=/etc/nodes/token")
    (tmp_path / "metrics-token").write_text("secret")
    call(*SUBMIT, "cluster=slurm", "run.dir=another")
    assert (tmp_path / "calls").read_text().count("sbatch --parsable") == 2


def test_paths_in_a_container_are_absolute(programs: Path) -> None:
    program(programs, "sbatch", "echo 42")
    with pytest.raises(ConfigError) as refused:
        call(*SUBMIT, "cluster=slurm", "cluster.container=image.sqsh", "data.path=clips", "metrics.discovery=found")
    assert [problem.field for problem in refused.value.problems] == [
        "data.path",
        "metrics.discovery",
        "metrics.token_file",
    ]
    here = ("data.path=/data/clips", "metrics.token_file=/data/token")
    call(*SUBMIT, "cluster=slurm", "cluster.container=image.sqsh", *here)


def test_a_machine_without_slurm_is_told_before_a_job_is_named(programs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="slurm=sbatch: is not a program on this machine"):
        call(*SUBMIT)
    assert not (tmp_path / "run" / "slurm" / "job.json").exists()


def test_a_refusal_is_told_in_slurms_words(programs: Path) -> None:
    program(programs, "sbatch", "echo 'sbatch: error: invalid partition specified: nowhere' >&2; exit 1")
    with pytest.raises(UserError, match="refused with code 1: sbatch: error: invalid partition specified: nowhere"):
        call(*SUBMIT)


@pytest.mark.parametrize(
    ("state", "refused"), [("RUNNING None", True), ("PENDING Priority", True), ("FAILED x", False)]
)
def test_a_run_has_one_job_at_a_time(programs: Path, state: str, refused: bool) -> None:
    program(programs, "sbatch", "echo 42")
    program(programs, "squeue", f"echo '{state}'")
    call(*SUBMIT)
    if refused:
        with pytest.raises(ConfigError, match="its job 42 is not over"):
            call(*SUBMIT)
    else:
        call(*SUBMIT)


def test_a_job_that_slurm_has_forgotten_is_over(programs: Path) -> None:
    program(programs, "sbatch", "echo 42")
    program(programs, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    call(*SUBMIT)
    call(*SUBMIT)


@pytest.mark.parametrize(
    ("state", "now", "saves"), [("RUNNING", False, True), ("RUNNING", True, False), ("PENDING", False, False)]
)
def test_a_cancelled_run_saves_if_it_can_and_is_not_requeued(
    programs: Path, tmp_path: Path, state: str, now: bool, saves: bool
) -> None:
    for name, does in (("sbatch", "echo 42"), ("squeue", f"echo {state} None"), ("scancel", ""), ("scontrol", "")):
        program(programs, name, does)
    call(*SUBMIT)
    call("slurm", "cancel", "run", *(["--now"] if now else []))
    assert (tmp_path / "run" / "stop").exists() == saves
    assert ("scancel 42" in (tmp_path / "calls").read_text()) != saves
    assert (tmp_path / "run" / "slurm" / "cancelled").exists()
    call("slurm", "requeue", "run")
    assert not (tmp_path / "run" / "slurm" / "cancelled").exists()
    assert "scontrol requeue 42" in (tmp_path / "calls").read_text()


def test_what_was_not_submitted_has_no_job(programs: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for command in ("cancel", "requeue"):
        with pytest.raises(ConfigError, match="was not submitted"):
            call("slurm", command, "run")


def test_a_dry_run_prints_the_script_and_makes_nothing(programs: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    assert "#SBATCH --job-name=demo" in call(*SUBMIT, "--dry-run")
    assert sorted(tmp_path.iterdir()) == before


def test_the_status_is_what_the_folder_says(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a")
    run.create()
    with pytest.raises(ConfigError, match="holds neither a run nor a job"):
        status(run.path)
    Attempt(run, 0, speaks=True, step=4).say("running")
    run.metrics.write_text('{"kind": "train", "step": 6, "loss": 0.5, "clips_per_second": 8.0}\n{"kind": "eval"')
    run.config.write_text("train: {steps: 10, global_batch: 4}\n")
    (run.checkpoints / "step-000000004").mkdir()
    shown = status(run.path)
    assert (shown["state"], shown["step"], shown["steps"], shown["loss"]) == ("crashed", 6, 10, 0.5)
    assert shown["eta_seconds"] == 4 * 4 / 8
    assert (shown["checkpoint"], shown["job"], shown["goodput"]) == ("step-000000004", None, None)
    lock = run.claim()
    assert status(run.path)["state"] == "running"
    lock.close()
    Attempt(run, 0, speaks=True, step=10).say("finished")
    assert status(run.path)["state"] == "finished"
    (tmp_path / "notes").mkdir()
    assert [each["run"] for each in runs(tmp_path)] == [str(run.path)]
    listed = call("runs", "ls", str(tmp_path))
    assert listed.splitlines()[1].split() == ["a", "finished", "10/10", "0.5", "0", "step-000000004"]
    assert call("runs", "ls", str(tmp_path / "notes")) == "no runs\n"
    with pytest.raises(ConfigError, match="is no folder"):
        runs(tmp_path / "nowhere")
