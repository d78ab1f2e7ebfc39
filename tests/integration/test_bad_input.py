"""A mistake ends in one paragraph that names field, value, rule and fix: no traceback, no hang, exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_dataset import rewrite_manifest

REPO_ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.integration

# What is typed, and words its message must hold.
MISTAKES = [
    (["optimizer.lrr=1e-3"], ["optimizer.lrr", "did you mean optimizer.lr?"]),
    (["optimzer.lr=1e-3"], ["optimzer", "did you mean optimizer?"]),
    (["optimizer=adam"], ["optimizer=adam", "adamw"]),
    (["experiment=dmo"], ["experiment=dmo", "did you mean demo?"]),
    (["train.steps=many"], ["train.steps=many", "integer"]),
    (["train.global_batch=-4"], ["train.global_batch=-4", "greater than 0"]),
    (["model.memory.heads=5"], ["memory.heads=5", "width=24"]),
    (["train.steps"], ["train.steps", "key=value"]),
    (["data.path=nowhere"], ["data.path=nowhere", "hopescale data shard"]),
    (["data.path=null"], ["data.path", "no data set is named"]),
    (["data.view=[base,snow]"], ["snow", "base"]),
    (["model.encoder_dim=17"], ["model.encoder_dim=17", "16 channels a token"]),
    (["model.grid=[2,2]"], ["model.grid=4", "6 tokens a frame"]),
    (["model.action_dim=3"], ["model.action_dim=3", "2 numbers an action"]),
    (["model.state_dim=3"], ["model.state_dim=3", "0 numbers a state"]),
    (["data.frames=1"], ["data.frames=1", "greater than or equal to 2"]),
    (["parallel.recompute=chunk", "model.block_pattern=[S]"], ["parallel.recompute=chunk", "no block with a memory"]),
    (["model.frames=4"], ["model.frames=4", "clips of 5 frames"]),
    (["objective.jump_horizons=5"], ["objective.jump_horizons=5", "4 frames to jump to"]),
    (["objective.jump_context=4"], ["objective.jump_horizons=2", "1 frames to jump to"]),
    (["objective.jump_context=5"], ["objective.jump_context=5", "none to jump to"]),
    (
        ["objective.curriculum=[{start: 3, jump_horizons: 4}]", "objective.jump_context=2"],
        ["objective.jump_horizons=4", "3 frames to jump to"],
    ),
    (["objective.huber_delta=2.0"], ["objective.huber_delta=2.0", "loss=huber"]),
    (["objective.rollout.context=2"], ["objective.rollout.context=2", "is ignored"]),
    (["objective.rollout={weight: 1.0, memory: reset_every}"], ["objective.rollout.reset_every=None", "must be set"]),
    (["objective.rollout={weight: 1.0, context: 3, steps: 3}"], ["objective.rollout.steps=3", "past the 5 frames"]),
    (
        ["objective.curriculum=[{start: 3, rollout_weight: 1.0, rollout_steps: 5}]"],
        ["objective.rollout.steps=5", "past the 5 frames", "in phases too"],
    ),
    (["objective.curriculum=[{start: 3}]"], ["objective.curriculum.0.start=3", "changes nothing"]),
    (
        ["objective.curriculum=[{plateau: {patience: 5}, jump_weight: 0.0}]", "model.memory.chunk_size=4"],
        ["model.memory.chunk_size=4", "no plateau"],
    ),
    (
        ["data.frames=4", "train.eval_every=1", "run.early_stop={patience: 1, metric: skill_context}"],
        ["run.early_stop.metric=skill_context", "the clips have 4"],
    ),
    (["train.global_batch=1000"], ["only 14 training clips"]),
    (["metrics.listen=node"], ["metrics.token_file", "bearer token"]),
    (["parallel.device=cuda"], ["parallel.device=cuda", "found 0"]),
]


@pytest.mark.parametrize(("typed", "words"), MISTAKES, ids=lambda value: " ".join(value) if value else "")
def test_a_mistake_is_explained(in_process, small_run: list[str], typed: list[str], words: list[str]) -> None:
    code, message = in_process([*small_run, *typed])
    assert code == 2
    assert message.startswith("error: ")
    assert "Fix: " in message
    assert "Traceback" not in message
    assert [word for word in words if word not in message] == []


@pytest.fixture
def in_process(capsys: pytest.CaptureFixture[str]):
    """Train in this process, which a mistake ends before anything is started."""

    def run(settings: list[str]) -> tuple[int, str]:
        from hopescale.train import main

        code = main(settings)
        return code, capsys.readouterr().err

    return run


def test_all_mistakes_are_told_at_once_and_the_command_line_shows_no_traceback(hopescale, small_run) -> None:
    ended = hopescale("train", *small_run, "train.steps=0", "optimizer.clip.mode=all", "model.widht=3")
    assert ended.returncode == 2
    assert ended.stderr.count("error: ") == 3
    assert "Traceback" not in ended.stderr


def test_an_empty_partition_is_named(in_process, small_run, small_data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_data, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    rewrite_manifest(copy, partitions=manifest["partitions"] | {"snow": {"train": 0, "heldout": 0}})
    code, message = in_process([*small_run, f"data.path={copy}", "data.view=[snow]"])
    assert code == 2
    assert "snow" in message


def test_a_taken_port_is_named(in_process, small_run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        code, message = in_process([*small_run, f"metrics.port={port}"])
    assert code == 2
    assert f"metrics.port={port}" in message
    assert "metrics.port=0" in message or "to 0" in message


def test_a_missing_extra_is_named_with_its_install_command(tmp_path: Path, small_run) -> None:
    # A module of that name that cannot be imported stands for one that is not installed.
    (tmp_path / "prometheus_client.py").write_text("raise ModuleNotFoundError('no prometheus_client')\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPO_ROOT}"}
    ended = subprocess.run(
        [sys.executable, "-m", "hopescale.cli", "train", *small_run],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert "pip install 'hopescale[prometheus]'" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.requires("2ranks")
def test_under_torchrun_rank_0_alone_explains(torchrun, small_run) -> None:
    ended = torchrun(2, "hopescale.train", *small_run, "train.stepz=3", timeout=100)
    assert ended.returncode == 1
    assert ended.stderr.count("error: train.stepz=3") == 1
    assert "did you mean train.steps?" in ended.stderr


@pytest.mark.requires("2ranks")
def test_more_ranks_than_clips_in_a_batch_is_refused_before_any_group(torchrun, small_run) -> None:
    ended = torchrun(3, "hopescale.train", *small_run, "train.global_batch=2", timeout=100)
    assert ended.returncode == 1
    assert ended.stderr.count("error: train.global_batch=2") == 1
