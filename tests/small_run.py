"""The smallest run that has everything in it, and its data."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.shard import shard
from tests.feature_folders import write_features

SMALL_MODEL = (
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
)
"""Settings that train a tiny model for six steps on `pack_small_data`."""


def pack_small_data(folder: Path) -> Path:
    """A data set of random clips of 6 tokens and 16 channels, 5 or 4 frames long."""
    shard(write_features(folder / "features"), folder / "data", clips_per_shard=4)
    return folder / "data"
