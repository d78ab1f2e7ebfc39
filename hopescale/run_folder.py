"""The run folder: where everything a run leaves behind lies, and what state it says the run is in."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any, Literal

from data_pipeline.cache import write_json
from hopescale.config.compose import to_yaml
from hopescale.config.schema import Config
from hopescale.errors import EXIT_DONE, ConfigError, Problem, UserError, describe

logger = logging.getLogger(__name__)

RunStateName = Literal["running", "finished", "preempted", "failed"]


class RunFolder:
    """Paths inside RUN, and the few files this module owns: config.yaml, status.json, result.json."""

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

    def create(self) -> int:
        """Make the subfolders, and count this incarnation (from 0)."""
        for folder in (self.checkpoints, self.logs, self.report):
            folder.mkdir(parents=True, exist_ok=True)
        return self.read_status().get("incarnation", -1) + 1

    def claim(self) -> IO[str]:
        """Take the folder for this run, until the returned file is closed or its process ends, however it ends.

        Raises:
            ConfigError: another run is alive in it.
        """
        lock = (self.path / "lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip()
            lock.close()
            rule = f"another run is training here ({owner})"
            raise ConfigError(Problem("run.dir", self.path, rule, "wait for it, or name another folder")) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        return lock

    def write_config(self, config: Config) -> None:
        """Replace config.yaml by the resolved configuration of this incarnation."""
        part = self.config.with_suffix(".yaml.part")
        part.write_text(to_yaml(config))
        part.replace(self.config)

    def read_status(self) -> dict[str, Any]:
        """The last status, empty where there is none."""
        return json.loads(self.status.read_text()) if self.status.is_file() else {}

    def refuse(self, code: int) -> None:
        """Say that an attempt to go on was a mistake of the user; a folder that is new, or in use, stays as it is."""
        status = self.read_status()
        if status and status["state"] != "running":
            write_json(self.status, {**status, "state": "failed", "code": code})


@dataclass
class Attempt:
    """One incarnation's word on how it is doing; launch scripts decide by status.json alone.

    A crash says nothing: `running` in the status of a process that is gone means that it crashed.
    """

    run: RunFolder
    incarnation: int
    speaks: bool
    """Only one rank writes."""
    step: int = 0

    def say(self, state: RunStateName, code: int = EXIT_DONE) -> None:
        """Replace status.json atomically."""
        if self.speaks:
            word = {"state": state, "code": code, "step": self.step, "incarnation": self.incarnation}
            write_json(self.run.status, word)

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
