"""Training runs of the command line on random features, on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_pipeline.shard import shard
from tests.feature_folders import write_features


@dataclass(frozen=True)
class Trained:
    """A finished training process and what it left."""

    code: int
    output: str
    folder: Path

    @property
    def losses(self) -> list[float]:
        """Training loss by step."""
        records = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [record["loss"] for record in records if record["kind"] == "train"]

    @property
    def status(self) -> dict:
        """What status.json says."""
        return json.loads((self.folder / "status.json").read_text())


@pytest.fixture(scope="session")
def demo_shaped_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random clips of the shapes that experiment=demo expects."""
    root = tmp_path_factory.mktemp("demo-shaped")
    features = write_features(root / "features", per_split=12, grid=(8, 8), channels=112, lengths=(8,))
    shard(features, root / "data")
    return root / "data"


@pytest.fixture
def train(torchrun, tmp_path: Path, demo_shaped_data: Path) -> Callable[..., Trained]:
    """Train experiment=demo, logging every step: train(2, "name", "train.steps=3")."""

    def run(
        num_ranks: int,
        name: str,
        *overrides: str,
        env: Mapping[str, str] | None = None,
        timeout: float = 240,
        fresh: bool = False,
    ) -> Trained:
        folder = tmp_path / name
        settings: Sequence[str] = [
            "experiment=demo",
            f"data.path={demo_shaped_data}",
            f"run.dir={folder}",
            "metrics.every=1",
            "metrics.port=0",
            "metrics.tensorboard=false",
            *overrides,
        ]
        ended = torchrun(num_ranks, "hopescale.train", *settings, env=env, timeout=timeout, fresh=fresh)
        return Trained(ended.returncode, ended.stdout + ended.stderr, folder)

    return run
