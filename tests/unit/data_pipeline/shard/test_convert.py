from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from data_pipeline.dtypes import STORED_TYPES
from data_pipeline.shard.convert import (
    Deviation,
    all_finite,
    as_float32,
    converted,
    first_not_finite,
    rounded,
    tensor,
)
from tests.clip_sources import stored_features

FLOATS = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")


def _with_outliers(shape: tuple[int, ...]) -> np.ndarray:
    """Features as encoders make them: every 64th channel is a dozen times as large."""
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    values[..., ::64] *= 12
    return values


def _bits(name: str) -> np.ndarray:
    """Every pattern of a small type, or random ones and the rims of a large one."""
    if name == "float64":
        random = np.random.default_rng(0).integers(0, 1 << 64, 5000, dtype=np.uint64)
        rims = np.array([0x7FF0 << 48, (0x7FF0 << 48) - 1, 0xFFF0 << 48, 0xFFF8 << 48, 0x7FF8 << 48], np.uint64)
        return np.concatenate([random, rims]).view(np.float64)
    stored = STORED_TYPES[name]
    if stored.itemsize <= 2:
        return np.arange(1 << (8 * stored.itemsize)).astype(f"u{stored.itemsize}").view(stored.numpy)
    random = np.random.default_rng(0).integers(0, 1 << 32, 5000, dtype=np.uint32)
    rims = np.array([0x7F800000, 0x7F7FFFFF, 0xFF800000, 0xFF7FFFFF, 0x7FC00000, 0xFFC00000, 0x80000000], np.uint32)
    return np.concatenate([random, rims]).view(np.float32)


@pytest.mark.parametrize("name", FLOATS)
def test_every_bit_pattern_is_judged_as_torch_judges_it(name: str) -> None:
    bits = _bits(name)
    finite = torch.isfinite(tensor(bits, name).double() if name == "float64" else tensor(bits, name).float()).numpy()
    one_by_one = np.array([all_finite(bits[row : row + 1], name) for row in range(len(bits))])
    np.testing.assert_array_equal(one_by_one, finite)
    assert all_finite(bits[finite], name)


def test_integers_are_finite_and_the_first_other_number_is_found() -> None:
    assert all_finite(np.full((2, 3), -1, np.int8), "int8")
    values = np.ones((2, 3, 4), np.float16)
    values[1, 0, 2] = -np.inf
    values[1, 2, 0] = np.nan
    assert not all_finite(values, "float16")
    assert first_not_finite(values, "float16") == ((1, 0, 2), -np.inf)


@pytest.mark.parametrize("source", ["float16", "bfloat16", "float32", "float64", "int32", "float8_e5m2", "int8"])
@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
def test_conversions_round_as_torch_does(source: str, target: str) -> None:
    stored = stored_features(_with_outliers((3, 4, 128)) * (100 if source == "int32" else 1), source)
    result = converted(stored["features"], stored.get("features_scale"), source, target)
    numbers = as_float32(stored["features"], source, stored.get("features_scale"))
    expected = numbers.to(STORED_TYPES[target].torch)
    assert torch.equal(tensor(result.values, target), expected)
    assert result.values.dtype == STORED_TYPES[target].numpy
    assert (result.scale, result.overflows) == (None, 0)


def test_int8_keeps_outlier_channels_within_one_and_a_half_percent() -> None:
    values = _with_outliers((8, 64, 256))
    for source in ("float32", "float16"):
        stored = stored_features(values, source)["features"]
        result = converted(stored, None, source, "int8")
        assert result.scale is not None
        deviation = Deviation()
        before, after = as_float32(stored, source), as_float32(result.values, "int8", result.scale)
        deviation.add(before.flatten(0, 1), after.flatten(0, 1))
        assert deviation.relative_rmse < 0.015
        assert deviation.relative_rmse_normalised < 0.015
        assert deviation.min_cosine > 0.999
        error = (after - before).abs().amax((0, 1)).numpy()
        assert np.all(error <= result.scale * 0.5001)


