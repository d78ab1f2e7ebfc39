"""A curriculum begins its phases at the same steps on all ranks and in any jobs, plateaus of surprise included."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.requires("2ranks")]

# Any fall short of 90 % is a plateau: it is seen after two windows, 4 .. 6 and 7 .. 8.
PHASES = [
    "{start: 3, jump_weight: 0.5, rollout_weight: 0.5}",
    "{plateau: {patience: 2, min_fall: 0.9}, rollout_steps: 3, jump_weight: 0.0, teacher_weight: 0.0}",
]
SETTINGS = (
    "train.global_batch=3",
    "train.steps=10",
    "metrics.every=2",
    "objective.rollout.context=2",
    "objective.auxiliary_weight=0.1",
    f"objective.curriculum=[{','.join(PHASES)}]",
)


def records(folder: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["kind"] == "train"}


def last_checkpoint(folder: Path) -> tuple[dict[str, str], dict]:
    newest = max((folder / "checkpoints").iterdir())
    manifest = json.loads((newest / "MANIFEST.json").read_text())
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in newest.glob("rank-*.bin")}
    return files, manifest["state"]


def test_a_plateau_is_seen_at_the_same_step_by_a_run_stopped_between_its_log_steps(train) -> None:
    whole = train(2, "whole", *SETTINGS)
    assert whole.code == 0, whole.output
    logged = records(whole.folder)
    assert {step: record["curriculum_phase"] for step, record in logged.items()} == {2: 0, 4: 1, 6: 1, 8: 1, 10: 2}
    assert {step for step, record in logged.items() if "loss_rollout" in record} == {4, 6, 8, 10}
    assert {step for step, record in logged.items() if "curriculum_surprise" in record} == {4, 6, 8}
    assert logged[10]["objective_weight_rollout"] == 0.5
    assert "loss_auxiliary" in logged[8]
    assert not {"loss_jump", "loss_teacher", "loss_auxiliary"} & logged[10].keys()

    # Cut where a window of surprise is half full, one step before the log step that sees the plateau.
    assert train(2, "stopped", *SETTINGS, "train.stop_after=7").status["step"] == 7
    stopped = train(2, "stopped", *SETTINGS)
    assert stopped.code == 0, stopped.output
    assert last_checkpoint(stopped.folder) == last_checkpoint(whole.folder)
    assert last_checkpoint(whole.folder)[1]["curriculum"]["phase"] == 2
