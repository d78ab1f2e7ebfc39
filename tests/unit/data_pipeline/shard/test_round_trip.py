"""What goes into a data set comes out of it, whatever the type, read by us, by WebDataset, or from a zarr group."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.checksum import checksum_function
from data_pipeline.dataset.index import Index
from data_pipeline.dtypes import STORED_TYPES
from data_pipeline.errors import DataError
from data_pipeline.schema import Manifest
from data_pipeline.shard import shard
from data_pipeline.shard.convert import as_float32, converted
from data_pipeline.sources.base import ArraySpec, SourceClip
from tests.clip_sources import MemorySource, memory_source


def _read(folder: Path, manifest: Manifest) -> dict[str, dict[str, np.ndarray]]:
    """Every clip's fields as bytes of the shards at the places of the index, checksums compared."""
    clips: dict[str, dict[str, np.ndarray]] = {}
    checksum = checksum_function(manifest.checksum)
    for row in Index(folder, manifest).rows():
        content = np.fromfile(folder / "shards" / manifest.shards[row.shard].name, np.uint8)
        clips[row.key] = {}
        for name, payload in row.payloads.items():
            values = content[payload.offset : payload.offset + payload.nbytes]
            assert checksum(values) == payload.checksum
            if name == "features":
                frames = values.reshape(row.length, -1)
                assert tuple(checksum(np.ascontiguousarray(frame)) for frame in frames) == payload.frame_checksums
            clips[row.key][name] = values.view(STORED_TYPES[manifest.dtypes[name]].numpy)
    return clips


def _expected(source: MemorySource, key: str, dtype: str) -> dict[str, np.ndarray]:
    arrays, kind = source.arrays[key], next(clip for clip in source.clips if clip.key == key).arrays["features"].dtype
    arrays = {name: array if "features" in name else array.astype(np.float32) for name, array in arrays.items()}
    if dtype in ("keep", kind):
        return arrays
    result = converted(arrays["features"], arrays.pop("features_scale", None), kind, dtype)
    scale = {} if result.scale is None else {"features_scale": result.scale}
    return {**arrays, "features": result.values, **scale}


