"""Submitting a run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.cache import write_bytes
from hopescale.config.schema import Config
from hopescale.errors import ConfigError, Problem, UserError
from hopescale.metrics.sinks.prometheus import token_problem
from hopescale.parallel.process_group import Launch
from hopescale.preflight import preflight
from hopescale.run_folder import make_run_folder

from .job import keep_job, submitted_job
from .programs import job_state, slurm
from .render import render, settings_file

OVER = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
)
"""States of a job that has ended."""


def submit(config: Config, overrides: Sequence[str]) -> dict[str, Any]:
    """Make the run folder, write the job into it, and hand it to Slurm.

    Args:
        config: of the run.
        overrides: the settings it was made from, which the job is started with.

    Returns:
        Job and run folder.

    Raises:
        UserError: something that training would refuse; an earlier job of the run is not over; Slurm refuses.
    """
    check(config)
    settings = settings_file([text for text in overrides if not text.startswith("run.dir=")])
    run = make_run_folder(config).absolute()
    _refuse_second_job(run)
    script = render(config, run)
    folder = run / "slurm"
    for made in (folder, run / "logs"):
        made.mkdir(exist_ok=True)
    for earlier in ("cancelled", "crashes"):
        (folder / earlier).unlink(missing_ok=True)
    write_bytes(folder / "settings", settings.encode())
    write_bytes(folder / "job.sbatch", script.encode())
    answer = slurm("sbatch", "--parsable", str(folder / "job.sbatch"))
    job = answer.strip().partition(";")[0]
    if not job.isdecimal():
        rule, fix = "must be the number of a job, and is not", "see what sbatch is on this machine: type sbatch"
        raise UserError(Problem("sbatch", repr(answer), rule, fix))
    keep_job(run, job)
    return {"job": job, "run": str(run), "script": str(folder / "job.sbatch")}


def check(config: Config) -> None:
    """Refuse on the login node what the job would be refused for, hours later.

    Raises:
        UserError: all problems; what only the nodes can tell is left to them, and in a container everything but the
            configuration.
    """
    if config.cluster.container is not None:
        problems = list(_relative_in_container(config))
        if problems:
            raise ConfigError(problems)
        return
    nodes, ranks = config.cluster.nodes or 1, config.cluster.gpus_per_node or 1
    quiet = config.model_copy(update={"metrics": config.metrics.model_copy(update={"listen": "off"})})
    problems = list(_missing_token(config))
    try:
        for reader in preflight(quiet, Launch(world_size=nodes * ranks, local_world_size=ranks)):
            reader.close()
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)


def _missing_token(config: Config) -> Iterator[Problem]:
    """Where the job starts in the folder that this is; other places may be the nodes' own."""
    token = config.metrics.token_file
    if config.metrics.listen == "node" and token is not None and not Path(token).is_absolute():
        problem = token_problem(config.metrics)
        if problem is not None:
            yield problem


def _relative_in_container(config: Config) -> Iterator[Problem]:
    """Paths that would be looked for in the run folder, where a container starts."""
    paths = {"data.path": config.data.path, "metrics.discovery": config.metrics.discovery}
    if config.metrics.listen == "node":
        paths["metrics.token_file"] = config.metrics.token_file
    for field, path in paths.items():
        if path is not None and "://" not in path and not Path(path).is_absolute():
            rule = f"must be absolute in a container (cluster.container={config.cluster.container})"
            fix = f"name it by where it is in there, under a SOURCE:TARGET of cluster.mounts: {Path(path).absolute()}"
            yield Problem(field, path, rule, fix)


def _refuse_second_job(run: Path) -> None:
    job = submitted_job(run)
    state = None if job is None else job_state(job)
    if state is not None and not state.startswith(OVER):
        rule = f"its job {job} is not over ({state})"
        fix = f"wait for it, or end it: hopescale slurm cancel {os.path.relpath(run)}"
        raise ConfigError(Problem("run.dir", run, rule, fix))
