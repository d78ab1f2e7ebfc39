"""Runs that are told to stop, and go on: the same curve, to the last bit, whatever the moment."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from hopescale.checkpoint.manager import CheckpointManager
from hopescale.checkpoint.staging import Staging, committed
from hopescale.errors import EXIT_DONE, EXIT_PREEMPTED, EXIT_SUPERSEDED
from hopescale.resilience import preemption
from hopescale.resilience.goodput import read_history
from hopescale.train import main
from hopescale.trainer import Trainer
from tests.interruptions import MOMENTS, call_with_signal, curve, final_state

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(small_run: list[str]) -> list[str]:
    return [*small_run, "train.eval_every=2", "checkpoint.every=3", "metrics.listen=off", "metrics.tensorboard=false"]


def status_of(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


@pytest.fixture
def whole(settings: list[str], tmp_path: Path) -> Path:
    """A run that nobody has stopped."""
    run = tmp_path / "whole"
    assert main([*settings, f"run.dir={run}"]) == EXIT_DONE
    return run


def test_a_run_stopped_at_any_moment_goes_on_to_the_same_bits(settings: list[str], whole: Path, tmp_path: Path) -> None:
    stopped_at = {"first step": 1, "fourth step": 4, "second evaluation": 4, "first save": 3}
    assert set(stopped_at) == set(MOMENTS) - {"never"}
    for moment, step in stopped_at.items():
        run = tmp_path / moment.replace(" ", "-")
        told = [*settings, f"run.dir={run}"]
        assert call_with_signal(moment, 0, lambda told=told: main(told)) == EXIT_PREEMPTED, moment
        assert status_of(run) == {"state": "preempted", "code": 75, "step": step, "incarnation": 0}, moment
        assert main(told) == EXIT_DONE, moment
        assert curve(run) == curve(whole), moment
        assert final_state(run) == final_state(whole), moment
        assert status_of(run) == {"state": "finished", "code": 0, "step": 6, "incarnation": 1}, moment
        history = read_history(run / "goodput.jsonl")
        assert (history.restarts, history.preemptions, history.step) == (1, 1, 6), moment


def test_a_stop_file_counts_once(settings: list[str], whole: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    assert main(settings) == EXIT_PREEMPTED
    assert status_of(tmp_path / "run")["step"] == 0
    assert not (tmp_path / "run" / "stop").exists()
    assert main(settings) == EXIT_DONE
    assert curve(tmp_path / "run") == curve(whole)


def test_a_start_that_was_superseded_ends_at_its_next_save(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = CheckpointManager.save

    def begin_anew_first(manager: CheckpointManager, *told: Any) -> Path:
        (tmp_path / "run" / "status.json").write_text('{"state": "running", "incarnation": 7}')
        Staging(manager.root, 7)
        return save(manager, *told)

    monkeypatch.setattr(CheckpointManager, "save", begin_anew_first)
    assert main(settings) == EXIT_SUPERSEDED
    assert status_of(tmp_path / "run")["incarnation"] == 7
    assert not committed(tmp_path / "run" / "checkpoints")
    # The account is the later one's to keep.
    told = [json.loads(line)["event"] for line in (tmp_path / "run" / "goodput.jsonl").read_text().splitlines()]
    assert "failed" not in told


@pytest.mark.parametrize("wrong", ["train.stps=5", "model.memory.heads=5", "data.path=nowhere"])
def test_a_job_script_learns_that_its_settings_are_wrong(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    run = tmp_path / "run"
    (run / "slurm").mkdir(parents=True)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert main([*settings, wrong]) == 2
    assert (status_of(run)["state"], status_of(run)["code"]) == ("failed", 2)
    # Also where an earlier start had crashed, whose word this is not.
    (run / "status.json").write_text('{"state": "running", "code": 0, "step": 4, "incarnation": 0, "start": "42-0"}')
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main([*settings, wrong]) == 2
    assert status_of(run) == {"state": "failed", "code": 2, "step": 4, "incarnation": 0, "start": "42-1"}


def test_a_save_file_makes_a_checkpoint_and_the_run_goes_on(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption, "POLL_SECONDS", 0.0)
    step = Trainer.step

    def ask_after_the_first(trainer: Trainer, *batches) -> None:
        step(trainer, *batches)
        if trainer.state.step == 1:
            (tmp_path / "run" / "save").touch()

    monkeypatch.setattr(Trainer, "step", ask_after_the_first)
    assert main([*settings, "checkpoint.every=0"]) == EXIT_DONE
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000000002", "step-000000006"]
    assert not (tmp_path / "run" / "save").exists()


def test_a_job_whose_time_runs_out_stops_by_itself(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "11")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000")
    assert main(settings) == EXIT_PREEMPTED
    assert "its time is nearly over" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()


def test_a_checkpoint_that_cannot_be_written_is_missed_and_told_of(
    settings: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hopescale.checkpoint import manager

    write, failures = manager.write_manifest, 1

    def full_once(*told) -> None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise OSError(28, os.strerror(28), "MANIFEST.json")
        write(*told)

    monkeypatch.setattr(manager, "write_manifest", full_once)
    assert main(settings) == EXIT_DONE
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000000006"]
    assert "no checkpoint of step 3, training goes on" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["checkpoint_failures_total"] for r in records if r["kind"] == "train"] == [0, 0, 0, 1, 1, 1]
    assert curve(tmp_path / "run") == curve(whole)


def test_a_run_whose_last_checkpoint_cannot_be_written_has_failed(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hopescale.checkpoint import manager

    def full(*told) -> None:
        raise OSError(28, os.strerror(28), "MANIFEST.json")

    monkeypatch.setattr(manager, "write_manifest", full)
    assert main(settings) == 2
    assert (status_of(tmp_path / "run")["state"], status_of(tmp_path / "run")["code"]) == ("failed", 2)


def test_signals_are_given_back(settings: list[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main([*settings, "train.steps=1"]) == EXIT_DONE
    assert signal.getsignal(signal.SIGTERM) is before
