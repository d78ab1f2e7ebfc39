"""The run folder: where everything a run leaves behind lies, and what state it says the run is in."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

from data_pipeline.cache import write_json
from hopescale.config.compose import to_yaml
from hopescale.config.schema import Config

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

    def create(self, config: Config) -> int:
        """Make the folder, write the resolved configuration, and count this incarnation (from 0).

        The configuration of the first incarnation stays; a later one's is kept beside it.
        """
        for folder in (self.checkpoints, self.logs, self.report):
            folder.mkdir(parents=True, exist_ok=True)
        incarnation = self.read_status().get("incarnation", -1) + 1
        target = self.config if incarnation == 0 else self.path / f"config-{incarnation}.yaml"
        target.write_text(to_yaml(config))
        return incarnation

    def write_status(self, state: RunStateName, *, code: int, step: int, incarnation: int) -> None:
        """Replace status.json atomically; launch scripts decide by it alone."""
        write_json(self.status, {"state": state, "code": code, "step": step, "incarnation": incarnation})

    def read_status(self) -> dict[str, Any]:
        """The last status, empty where there is none."""
        return json.loads(self.status.read_text()) if self.status.is_file() else {}


def new_run_path(config: Config) -> Path:
    """The folder of `run.dir`, or a new one under `run.root` named by name and time."""
    if config.run.dir is not None:
        return Path(config.run.dir)
    return Path(config.run.root) / f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
