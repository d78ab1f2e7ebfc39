from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.shard import shard
from data_pipeline.shard.statistics import Moments, Statistics, merged, sampled, token_groups
from tests.clip_sources import MemorySource, memory_source


def _normalised(rows: np.ndarray) -> np.ndarray:
    centred = rows - rows.mean(-1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6)


def _stats(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "stats.npz", allow_pickle=False) as stored:
        return dict(stored)


def _training(source: MemorySource, field: str, partition: str = "") -> np.ndarray:
    chosen = [clip for clip in source.clips if clip.split == "train" and partition in ("", clip.partition)]
    return np.concatenate([source.arrays[clip.key][field].astype(np.float64) for clip in chosen])


@given(st.lists(st.integers(1, 700), min_size=1, max_size=5), st.floats(-1e3, 1e3), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_moments_of_parts_are_those_of_the_whole(sizes: list[int], offset: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    parts = [random.normal(offset, 2 + number, (size, 3)) for number, size in enumerate(sizes)]
    total = Moments(3)
    for rows in parts:
        one = Moments(3)
        one.add(rows)
        total.merge(Moments.of(one.arrays()))
    rows = np.concatenate(parts)
    assert total.count == len(rows)
    np.testing.assert_allclose(total.mean, rows.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(total.std, rows.std(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(total.low, rows.min(0))
    np.testing.assert_array_equal(total.high, rows.max(0))


def test_single_precision_rows_lose_nothing_that_matters() -> None:
    rows = np.random.default_rng(0).normal(300, 1, (5000, 4)).astype(np.float32)
    moments = Moments(4)
    moments.add(rows)
    np.testing.assert_allclose(moments.mean, rows.astype(np.float64).mean(0), rtol=1e-8)
    np.testing.assert_allclose(moments.std, rows.astype(np.float64).std(0), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8"])
def test_all_tokens_give_what_numpy_gives_in_double_precision(tmp_path: Path, dtype: str) -> None:
    source = memory_source(14, dtype="float32", extrinsics=2)
    shard(source, tmp_path, clips_per_shard=3, dtype=dtype, statistics="all")  # pyright: ignore[reportArgumentType]
    found = _stats(tmp_path)
    # int8 and bfloat16 shards hold rounded numbers: the statistics are theirs, near the source's.
    near = {"float32": 1e-5, "float16": 1e-3}.get(dtype, 2e-2)
    features = _training(source, "features")
    rows = features.reshape(-1, 16)
    np.testing.assert_allclose(found["channel_mean"], rows.mean(0), atol=near * 3)
    np.testing.assert_allclose(found["channel_std"], rows.std(0), rtol=near)
    np.testing.assert_allclose(found["channel_absmax"], np.abs(rows).max(0), rtol=near)
    assert found["channel_count"] == len(rows)
    mean_frame = np.load(tmp_path / "mean_frame.npy")
    assert mean_frame.dtype == np.float32
    np.testing.assert_allclose(mean_frame, _normalised(features).mean(0), atol=near)
    assert list(found["partitions"]) == ["base", "ice"]
    for number, partition in enumerate(found["partitions"]):
        values = _training(source, "features", str(partition))
        assert found["features_count"][number] == values.size
        for name, expected in (("mean", values.mean()), ("std", values.std()), ("min", values.min())):
            np.testing.assert_allclose(found[f"features_{name}"][number], [expected], rtol=near, atol=near * 3)
        for field in ("actions", "states", "extrinsics"):
            part = _training(source, field, str(partition))
            assert found[f"{field}_count"][number] == len(part)
            for name, expected in (
                ("mean", part.mean(0)),
                ("std", part.std(0)),
                ("min", part.min(0)),
                ("max", part.max(0)),
            ):
                np.testing.assert_allclose(found[f"{field}_{name}"][number], expected, rtol=1e-6, atol=1e-7)


def test_a_sample_sees_each_token_in_one_of_eight_frames(tmp_path: Path) -> None:
    source = memory_source(16, heldout=0, lengths=(8,), frame=(21, 16), dtype="float32")
    manifest = shard(source, tmp_path, clips_per_shard=5, statistics="sample")
    assert manifest.statistics_share == 0.125
    found = _stats(tmp_path)
    assert found["channel_count"] == 16 * 21
    groups = token_groups(21, 8)
    assert sorted(np.concatenate(groups).tolist()) == list(range(21))
    expected, rows = np.zeros((21, 16)), []
    ordered = sorted(source.clips, key=lambda clip: clip.key)
    for number, features in enumerate(source.arrays[clip.key]["features"] for clip in ordered):
        for frame in range(8):
            group = groups[(8 * number + frame) % 8]
            expected[group] += _normalised(features[frame, group].astype(np.float64)) / 16
            rows.append(features[frame, group].astype(np.float64))
    np.testing.assert_allclose(np.load(tmp_path / "mean_frame.npy"), expected, atol=1e-5)
    np.testing.assert_allclose(found["channel_mean"], np.concatenate(rows).mean(0), atol=1e-5)
    np.testing.assert_allclose(found["channel_std"], np.concatenate(rows).std(0), rtol=1e-5)


def test_short_clips_together_show_every_token_to_the_sample(tmp_path: Path) -> None:
    source = memory_source(20, heldout=0, lengths=(2, 3), frame=(13, 8))
    shard(source, tmp_path, clips_per_shard=4, statistics="sample")
    assert np.all(np.abs(np.load(tmp_path / "mean_frame.npy")).sum(1) > 0)


def test_the_sample_does_not_depend_on_how_clips_are_sharded(tmp_path: Path) -> None:
    source = memory_source(20, frame=(13, 8))
    shard(source, tmp_path / "a", clips_per_shard=3, statistics="sample")
    shard(source, tmp_path / "b", clips_per_shard=20, seed=5, statistics="sample")
    a, b = _stats(tmp_path / "a"), _stats(tmp_path / "b")
    assert a.keys() == b.keys()
    for name in a:
        if name == "partitions":
            continue
        np.testing.assert_allclose(a[name], b[name], rtol=1e-6, atol=1e-7)


def test_clips_of_no_training_split_leave_zeros(tmp_path: Path) -> None:
    shard(memory_source(4, heldout=4), tmp_path)
    found = _stats(tmp_path)
    assert found["channel_count"] == 0
    for name in ("channel_mean", "channel_std", "channel_absmax", "actions_mean", "actions_min", "states_max"):
        assert not found[name].any()
    assert not np.load(tmp_path / "mean_frame.npy").any()


def test_samples_are_the_stored_numbers_of_the_picked_tokens() -> None:
    random = np.random.default_rng(0)
    features, scale = random.integers(-127, 128, (5, 9, 4)).astype(np.int8), random.random(4).astype(np.float32)
    groups = token_groups(9, 4)
    rows = sampled(features, "int8", scale, groups, 3)
    expected = np.concatenate([features[frame, groups[(3 + frame) % 4]] * scale for frame in range(5)])
    np.testing.assert_array_equal(rows.numpy(), expected)


def test_parts_are_merged_in_their_order(tmp_path: Path) -> None:
    parts = []
    for number in range(3):
        one = Statistics((4, 8), {"actions": 2}, 1, 1, feature_type="float32")
        random = np.random.default_rng(number)
        arrays = {
            "features": random.normal(size=(3, 4, 8)).astype(np.float32),
            "actions": random.random((2, 2), np.float32),
        }
        one.add(arrays, 0, 0)
        parts.append(one.arrays())
    summary = merged(parts)
    assert summary.channels.count == 3 * 3 * 4
    assert summary.write(tmp_path, ["all"]) == merged(parts).write(tmp_path, ["all"])
    with pytest.raises(ValueError, match="no parts"):
        merged([])


def test_the_result_does_not_depend_on_the_threads_of_torch(tmp_path: Path) -> None:
    source = memory_source(6, frame=(64, 256))
    threads = torch.get_num_threads()
    digests = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            digests.append(shard(source, tmp_path / str(count)).files)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert digests[0] == digests[1]
