"""The same clips from every layout make the same shards, byte for byte, and our own shards are a source again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.schema import Manifest
from data_pipeline.shard.run import shard
from data_pipeline.sources.open import open_source
from tests.source_layouts import LAYOUTS, make_clips

CLIPS = make_clips(3)
# Spellings of one kind of source, whose arrays are the same, are left to test_same_clips.py.
SPELLINGS = ("thesis, flattened", "npz, deflated", "csv", "tar of npz")
NAMES = [
    pytest.param(name, marks=[pytest.mark.requires("zarr")] if name.startswith("zarr") else [])
    for name in LAYOUTS
    if name not in SPELLINGS
]
STATED = {"encoder": "x", "encode_mode": "per-frame", "grid": "2x3"}


def sharded(name: str, root: Path, **settings: Any) -> Manifest:
    path, kwargs = LAYOUTS[name](root / "clips", CLIPS)
    provenance = kwargs.pop("provenance", {}) | ({} if name == "features folder" else STATED)
    return shard(path, root / "out", clips_per_shard=2, provenance=provenance, **kwargs, **settings)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The sha256 of the shards that .npy files make."""
    return [entry.sha256 for entry in sharded("npy beside", tmp_path_factory.mktemp("expected")).shards]


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_makes_the_same_shards(tmp_path: Path, expected: list[str], name: str) -> None:
    assert [entry.sha256 for entry in sharded(name, tmp_path).shards] == expected
    assert len(expected) == 2


@pytest.mark.parametrize(
    ("container", "folder"),
    [("tar", "shards"), pytest.param("zarr", "shards/clips.zarr", marks=pytest.mark.requires("zarr"))],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_our_own_shards_are_a_source_of_the_same_clips(tmp_path: Path, container: str, folder: str) -> None:
    rules = {"partitions": ["a=0..2", "b=2.."], "split": "heldout=0.5"}
    sharded("npy beside", tmp_path, format=container, dtype="bfloat16", **rules)
    first = open_source(tmp_path / "clips", **rules).listing()
    source = open_source(tmp_path / "out" / folder)
    listing = source.listing()
    assert not listing.bad
    labels = {clip.key: (clip.partition, clip.split, clip.length) for clip in listing.clips}
    assert labels == {clip.key: (clip.partition, clip.split, clip.length) for clip in first.clips}
    for clip in listing.clips:
        assert clip.arrays["features"].dtype == "bfloat16"
        assert source.read(clip)["actions"].tobytes() == CLIPS[clip.key]["actions"].tobytes()
