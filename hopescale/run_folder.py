"""The run folder: where everything a run leaves behind lies, and what state it says the run is in."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from data_pipeline.cache import write_json
from hopescale.checkpoint.staging import newest_incarnation
from hopescale.config.compose import to_yaml
from hopescale.config.schema import Config
from hopescale.errors import EXIT_DONE, ConfigError, Problem, UserError, describe
from hopescale.slurm.environment import SlurmJob

logger = logging.getLogger(__name__)

BEFORE_THE_FIRST = {"logs", "save", "slurm", "status.json", "stop"}
"""What a job script and its user may leave in a folder before its run first starts."""
SECONDS_TO_APPEAR = 30.0
"""Longer than NFS keeps what it knows of a folder by itself (acdirmin)."""

RunStateName = Literal["running", "finished", "preempted", "failed"]


class RunFolder:
    """Paths inside RUN, and the few files this module owns: config.yaml, status.json, lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.status = path / "status.json"
        self.metrics = path / "metrics.jsonl"
        self.result = path / "result.json"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.logs = path / "logs"
        self.report = path / "report"
        self.goodput = path / "goodput.jsonl"

    @property
    def is_foreign(self) -> bool:
        """Whether the folder holds what no run, and nothing that starts or stops one, has put there."""
        return not (self.path / "lock").exists() and bool({p.name for p in self.path.iterdir()} - BEFORE_THE_FIRST)

    def create(self) -> int:
        """Make the subfolders, and count this incarnation (from 0)."""
        for folder in (self.checkpoints, self.logs, self.report):
            folder.mkdir(parents=True, exist_ok=True)
        return max(self.read_status().get("incarnation", -1), newest_incarnation(self.checkpoints)) + 1

    def leave_mark(self) -> Path:
        """A new file by which other nodes see whether this is the folder that they see."""
        mark = self.logs / f"seen-{secrets.token_hex(8)}"
        mark.touch()
        return mark

    def look_for(self, mark: Path) -> None:
        """Wait until another node's mark is to be seen here, which file systems of a network may take seconds for.

        Raises:
            ConfigError: it does not come.
        """
        until = time.monotonic() + SECONDS_TO_APPEAR
        while not mark.exists():
            if time.monotonic() > until:
                rule = (
                    f"must be one folder for all nodes, and {socket.gethostname()} does not see what the first writes"
                )
                fix = "name a folder on the file system that the nodes share"
                raise ConfigError(Problem("run.dir", self.path, rule, fix))
            # A listing makes NFS ask its server.
            list(self.logs.iterdir() if self.logs.is_dir() else ())
            time.sleep(0.1)

    def claim(self, job: SlurmJob | None = None) -> IO[str]:
        """Take the folder for this run, until the returned file is closed or its process ends, however it ends.

        A Slurm job that was requeued takes it from its own earlier start: Slurm says that this is over, though a node
        that is cut off may not know it yet.

        Raises:
            ConfigError: another run is alive in it.
        """
        path = self.path / "lock"
        lock = path.open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = _read_owner(lock.read())
            lock.close()
            if job is None or owner.job is None or not job.succeeds(owner.job):
                rule = f"another run is training here ({owner.told})"
                raise ConfigError(Problem("run.dir", self.path, rule, "wait for it, or name another folder")) from None
            logger.warning("taking the run over from an earlier start of job %s (%s)", job.id, owner.told)
            # The earlier start keeps its lock on a file that has no name any more.
            path.unlink()
            lock = path.open("a+")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.truncate(0)
        told = {"process": os.getpid(), "host": socket.gethostname()}
        lock.write(json.dumps(told | ({} if job is None else {"job": job.id, "restart": job.restart})))
        lock.flush()
        return lock

    @property
    def is_claimed(self) -> bool:
        """Whether a living process holds the folder."""
        try:
            with (self.path / "lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        return False

    def write_config(self, config: Config) -> None:
        """Replace config.yaml by the resolved configuration of this incarnation."""
        part = self.config.with_suffix(".yaml.part")
        part.write_text(to_yaml(config))
        part.replace(self.config)

    def read_status(self) -> dict[str, Any]:
        """The last status, empty where there is none."""
        return json.loads(self.status.read_text()) if self.status.is_file() else {}

    def refuse(self, code: int, job: SlurmJob | None = None) -> None:
        """Say that an attempt to start or go on was a mistake of the user.

        A folder that is in use stays as it is, and so does a new one, unless a job script has made it and will ask. A
        run that has crashed is one until a job has tried to go on with it.
        """
        status = self.read_status()
        if not status and (self.path / "slurm").is_dir():
            status = {"state": "failed", "code": code, "step": 0, "incarnation": -1}
        if status and (status["state"] != "running" or (job is not None and not self.is_claimed)):
            write_json(self.status, {**status, "state": "failed", "code": code, **_start(job)})


@dataclass
class Attempt:
    """One incarnation's word on how it is doing; launch scripts decide by status.json alone.

    A crash says nothing: `running` in the status of a process that is gone means that it crashed.
    """

    run: RunFolder
    incarnation: int
    speaks: bool
    """Only one rank writes."""
    job: SlurmJob | None = None
    """Of whose start this is, if of any: its script asks what became of it."""
    step: int = 0

    def say(self, state: RunStateName, code: int = EXIT_DONE) -> None:
        """Replace status.json atomically."""
        if not self.speaks:
            return
        word = {"state": state, "code": code, "step": self.step, "incarnation": self.incarnation, **_start(self.job)}
        try:
            if self.run.read_status().get("incarnation", -1) > self.incarnation:
                logger.warning("a later incarnation has taken %s over: its status.json stays", self.run.path)
                return
            write_json(self.run.status, word)
        except OSError as error:
            # A full disk must not end a run that may have room again when it saves.
            logger.error("status.json does not say %s: %s", state, error)

    @contextmanager
    def failing_aloud(self) -> Iterator[None]:
        """Leave what ends the attempt in this rank's log; if it is no crash, say its exit code."""
        try:
            yield
        except UserError as error:
            if not self.speaks:  # the rank that speaks prints it, once
                logger.error("%s", describe(error))
            self.say("failed", error.exit_code)
            raise
        except Exception:
            logger.exception("training crashed")
            raise


def _start(job: SlurmJob | None) -> dict[str, str]:
    return {} if job is None else {"start": job.start}


class _Owner(NamedTuple):
    told: str
    job: SlurmJob | None


def _read_owner(text: str) -> _Owner:
    """Who holds a lock, by what its file says; nobody but this module writes it."""
    try:
        told = json.loads(text)
        job = SlurmJob(told["job"], told["restart"]) if "job" in told else None
        of_job = "" if job is None else f" of Slurm job {job.id}, started {job.restart + 1} times"
        return _Owner(f"process {told['process']} on {told['host']}{of_job}", job)
    except (ValueError, KeyError, TypeError):
        return _Owner(text.strip() or "unknown", None)


def make_run_folder(config: Config) -> Path:
    """The folder of `run.dir`, or a new one under `run.root` named by name and time; made if it is not there."""
    if config.run.dir is not None:
        given = Path(config.run.dir)
        given.mkdir(parents=True, exist_ok=True)
        return given
    stem = Path(config.run.root) / f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = stem if number == 1 else stem.with_name(f"{stem.name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue  # another run of this name was started in the same second
        return folder
    raise AssertionError("unreachable")
