from __future__ import annotations

import json
import logging
from contextlib import closing
from pathlib import Path

import pytest

from hopescale import run_folder
from hopescale.checkpoint.staging import Staging
from hopescale.errors import ConfigError, Problem
from hopescale.run_folder import Attempt, RunFolder
from hopescale.slurm.environment import SlurmJob


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.create()
    return folder


def test_incarnations_are_counted_whatever_the_one_before_has_left(run: RunFolder) -> None:
    assert run.create() == 0
    Attempt(run, 0, speaks=True).say("running")
    assert run.create() == 1
    # One that crashed before its status could be written, on a full disk.
    Staging(run.checkpoints, 4)
    assert run.create() == 5


@pytest.mark.parametrize("job", [None, SlurmJob("7", 1), SlurmJob("8", 3), SlurmJob("7", 2)])
def test_a_folder_has_one_run_at_a_time(run: RunFolder, job: SlurmJob | None) -> None:
    owner = SlurmJob("7", 2)
    with closing(run.claim(owner)), pytest.raises(ConfigError, match="of Slurm job 7"):
        run.claim(job)
    run.claim(job).close()


def test_a_requeued_job_takes_over_from_a_start_that_does_not_know_it_is_over(
    run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="hopescale")
    with closing(run.claim(SlurmJob("7", 0))), closing(run.claim(SlurmJob("7", 1))):
        assert "taking the run over from an earlier start of job 7" in caplog.text
        for late in (SlurmJob("7", 0), None):
            with pytest.raises(ConfigError, match="started 2 times"):
                run.claim(late)


def test_a_lock_of_unknown_content_names_it(run: RunFolder) -> None:
    with closing(run.claim()) as lock:
        lock.truncate(0)
        lock.write("somebody")
        lock.flush()
        with pytest.raises(ConfigError, match=r"\(somebody\)"):
            run.claim(SlurmJob("7", 1))


def test_a_status_is_not_overwritten_by_an_earlier_incarnation(run: RunFolder) -> None:
    Attempt(run, 2, speaks=True, step=9).say("running")
    Attempt(run, 1, speaks=True, step=5).say("failed", 2)
    assert json.loads(run.status.read_text()) == {"state": "running", "code": 0, "step": 9, "incarnation": 2}


def test_a_status_that_cannot_be_written_ends_nothing(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    (run.path / "status.json.tmp").mkdir()
    with caplog.at_level(logging.ERROR, logger="hopescale"):
        Attempt(run, 0, speaks=True).say("running")
    assert "status.json does not say running" in caplog.text


def test_a_folder_that_another_node_does_not_see_is_refused(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run.look_for(run.leave_mark())
    monkeypatch.setattr(run_folder, "SECONDS_TO_APPEAR", 0.0)
    with pytest.raises(ConfigError, match="must be one folder for all nodes") as refused:
        run.look_for(run.logs / "seen-elsewhere")
    problem: Problem = refused.value.problems[0]
    assert problem.field == "run.dir"
