"""Small features folders for tests, real in every part but the encoder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.pixels.simulate import npz_bytes


def write_features(
    folder: Path,
    *,
    per_split: int = 7,
    mode: str = "per-frame",
    states: bool = False,
    grid: tuple[int, int] = (2, 3),
    channels: int = 16,
    lengths: Sequence[int] = (4, 5, 5),
) -> Path:
    """Write random features [F, grid, channels] of two partitions, clip i of a split with lengths[i % len] frames."""
    random = np.random.default_rng(3)
    clips = []
    for partition in ("base", "ice"):
        (folder / partition).mkdir(parents=True)
        for split in ("train", "heldout"):
            for index in range(per_split):
                key, length = f"{partition}-{split}-{index:05d}", lengths[index % len(lengths)]
                arrays = {
                    "features": random.normal(size=(length, grid[0] * grid[1], channels)).astype(np.float16),
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
        "grid": list(grid),
        "pixels_digest": "1" * 64,
        "digest": "2" * 64,
        "clips": clips,
    }
    (folder / "features.json").write_text(json.dumps(document))
    return folder