@pytest.mark.parametrize(
    ("source_type", "dtype"),
    [(name, "keep") for name in STORED_TYPES]
    + [("float32", name) for name in ("float16", "bfloat16", "int8")]
    + [("float64", "float32"), ("int16", "float32"), ("int8", "float16"), ("bfloat16", "int8"), ("float16", "float16")],
)
def test_every_type_is_stored_and_found_bit_for_bit(tmp_path: Path, source_type: str, dtype: str) -> None:
    scale = 1000 if source_type == "int16" else 1
    source = memory_source(
        6,
        dtype=source_type,
        extrinsics=2,
        action_dtype="float64",
        values=lambda random, shape: (random.normal(size=shape) * scale).astype(np.float32),
    )
    manifest = shard(source, tmp_path, clips_per_shard=2, dtype=dtype)  # pyright: ignore[reportArgumentType]
    stored = source_type if dtype == "keep" else dtype
    assert manifest.dtypes["features"] == stored
    assert ("features_scale" in manifest.dtypes) == (stored == "int8")
    assert (manifest.conversion is None) == (stored == source_type)
    found = _read(tmp_path, manifest)
    assert found.keys() == source.arrays.keys()
    for key, fields in found.items():
        expected = _expected(source, key, dtype)
        assert fields.keys() == expected.keys()
        for name, values in fields.items():
            np.testing.assert_array_equal(values, expected[name].reshape(-1))
    if manifest.conversion is not None:
        assert (manifest.conversion.from_dtype, manifest.conversion.to_dtype) == (source_type, dtype)
        assert manifest.conversion.relative_rmse < 0.015
        assert manifest.conversion.relative_rmse_normalised < 0.015
        assert manifest.conversion.min_cosine > 0.999
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["notes"][0].startswith("actions: float64 was stored as float32; ")


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_webdataset_reads_unusual_types_as_numbers_of_their_width(tmp_path: Path, dtype: str) -> None:
    webdataset = pytest.importorskip("webdataset")
    source = memory_source(5, dtype=dtype, heldout=0)
    manifest = shard(source, tmp_path, clips_per_shard=2)
    urls = [str(tmp_path / "shards" / entry.name) for entry in manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(samples) == 5
    for sample in samples:
        for name, values in source.arrays[sample["__key__"]].items():
            np.testing.assert_array_equal(sample[f"{name}.npy"], values)
        assert sample["meta.json"]["dtypes"]["features"] == dtype
        assert sample["meta.json"]["key"] == sample["__key__"]


def test_the_fingerprint_is_that_of_the_clips_and_not_of_their_shards(tmp_path: Path) -> None:
    source = memory_source(12)
    prints = [
        shard(source, tmp_path / "a", clips_per_shard=3).fingerprint,
        shard(source, tmp_path / "b", clips_per_shard=5, seed=9).fingerprint,
        shard(replace(source, clips=source.clips[::-1]), tmp_path / "c").fingerprint,
        shard(source, tmp_path / "d", format="zarr").fingerprint,
    ]
    assert len(set(prints)) == 1
    other = {key: dict(arrays) for key, arrays in source.arrays.items()}
    key = source.clips[0].key
    other[key]["actions"] = other[key]["actions"] + 1
    others = [
        shard(replace(source, arrays=other), tmp_path / "e").fingerprint,
        shard(replace(source, clips=source.clips[1:]), tmp_path / "f").fingerprint,
        shard(source, tmp_path / "g", dtype="float32").fingerprint,
        shard(replace(source, provenance=replace(source.provenance, encoder="x")), tmp_path / "h").fingerprint,
    ]
    assert len({prints[0], *others}) == 5


@pytest.mark.parametrize(("dtype", "skipped"), [("float16", False), ("int8", False), ("bfloat16", True)])
def test_plain_zarr_reads_the_group(tmp_path: Path, dtype: str, skipped: bool) -> None:
    zarr = pytest.importorskip("zarr")
    source = memory_source(11, dtype=dtype, extrinsics=2)
    left_out = {source.clips[4].key} if skipped else set()
    source = replace(source, unreadable=frozenset(left_out))
    manifest = shard(source, tmp_path, clips_per_shard=4, format="zarr", on_error="skip")
    assert (manifest.container, [entry.name for entry in manifest.shards]) == ("zarr", ["clips.zarr"])
    assert manifest.num_clips == 11 - len(left_out)
    group = zarr.open_group(tmp_path / "shards" / "clips.zarr", mode="r")
    assert group.attrs["partitions"] == list(manifest.partitions)
    assert group["features"].shape == (11, 5, 6, 16)
    assert group["features"].chunks == (1, 5, 6, 16)
    assert group["features"].shards == (4, 5, 6, 16)
    assert group["features"].attrs["stored_type"] == dtype
    keys = list(group["key"][:])
    assert sorted(key for key in keys if key) == sorted(source.arrays.keys() - left_out)
    listed = {clip.key: clip for clip in source.clips}
    for row, key in enumerate(keys):
        length = int(group["length"][row])
        if not key:
            assert length == 0
            assert not np.asarray(group["features"][row]).any()
            continue
        clip, arrays = listed[key], source.arrays[key]
        assert (length, int(group["rows"][row])) == (clip.length, len(arrays["actions"]))
        assert list(manifest.partitions)[int(group["partition"][row])] == clip.partition
        assert ("train", "heldout")[int(group["split"][row])] == clip.split
        for name, values in arrays.items():
            found = np.asarray(group[name][row])
            np.testing.assert_array_equal(found[: len(values)], values)
            assert not found[len(values) :].any()
    rows = Index(tmp_path, manifest).column("features_offset")
    assert [keys[row] for row in rows] == Index(tmp_path, manifest).keys()
    np.testing.assert_array_equal(group["features"][2:9, 1], np.asarray(group["features"][:])[2:9, 1])


def test_zarr_holds_the_values_tars_hold(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    source = memory_source(7, dtype="float32")
    tars = shard(source, tmp_path / "tar", dtype="int8", clips_per_shard=2)
    shard(source, tmp_path / "zarr", dtype="int8", clips_per_shard=2, format="zarr")
    group = zarr.open_group(tmp_path / "zarr" / "shards" / "clips.zarr", mode="r")
    found = _read(tmp_path / "tar", tars)
    for row, key in enumerate(group["key"][:]):
        back = np.asarray(group["features"][row]) * np.asarray(group["features_scale"][row])
        length = int(group["length"][row])
        stored = found[key]["features"].reshape(length, 6, 16)
        expected = as_float32(stored, "int8", found[key]["features_scale"]).numpy()
        np.testing.assert_array_equal(back[:length], expected)


@dataclass
class DrawnSource(MemorySource):
    """Makes its features when they are read, as files do."""

    def read(self, clip: SourceClip) -> dict[str, np.ndarray]:
        return super().read(clip) | {"features": np.ones(clip.arrays["features"].shape, np.float16)}


def test_two_clips_at_a_time_are_in_memory_however_many_there_are(tmp_path: Path) -> None:
    clip_bytes = 8 * 128 * 512 * 2
    peaks = []
    for count in (6, 24):
        small = memory_source(count, lengths=(8,), frame=(1, 1))
        large = {"features": ArraySpec("float16", (8, 128, 512))}
        clips = [replace(clip, arrays={**clip.arrays, **large}) for clip in small.clips]
        tracemalloc.start()
        shard(DrawnSource(clips, small.arrays), tmp_path / str(count), clips_per_shard=count, statistics="sample")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Beside the clips: sums of the statistics, a quarter of them, twice while they are written.
    assert max(peaks) < 4.5 * clip_bytes
    assert peaks[1] < peaks[0] + 0.5 * clip_bytes


def test_a_type_that_cannot_be_kept_stops_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dtype=float32"):
        shard(memory_source(3, dtype="int32"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
