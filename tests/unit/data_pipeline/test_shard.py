from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.errors import DataError
from data_pipeline.shard import shard
from data_pipeline.shard.npy import PAGE


def _source(features: Path, key: str) -> dict[str, np.ndarray]:
    with np.load(features / key.split("-")[0] / f"{key}.npz") as arrays:
        return dict(arrays)


def _shards(dataset: Path) -> list[Path]:
    return sorted((dataset / "shards").iterdir())


def test_stdlib_tarfile_reads_equal_bits_in_sorted_contiguous_members(dataset: Path, features: Path) -> None:
    seen = []
    for path in _shards(dataset):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            names = [member.name for member in members]
            keys = list(dict.fromkeys(name.split(".")[0] for name in names))
            suffixes = ("actions.npy", "features.npy", "meta.json", "states.npy")
            assert names == [f"{key}.{suffix}" for key in keys for suffix in suffixes]
            for member in members:
                assert (member.uid, member.gid, member.mtime, member.mode) == (0, 0, 0, 0o444)
                assert member.isreg()
                key, field, kind = member.name.split(".")
                content = tar.extractfile(member).read()  # pyright: ignore[reportOptionalMemberAccess]
                if kind == "npy":
                    expected = _source(features, key)[field]
                    np.testing.assert_array_equal(np.load(io.BytesIO(content)), expected)
                    if field == "features":
                        assert (member.offset_data + member.size - expected.nbytes) % PAGE == 0
                else:
                    assert json.loads(content)["encode_mode"] == "per-frame"
            seen += keys
    assert len(seen) == len(set(seen)) == 28
    assert seen == (dataset / "keys.txt").read_text().split()[14:] + (dataset / "keys.txt").read_text().split()[:14]


def test_gnu_tar_extracts_equal_bits(dataset: Path, features: Path, tmp_path: Path) -> None:
    for path in _shards(dataset):
        subprocess.run(["tar", "-xf", str(path), "-C", str(tmp_path)], check=True)
    for path in tmp_path.glob("*.npy"):
        key, field, _ = path.name.split(".")
        np.testing.assert_array_equal(np.load(path), _source(features, key)[field])
    assert len(list(tmp_path.iterdir())) == 28 * 4


def test_webdataset_reads_equal_bits(dataset: Path, features: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in _shards(dataset)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(samples) == 28
    for sample in samples:
        for field, expected in _source(features, sample["__key__"]).items():
            np.testing.assert_array_equal(sample[f"{field}.npy"], expected)


def test_bytes_are_reproducible_and_the_fingerprint_ignores_shard_size(
    features: Path, dataset: Path, tmp_path: Path
) -> None:
    again = shard(features, tmp_path / "again", clips_per_shard=4)
    for path in dataset.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(dataset)).read_bytes()
    other = shard(features, tmp_path / "other", clips_per_shard=9, seed=1)
    assert other.fingerprint == again.fingerprint
    assert len(other.shards) == 4 < len(again.shards)


def test_mean_frame_is_the_mean_of_normalised_training_frames(dataset: Path, features: Path) -> None:
    keys = [key for key in (dataset / "keys.txt").read_text().split() if "-train-" in key]
    frames = torch.cat([torch.from_numpy(_source(features, key)["features"]).double() for key in keys])
    expected = torch.nn.functional.layer_norm(frames, (16,), eps=1e-6).mean(0)
    found = torch.from_numpy(np.load(dataset / "mean_frame.npy"))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_an_interrupted_run_is_repeated_and_a_finished_one_is_kept(
    features: Path, dataset: Path, tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 9:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        shard(features, out, clips_per_shard=4, progress=stop)
    assert [path.name for path in _shards(out)] == ["train-000000.tar", "train-000001.tar"]
    assert not (out / "manifest.json").exists()
    shard(features, out, clips_per_shard=4)
    assert (out / "manifest.json").read_bytes() == (dataset / "manifest.json").read_bytes()
    with pytest.raises(DataError, match="complete data set"):
        shard(features, out)


@pytest.mark.parametrize(
    ("key", "change", "expected"),
    [
        ("key", "a.b", "no dots"),
        ("key", "../up", "letters, digits"),
        ("key", "k" * 81, "at most 80 bytes"),
        ("split", "test", "unknown split 'test'"),
        ("length", 3, "it has 4 frames"),
        ("sha256", "0", "differs from features.json"),
    ],
)
def test_bad_clip_lists_are_refused(
    features_writer: Callable[..., Path], tmp_path: Path, key: str, change: object, expected: str
) -> None:
    folder = features_writer(tmp_path / "features", per_split=1)
    document = json.loads((folder / "features.json").read_text())
    document["clips"][0][key] = change
    (folder / "features.json").write_text(json.dumps(document))
    with pytest.raises(DataError) as caught:
        shard(folder, tmp_path / "out")
    assert expected in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_foreign_folder_is_left_alone(features: Path, tmp_path: Path) -> None:
    mine = tmp_path / "shards" / "train-000000.tar"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(DataError, match="holds shards"):
        shard(features, tmp_path)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"grid": None}, "features.grid=None: must be of type list"),
        ({"clips": [{"key": "a"}]}, "features.clips[0].partition=None: must be of type str"),
        ({"encode_mode": "prefx"}, "did you mean prefix?"),
        ({"clips": []}, "has no clips"),
    ],
)
def test_a_hand_written_document_is_checked(
    features_writer: Callable[..., Path], tmp_path: Path, change: dict, expected: str
) -> None:
    folder = features_writer(tmp_path / "features", per_split=1)
    document = json.loads((folder / "features.json").read_text()) | change
    (folder / "features.json").write_text(json.dumps(document))
    with pytest.raises(DataError) as caught:
        shard(folder, tmp_path / "out")
    assert expected in str(caught.value)
    assert not (tmp_path / "out").exists()
