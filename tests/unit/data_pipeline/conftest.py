"""A small features folder and data set, real in every part but the encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.shard import shard
from tests.feature_folders import write_features

Writer = Callable[..., Path]


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
