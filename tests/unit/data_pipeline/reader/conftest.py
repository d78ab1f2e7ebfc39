"""A small data set of clips of different lengths, and shards to be copied to a node."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.reader import fetching
from data_pipeline.reader.clips import ClipReader
from data_pipeline.schema import DataConfig
from tests.small_dataset import write_dataset
from tests.staged_files import Files, make_files


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


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data set of two partitions in 4 shards, 3 of them for training; do not change it."""
    folder = tmp_path_factory.mktemp("written")
    write_dataset(folder)
    return folder


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Eight shards to be copied to a node."""
    return make_files(tmp_path / "source")


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once what could not be fetched."""
    monkeypatch.setattr(fetching, "PAUSES", (0, 0))