def test_int8_rounds_half_to_even_and_has_scale_one_for_channels_of_zeros() -> None:
    values = np.zeros((1, 3, 4), np.float32)
    values[0, :, 0] = [127, 2.5, -3.5]
    values[0, 1, 2] = 1e-44
    values[0, :, 3] = [-254, 3, 5]
    result = converted(values, None, "float32", "int8")
    np.testing.assert_array_equal(result.scale, np.array([1, 1, 1, 2], np.float32))
    np.testing.assert_array_equal(result.values[0], [[127, 0, 0, -127], [2, 0, 0, 2], [-4, 0, 0, 2]])


@given(arrays(np.float32, (2, 3, 4), elements=st.floats(-(2.0**99), 2.0**99, width=32)))
@settings(max_examples=200, deadline=None)
def test_int8_is_never_more_than_half_a_step_off(values: np.ndarray) -> None:
    result = converted(values, None, "float32", "int8")
    assert result.scale is not None
    assert result.overflows == 0
    back = result.values.astype(np.float64) * result.scale.astype(np.float64)
    assert np.all(np.abs(back - values) <= result.scale * (0.5 + 1e-4))


@pytest.mark.parametrize(
    ("source", "target", "value"),
    [
        ("float32", "float16", 65520.0),
        ("float64", "float32", 1e39),
        ("float64", "int8", -1e39),
        ("float32", "bfloat16", 3.4e38),
    ],
)
def test_overflows_are_counted(source: str, target: str, value: float) -> None:
    values = np.ones((2, 3, 4), source)
    values[1, 2, 3] = value
    assert converted(values, None, source, target).overflows == 1
    values[1, 2, 3] = 3.0
    assert converted(values, None, source, target).overflows == 0


def test_read_only_arrays_are_read_without_a_copy_or_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    values = np.arange(6, dtype=np.float32)
    values.flags.writeable = False
    alias = tensor(values, "float32")
    assert alias.data_ptr() == values.__array_interface__["data"][0]
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


def test_small_fields_report_what_float32_cannot_hold() -> None:
    exact, changed, largest = rounded(np.array([[1.0, 0.5, -2.0]]), "float64")
    assert exact.dtype == np.float32
    assert (changed, largest) == (0, 0.0)
    _, changed, largest = rounded(np.array([[0.1, 0.5, (1 << 24) + 1.0]]), "float64")
    assert changed == 2
    assert 1e-9 < largest < 1e-7
    single, changed, _ = rounded(np.array([(1 << 24) + 1, 7], np.int64), "int64")
    assert changed == 1
    np.testing.assert_array_equal(single, np.array([1 << 24, 7], np.float32))
    same = np.ones((2, 2), np.float32)
    assert rounded(same, "float32")[0] is same
    half = np.array([0.1], np.float16)
    np.testing.assert_array_equal(rounded(half, "float16")[0], half.astype(np.float32))


def test_deviation_agrees_with_its_definition_and_merges() -> None:
    random = np.random.default_rng(1)
    before = random.normal(size=(20, 32)) * 5 + 1
    after = before + random.normal(size=before.shape) * 0.1

    def normalised(rows: np.ndarray) -> np.ndarray:
        centred = rows - rows.mean(-1, keepdims=True)
        return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6)

    total = Deviation()
    for part in (slice(0, 7), slice(7, 20)):
        one = Deviation()
        one.add(torch.from_numpy(before[part]).float(), torch.from_numpy(after[part]).float())
        total.merge(one)
    rmse = np.sqrt(np.square(before - after).sum() / np.square(before).sum())
    cosines = (before * after).sum(1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
    b, a = normalised(before), normalised(after)
    assert total.relative_rmse == pytest.approx(rmse, rel=1e-4)
    assert total.relative_rmse_normalised == pytest.approx(
        np.sqrt(np.square(b - a).sum() / np.square(b).sum()), rel=1e-4
    )
    assert total.min_cosine == pytest.approx(cosines.min(), abs=1e-6)
    lost = Deviation()
    lost.add(torch.ones(1, 4), torch.zeros(1, 4))
    assert lost.min_cosine == 0
