"""Whole runs through the command line: what they leave, and what can be seen while they live."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from hopescale import train
from hopescale.errors import EXIT_PREEMPTED, ConfigError
from tests.user_process import ENVIRONMENT

pytestmark = pytest.mark.integration


@pytest.mark.requires("prometheus")
def test_metrics_can_be_scraped_while_training_and_equal_the_jsonl(small_run, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hopescale.cli", "train", *small_run, "train.steps=1000000"]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        try:
            scraped = scrape(tmp_path / "run", run)
            wanted = int(scraped["hopescale_step"])
            record = record_of(tmp_path / "run", wanted)
        finally:
            run.send_signal(signal.SIGKILL)
    assert wanted > 0
    assert scraped["hopescale_clips_total"] == record["clips_total"] == 4 * wanted
    for name in ("loss", "loss_teacher", "loss_jump", "data_wait_seconds", "data_wait_ratio", "flops_per_second"):
        assert scraped[f"hopescale_{name}"] == record[name], name
    assert scraped['hopescale_memory_surprise{frame="all"}'] == record["memory_surprise"]
    assert scraped['hopescale_memory_drift{memory="main"}'] == record["memory_drift_main"]
    assert scraped['hopescale_update_ratio{group="titan"}'] == record["update_ratio_titan"]
    assert scraped['hopescale_cms_output_ratio{level="0"}'] == record["cms_output_ratio_0"]
    assert scraped['hopescale_step_seconds{rank="0"}'] == record["step_seconds"]


def scrape(folder: Path, run: subprocess.Popen[bytes]) -> dict[str, float]:
    """Values by name and labels, once a step has been logged."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and run.poll() is None:
        endpoint = folder / "metrics-endpoint.json"
        if endpoint.is_file():
            with urllib.request.urlopen(json.loads(endpoint.read_text())["url"], timeout=5) as answer:
                lines = answer.read().decode().splitlines()
            values = {name: float(value) for name, value in (ln.rsplit(" ", 1) for ln in lines if ln[0] != "#")}
            if values.get("hopescale_step", 0) > 0:
                return values
        time.sleep(0.1)
    pytest.fail(f"no step was scraped; the run ended with {run.poll()}")


