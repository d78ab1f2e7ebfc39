from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.dataset.inspect import InspectedDataset, describe, describe_clip
from data_pipeline.errors import DataError
from data_pipeline.shard import shard
from tests.small_dataset import write_dataset


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, features: Path) -> InspectedDataset:
    out = tmp_path_factory.mktemp("out")
    shard(features, out, clips_per_shard=4, dtype="int8")
    return InspectedDataset(out)


def _source(features: Path, key: str) -> dict[str, np.ndarray]:
    with np.load(features / key.split("-")[0] / f"{key}.npz") as arrays:
        return dict(arrays)


def test_a_data_set_is_described_by_its_manifest_index_and_statistics(opened: InspectedDataset, features: Path) -> None:
    found = describe(opened)
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(found, allow_nan=False))
    assert (found["clips"], found["tokens"], found["channels"]) == (28, 6, 16)
    assert found["frames"] == {"all": 128, "least": 4, "most": 5}
    assert found["partitions"]["ice"] == {"train": 7, "heldout": 7, "frames": 64}
    assert found["bytes"]["features"] == 128 * 6 * 16
    assert found["conversion"]["to_dtype"] == "int8"
    assert found["action_alignment"] == "as-is"
    keys = [path.stem for path in (features / "ice").glob("ice-train-*.npz")]
    actions = np.concatenate([_source(features, key)["actions"] for key in keys])
    figures = found["statistics"]["actions"]["ice"]
    assert figures["rows"] == len(actions)
    np.testing.assert_allclose(figures["mean"], actions.mean(0), rtol=1e-5)
    np.testing.assert_allclose(figures["max"], actions.max(0), rtol=1e-6)
    channels = found["statistics"]["features"]
    assert len(channels["largest_channels"]) == 3
    assert sum(each["rows"] for each in channels["partitions"].values()) == channels["tokens"]
    (largest,) = channels["partitions"]["ice"]["max"]
    assert 0 < largest <= channels["absmax"]


def test_a_clip_is_described_by_its_values(opened: InspectedDataset, features: Path) -> None:
    key = "base-heldout-00003"
    row, source = opened.row(key), _source(features, key)
    found = describe_clip(opened, row)
    assert (found["key"], found["partition"], found["split"]) == (key, "base", "heldout")
    assert found["fields"]["features"]["shape"] == [4, 6, 16]
    np.testing.assert_allclose(found["fields"]["features"]["max"], source["features"].max(), rtol=1e-2)
    np.testing.assert_allclose(found["fields"]["actions"]["mean"], source["actions"].mean(), rtol=1e-5)
    assert found["fields"]["actions"][opened.manifest.checksum] == f"{row.payloads['actions'].checksum:08x}"
    np.testing.assert_allclose(opened.values(row, "features"), source["features"], atol=0.03)
    normal = opened.normalised(row)
    np.testing.assert_allclose(normal.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(normal.std(-1), 1, atol=1e-3)


def test_first_clips_are_of_all_partitions(opened: InspectedDataset) -> None:
    partitions = [row.partition for row in opened.first_rows(4)]
    assert sorted(partitions[:2]) == sorted(partitions[2:]) == [0, 1]
    assert len(opened.first_rows(100)) == 28


def test_rows_are_those_of_the_index(opened: InspectedDataset) -> None:
    for number, row in enumerate(opened.index.rows()):
        found = opened.row_at(number)
        assert (found.key, found.shard, found.length, found.partition, found.split, found.rows) == (
            row.key,
            row.shard,
            row.length,
            row.partition,
            row.split,
            row.rows,
        )
        assert {name: p.offset for name, p in found.payloads.items()} == {n: p.offset for n, p in row.payloads.items()}


def test_unknown_keys_and_truncated_shards_are_named(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path)
    dataset = InspectedDataset(tmp_path)
    with pytest.raises(DataError, match="called like base-train-00001"):
        dataset.row("base-tran-00001")
    path = tmp_path / "shards" / manifest.shards[0].name
    row = dataset.row_at(3)
    path.write_bytes(path.read_bytes()[: row.payloads["features"].offset + 100])
    with pytest.raises(DataError, match=r"clip base-train-00003 ends after 100 of 960 bytes of features"):
        dataset.array(row, "features")
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        dataset.array(row, "features")


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("features_nbytes", 1 << 60, "the index cannot be trusted"),
        ("features_nbytes", -5, "the index cannot be trusted"),
        ("partition", 900, "it must be 0 to"),
        ("shard", 77, "it must be 0 to"),
        ("rows", -1, "the index cannot be trusted"),
    ],
)
def test_numbers_of_a_hostile_index_are_not_used(tmp_path: Path, column: str, value: int, expected: str) -> None:
    write_dataset(tmp_path)
    path = tmp_path / "index" / f"{column}.npy"
    array = np.load(path)
    array[3] = value
    np.save(path, array)
    document = json.loads((tmp_path / "manifest.json").read_text())
    document["files"][f"index/{column}.npy"] = hashlib.sha256(path.read_bytes()).hexdigest()
    document.pop("digest", None)
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=expected):
        InspectedDataset(tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"channel_mean": np.zeros((3, 3))}, "channel_mean has the shape"),
        ({"channel_absmax": np.zeros(0)}, "channel_absmax has the shape"),
        ({"actions_count": np.zeros(0, np.int64)}, "actions_count has the shape"),
        ({"actions_mean": np.array(["x"])}, "its type"),
    ],
)
def test_hostile_statistics_are_named(tmp_path: Path, change: dict[str, np.ndarray], expected: str) -> None:
    write_dataset(tmp_path)
    dataset = InspectedDataset(tmp_path)
    with np.load(tmp_path / "stats.npz") as stored:
        arrays: Any = {**stored, **change}
    np.savez(tmp_path / "stats.npz", **arrays)
    with pytest.raises(DataError, match=expected):
        describe(dataset)
    (tmp_path / "stats.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match="the statistics cannot be used"):
        describe(dataset)


def test_statistics_of_rows_without_their_number_are_left_out(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    with np.load(tmp_path / "stats.npz") as stored:
        arrays: Any = {name: array for name, array in stored.items() if name != "actions_count"}
    np.savez(tmp_path / "stats.npz", **arrays)
    assert "actions" not in describe(InspectedDataset(tmp_path))["statistics"]
