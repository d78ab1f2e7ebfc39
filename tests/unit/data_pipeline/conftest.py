"""A small features folder and data set, real in every part but the encoder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.shard import shard
from data_pipeline.simulate import npz_bytes

Writer = Callable[..., Path]


def write_features(folder: Path, *, per_split: int = 7, mode: str = "per-frame", states: bool = False) -> Path:
    """Write random features [F, 6, 16] of 5 or 4 frames for two partitions."""
    random = np.random.default_rng(3)
    clips = []
    for partition in ("base", "ice"):
        (folder / partition).mkdir(parents=True)
        for split in ("train", "heldout"):
            for index in range(per_split):
                key, length = f"{partition}-{split}-{index:05d}", 5 if index % 3 else 4
                arrays = {
                    "features": random.normal(size=(length, 6, 16)).astype(np.float16),
                    "actions": random.normal(size=(length - 1, 2)).astype(np.float32),
                }
                if states:
                    arrays["states"] = random.normal(size=(length, 3)).astype(np.float32)
                content = npz_bytes(arrays)
                (folder / partition / f"{key}.npz").write_bytes(content)
                sha256 = hashlib.sha256(content).hexdigest()
                clips.append({"key": key, "partition": partition, "split": split, "length": length, "sha256": sha256})
    document = {
        "format": 1,
        "encoder": "random",
        "weights_sha256": "0" * 64,
        "encode_mode": mode,
        "preprocessing": "none",
        "grid": [2, 3],
        "pixels_digest": "1" * 64,
        "digest": "2" * 64,
        "clips": clips,
    }
    (folder / "features.json").write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features folder with states; do not change it."""
    return write_features(tmp_path_factory.mktemp("features"), states=True)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, features: Path) -> Path:
    """Data set of 28 clips in shards of 4; do not change it."""
    out = tmp_path_factory.mktemp("dataset")
    shard(features, out, clips_per_shard=4)
    return out


@pytest.fixture
def features_writer() -> Writer:
    """Return the function that writes features folders."""
    return write_features
