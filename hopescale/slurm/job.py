"""The job that a run was last submitted as, and what can be done to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipeline.cache import write_json
from hopescale.errors import ConfigError, Problem

from .programs import job_state, slurm

JOB_FILE = Path("slurm") / "job.json"
"""In a run folder."""


def requeue(run: Path) -> dict[str, Any]:
    """Put a run's job back into the queue.

    Raises:
        UserError: the run has no job, or Slurm refuses.
    """
    job = job_of(run)
    (run / "slurm" / "cancelled").unlink(missing_ok=True)
    slurm("scontrol", "requeue", job)
    return {"job": job, "run": str(run)}


def cancel(run: Path, *, now: bool) -> dict[str, Any]:
    """End a run's job for good.

    Args:
        run: its folder.
        now: kill it, losing what came after its last checkpoint; else a job that runs saves first.

    Raises:
        UserError: the run has no job, or Slurm refuses.
    """
    job = job_of(run)
    # Of this job, and of none that may come after it.
    (run / "slurm" / "cancelled").write_text(f"{job}\n")
    saves = not now and (job_state(job) or "").startswith("RUNNING")
    if saves:
        (run / "stop").touch()
    else:
        slurm("scancel", job)
    return {"job": job, "run": str(run), "saves": saves}


def job_of(run: Path) -> str:
    """The job that was last submitted for a run.

    Raises:
        ConfigError: none was.
    """
    job = submitted_job(run)
    if job is None:
        rule = "was not submitted by `hopescale slurm submit`"
        raise ConfigError(Problem("run", run, rule, "name the folder of a run that was"))
    return job


def submitted_job(run: Path) -> str | None:
    """The same, or None."""
    path = run / JOB_FILE
    return str(json.loads(path.read_text())["job"]) if path.is_file() else None


def keep_job(run: Path, job: str) -> None:
    """Remember the job that was submitted for a run."""
    write_json(run / JOB_FILE, {"job": job})