def record_of(folder: Path, step: int) -> dict[str, float]:
    """The training record of a step, which may be written a moment after it can be scraped."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            if line.startswith(f'{{"kind": "train", "step": {step},') and line.endswith("}"):
                return json.loads(line)
        time.sleep(0.1)
    pytest.fail(f"step {step} is not in metrics.jsonl")


def test_a_run_leaves_its_folder_and_can_be_evaluated_and_reported(hopescale, small_run, tmp_path: Path) -> None:
    trained = hopescale("train", *small_run, "train.eval_every=3", "checkpoint.every=2", "checkpoint.keep=2")
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "run"
    assert json.loads((run / "status.json").read_text()) == {
        "state": "finished",
        "code": 0,
        "step": 6,
        "incarnation": 0,
    }
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000000004", "step-000000006"]
    kinds = [json.loads(line)["kind"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (kinds.count("train"), kinds.count("eval")) == (6, 2)
    assert list((run / "tensorboard").iterdir())

    evaluated = hopescale("eval", str(run), "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    result = json.loads(evaluated.stdout.splitlines()[-1])
    assert result == json.loads((run / "result.json").read_text())
    assert set(result["partitions"]) == {"base", "ice"}
    skills = ("skill_one_step", "skill_far", "skill_jump", "skill_context")
    for name in (*skills, "shuffled_ratio_far", "writes_off_ratio_one_step", "no_past_ratio_context"):
        rows = [row[name] for row in result["partitions"].values()]
        assert result[name] == pytest.approx(sum(rows) / len(rows))
    again = json.loads(hopescale("eval", str(run), "--json").stdout.splitlines()[-1])
    assert again["partitions"] == result["partitions"]


def test_a_model_without_memories_is_evaluated_and_reported_too(hopescale, small_run, tmp_path: Path) -> None:
    assert hopescale("train", *small_run, "model.block_pattern=[T]", "train.steps=1").returncode == 0
    evaluated = hopescale("eval", str(tmp_path / "run"), "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    result = json.loads(evaluated.stdout.splitlines()[-1])
    assert result["writes_off_ratio_context"] == 1
    reported = hopescale("report", str(tmp_path / "run"))
    assert reported.returncode == 0, reported.stderr


def test_early_stop_ends_a_run_whose_skill_does_not_rise(hopescale, small_run, tmp_path: Path) -> None:
    settings = ["train.steps=200", "train.eval_every=1", "run.early_stop.patience=2", "run.early_stop.min_gain=10"]
    ended = hopescale("train", *small_run, *settings)
    assert ended.returncode == 0, ended.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    # The first evaluation sets the mark, the next two do not beat it.
    assert (status["state"], status["step"]) == ("finished", 3)


def test_a_resumed_run_refuses_other_settings(hopescale, small_run) -> None:
    assert hopescale("train", *small_run, "train.stop_after=2").returncode == 75
    ended = hopescale("train", *small_run, "optimizer.lr=0.5")
    assert ended.returncode == 2
    assert "optimizer.lr=0.5: this run folder was trained with 0.0002" in ended.stderr


@pytest.mark.requires("demo")
def test_the_smoke_demo_walks_the_whole_path_and_reuses_what_it_made(hopescale, tmp_path: Path) -> None:
    settings = ("demo", "demo.preset=smoke", "metrics.port=0", "train.steps=4", "--json")
    first = hopescale(*settings, timeout=400)
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout.splitlines()[-1])
    assert result["cached"] == []
    assert {"simulate", "encode", "shard", "train", "eval", "report", "total"} == set(result["seconds"])
    assert len(result["partitions"]) == 6
    page = Path(result["paths"]["report"])
    assert page.read_text().count("data:image/png;base64,") >= 6
    assert json.loads(Path(result["paths"]["result"]).read_text()) == result
    assert 0.08 < result["baselines"]["copy_last_one_step"] < 0.25
    assert 0.20 < result["baselines"]["mean_frame_one_step"] < 0.45

    second = hopescale(*settings, timeout=400)
    assert json.loads(second.stdout.splitlines()[-1])["cached"] == ["simulate", "encode", "shard"]


def test_a_folder_in_use_or_of_something_else_is_refused(hopescale, small_run, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hopescale.cli", "train", *small_run, "train.steps=1000000"]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        try:
            scrape(tmp_path / "run", run)
            second = hopescale("train", *small_run)
        finally:
            run.send_signal(signal.SIGKILL)
    assert second.returncode == 2, second.stderr
    assert f"another run is training here (process {run.pid} on" in second.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "running"

    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.jpg").touch()
    other = hopescale("train", *small_run, f"run.dir={tmp_path / 'holiday'}")
    assert other.returncode == 2
    assert "not those of a run" in other.stderr


def test_evaluation_refuses_settings_that_it_would_ignore(hopescale, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    refused = hopescale("eval", str(tmp_path / "run"), "optimizer.lr=1")
    assert (refused.returncode, "override=optimizer.lr=1" in refused.stderr) == (2, True)
    assert hopescale("eval", str(tmp_path / "nothing")).returncode == 2


@pytest.mark.requires("prometheus")
def test_a_start_is_listed_before_it_loads_its_checkpoint_and_no_longer_once_it_is_refused(
    small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries, seen = tmp_path / "entries", list[list[Path]]()
    settings = [*small_run, f"metrics.discovery={entries}", "metrics.tensorboard=false"]
    assert train.main([*settings, "train.stop_after=1"]) == EXIT_PREEMPTED
    assert not list(entries.iterdir())
    resume = train.resume

    def looked(*arguments: Any) -> Any:
        seen.append(list(entries.iterdir()))
        return resume(*arguments)

    monkeypatch.setattr(train, "resume", looked)
    assert train.main([*settings, "optimizer.lr=1e-7"]) == ConfigError.exit_code
    assert [len(listed) for listed in seen] == [1]
    assert not list(entries.iterdir())
