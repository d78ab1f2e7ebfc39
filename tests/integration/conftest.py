"""The command line as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.shard import shard
from tests.feature_folders import write_features

REPO_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hopescale(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `hopescale ARGUMENTS` in an empty folder and return exit code and output."""

    def run(*arguments: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "hopescale.cli", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    return run


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random clips of 6 tokens and 16 channels, 5 or 4 frames long."""
    root = tmp_path_factory.mktemp("small")
    shard(write_features(root / "features"), root / "data", clips_per_shard=4)
    return root / "data"


@pytest.fixture
def small_run(small_data: Path, tmp_path: Path) -> list[str]:
    """Settings that train a tiny model on the small data."""
    return [
        f"data.path={small_data}",
        f"run.dir={tmp_path / 'run'}",
        "model.encoder_dim=16",
        "model.grid=[2,3]",
        "model.frames=5",
        "model.width=24",
        "model.block_pattern=[S,H]",
        "model.memory.heads=2",
        "model.attention.heads=2",
        "objective.jump_horizons=2",
        "train.global_batch=4",
        "train.steps=6",
        "metrics.every=1",
        "metrics.port=0",
    ]
