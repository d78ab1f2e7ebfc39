"""A small data set of clips of different lengths, read by all tests here."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.reader.clips import ClipReader
from data_pipeline.schema import DataConfig
from tests.small_dataset import write_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data set of 14 training and 14 held-out clips of 4 or 5 frames with every field; do not change it."""
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder, clips=7, heldout=7, lengths=(4, 5, 5), state_dim=3, extrinsics_dim=2)
    return folder


@pytest.fixture(scope="session")
def reader(dataset: Path) -> ClipReader:
    """Its training clips, in the order of seed 5."""
    return ClipReader(DataConfig(path=str(dataset)), split="train", seed=5)
