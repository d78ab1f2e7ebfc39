"""Clips a model could not learn from are refused by name: at the latest where they are sharded, or else where read."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.checksum import checksum_function
from data_pipeline.errors import DataError
from data_pipeline.pixels.simulate import npz_bytes
from data_pipeline.reader.clips import ClipReader
from data_pipeline.schema import DataConfig
from data_pipeline.shard.run import shard


def rewrite_first_clip(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> str:
    """Change the arrays of the first clip of a features folder, as its encoder might have; return its key."""
    document = json.loads((folder / "features.json").read_text())
    clip = document["clips"][0]
    path = folder / clip["partition"] / f"{clip['key']}.npz"
    with np.load(path) as stored:
        arrays = {name: stored[name].copy() for name in stored}
    change(arrays)
    content = npz_bytes(arrays)
    path.write_bytes(content)
    clip["sha256"], clip["length"] = hashlib.sha256(content).hexdigest(), len(arrays["features"])
    (folder / "features.json").write_text(json.dumps(document))
    return clip["key"]


def refused(folder: Path, out: Path) -> str:
    with pytest.raises(DataError) as caught:
        shard(folder, out)
    assert not (out / "manifest.json").exists()
    return str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["features", "actions", "states"])
def test_a_clip_with_a_value_that_is_not_finite_is_not_sharded(
    features_writer: Callable[..., Path], tmp_path: Path, field: str, value: float
) -> None:
    folder = features_writer(tmp_path / "features", per_split=1, states=True)
    key = rewrite_first_clip(folder, lambda arrays: arrays[field].reshape(-1).__setitem__(3, value))
    text = refused(folder, tmp_path / "out")
    assert key in text
    assert f"{field} holds {value} at [" in text
    assert "all values must be finite" in text


@pytest.mark.parametrize("frames", [0, 1])
def test_a_clip_without_a_transition_is_not_sharded(
    features_writer: Callable[..., Path], tmp_path: Path, frames: int
) -> None:
    folder = features_writer(tmp_path / "features", per_split=1)

    def cut(arrays: dict[str, np.ndarray]) -> None:
        arrays["features"], arrays["actions"] = arrays["features"][:frames], arrays["actions"][:0]

    key = rewrite_first_clip(folder, cut)
    text = refused(folder, tmp_path / "out")
    assert key in text
    assert "no transition" in text or "[F, N, E]" in text


@pytest.mark.parametrize("field", ["features", "actions", "states"])
def test_a_clip_of_another_width_is_not_sharded(
    features_writer: Callable[..., Path], tmp_path: Path, field: str
) -> None:
    folder = features_writer(tmp_path / "features", per_split=2, states=True)
    key = rewrite_first_clip(folder, lambda arrays: arrays.update({field: np.repeat(arrays[field], 2, axis=-1)}))
    text = refused(folder, tmp_path / "out")
    assert key in text
    assert f"{field} are float" in text
    assert "7 of 8 clips in all" in text


def forge(dataset: Path, copy: Path, field: str, value: float) -> str:
    """Write a value twice into a training clip of a copy, with checksums that fit, as a careless tool would."""
    shutil.copytree(dataset, copy)
    manifest, index = json.loads((copy / "manifest.json").read_text()), copy / "index"
    row = 3
    offset, nbytes = (int(np.load(index / f"{field}_{part}.npy")[row]) for part in ("offset", "nbytes"))
    path = copy / "shards" / manifest["shards"][int(np.load(index / "shard.npy")[row])]["name"]
    content = bytearray(path.read_bytes())
    values = np.frombuffer(bytes(content[offset : offset + nbytes]), manifest["dtypes"][field]).copy()
    values[-2:] = value
    content[offset : offset + nbytes] = values.tobytes()
    path.write_bytes(content)
    checksum = checksum_function(manifest["checksum"])
    sums = np.load(index / f"{field}_checksum.npy")
    sums[row] = checksum(values.view(np.uint8))
    np.save(index / f"{field}_checksum.npy", sums)
    name = f"index/{field}_checksum.npy"
    manifest["files"][name] = hashlib.sha256((copy / name).read_bytes()).hexdigest()
    manifest.pop("digest", None)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return (copy / "keys.txt").read_text().splitlines()[row]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("field", ["features", "actions", "states"])
def test_a_clip_with_a_value_that_is_not_finite_is_named_before_it_reaches_a_step(
    dataset: Path, tmp_path: Path, field: str, value: float
) -> None:
    key = forge(dataset, tmp_path / "copy", field, value)
    reader = ClipReader(DataConfig(path=str(tmp_path / "copy")), split="train", seed=0)
    with pytest.raises(DataError) as caught:
        reader.read(np.arange(reader.num_clips))
    assert f"clip {key}" in str(caught.value)
    assert f"field {field}" in str(caught.value)
    assert "holds values that are not finite" in str(caught.value)
    others = np.array([row for row in range(reader.num_clips) if reader.keys[row] != key])
    assert reader.read(others).features.isfinite().all()


def test_large_numbers_are_not_taken_for_broken_ones(dataset: Path, tmp_path: Path) -> None:
    # In the type that stores them; their sum may be too large for it.
    for field in ("actions", "states"):
        forge(dataset, tmp_path / field, field, float(np.finfo(np.float32).max))
        reader = ClipReader(DataConfig(path=str(tmp_path / field)), split="train", seed=0)
        assert reader.read(np.arange(reader.num_clips)).features.isfinite().all()
