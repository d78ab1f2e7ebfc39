"""A dry run does everything once and keeps nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from hopescale.config.compose import load_config
from hopescale.dry_run import rehearsal

pytestmark = [pytest.mark.distributed, pytest.mark.requires("2ranks")]


def test_a_dry_run_takes_a_step_and_keeps_nothing(train, tmp_path: Path) -> None:
    batch = ("train.global_batch=3", "train.steps=2")
    earlier = tmp_path / "run.dry-run" / "checkpoints" / "step-000000001"
    earlier.mkdir(parents=True)
    (tmp_path / "run.dry-run" / "lock").touch()
    rehearsed = train(2, "run", *batch, "run.dry_run=true")
    assert rehearsed.code == 0, rehearsed.output
    for what in ("build", "read a batch", "take a step", "save", "load", "memory"):
        assert f"  {what} " in rehearsed.output
    assert "steps, saves and loads on 2 ranks; nothing was kept" in rehearsed.output
    assert not list(tmp_path.glob("run*"))
    assert train(2, "run", *batch).status["step"] == 2


def test_what_a_run_would_end_with_ends_a_dry_run(train, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = train(2, "file/run", "run.dry_run=true")
    assert run.code == 1
    assert run.output.count("error: run.dir=") == 1


@pytest.mark.parametrize("given", ["runs/a", "runs/a/", "a/../a"])
def test_the_folder_of_a_dry_run_lies_beside_the_runs_own(given: str) -> None:
    folder = rehearsal(load_config([f"run.dir={given}"])).run.dir
    assert folder is not None
    assert Path(folder).name == "a.dry-run"
    assert Path(folder).parent.resolve() == Path(given).resolve().parent
