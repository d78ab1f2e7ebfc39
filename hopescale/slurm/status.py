"""What a run folder says of its run, without asking the run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import yaml

from hopescale.checkpoint.staging import committed
from hopescale.errors import ConfigError, Problem, UserError
from hopescale.resilience.goodput import read_history
from hopescale.run_folder import RunFolder

from .job import submitted_job
from .programs import job_state

TAIL_BYTES = 1 << 20
"""Of metrics.jsonl; a record has a few thousand."""


def status(path: Path, *, ask_slurm: bool = True) -> dict[str, Any]:
    """Step, loss, time to go, goodput, restarts and last checkpoint of a run; None for what is not known yet.

    Args:
        path: run folder.
        ask_slurm: also ask squeue for the state of its job, if it has one.

    Raises:
        ConfigError: the folder is not one of a run.
    """
    run, job = RunFolder(path), submitted_job(path)
    if not run.status.is_file() and job is None:
        rule = "holds neither a run nor a job of one"
        raise ConfigError(Problem("run", path, rule, "name a run folder; `hopescale runs ls ROOT` lists them"))
    said, record, history = run.read_status(), _last_record(run.metrics), read_history(run.goodput)
    steps, batch = _planned(run.config)
    step = max(said.get("step", 0), record.get("step", 0))
    rate = record.get("clips_per_second")
    checkpoints = committed(run.checkpoints)
    return {
        "run": str(path),
        "state": _state(run, said),
        "code": said.get("code"),
        "step": step,
        "steps": steps,
        "loss": record.get("loss"),
        "eta_seconds": (steps - step) * batch / rate if rate and steps is not None and batch is not None else None,
        "goodput": history.goodput,
        "restarts": history.restarts,
        "preemptions": history.preemptions,
        "checkpoint": checkpoints[0].name if checkpoints else None,
        "checkpoint_age_seconds": time.time() - checkpoints[0].stat().st_mtime if checkpoints else None,
        "job": job,
        "job_state": _ask(job) if job is not None and ask_slurm else None,
    }


def runs(root: Path) -> list[dict[str, Any]]:
    """The status of every run below a folder, the one that last said something first.

    Raises:
        ConfigError: there is no such folder.
    """
    if not root.is_dir():
        raise ConfigError(Problem("root", root, "is no folder", "name the one that holds run folders: run.root"))
    found = [folder for folder in root.iterdir() if (folder / "status.json").is_file()]
    found.sort(key=lambda folder: (folder / "status.json").stat().st_mtime, reverse=True)
    return [status(folder, ask_slurm=False) for folder in found]


def _state(run: RunFolder, said: dict[str, Any]) -> str:
    """What status.json says, but for a run that says it is running and is not."""
    if not said:
        return "waiting"
    if said["state"] != "running":
        return said["state"]
    return "running" if run.is_claimed else "crashed"


def _ask(job: str) -> str:
    try:
        return job_state(job) or "over"
    except UserError as error:
        return f"unknown ({error.problems[0].rule})"


def _last_record(path: Path) -> dict[str, Any]:
    """The newest training record of metrics.jsonl."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record.get("kind") == "train":
            return record
    return {}


def _planned(path: Path) -> tuple[int | None, int | None]:
    """Steps of the whole run, and clips of one."""
    if not path.is_file():
        return None, None
    train = yaml.safe_load(path.read_text())["train"]
    return train["steps"], train["global_batch"]
