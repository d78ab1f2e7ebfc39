from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.sources.base import ArraySpec
from data_pipeline.sources.layout import BadClip, Layout, normalised
from data_pipeline.sources.stored import Seen

Fields = dict[str, tuple[str, tuple[int, ...]]]
PLAIN = {"features_dtype": None, "tokens": None, "flat_tokens": None, "first_extrinsics": False}


def specs(fields: Fields, **rules: object) -> tuple[dict[str, ArraySpec], tuple[int, int] | None]:
    layout = Layout(**{**PLAIN, "action_alignment": "as-is", **rules})  # pyright: ignore
    return layout.specs({name: Seen(*value, "") for name, value in fields.items()}, {name: name for name in fields})


def fields(features: tuple[int, ...], dtype: str = "float16", rows: int = 3) -> Fields:
    return {"features": (dtype, features), "actions": ("float32", (rows, 2))}


@given(frames=st.integers(2, 6), rows=st.integers(1, 4), columns=st.integers(1, 4), channels=st.integers(1, 8))
def test_every_layout_of_features_means_the_same(frames: int, rows: int, columns: int, channels: int) -> None:
    tokens = rows * columns
    expected = (frames, tokens, channels)
    shapes = {(frames, rows, columns, channels): (rows, columns), expected: None, (frames * tokens, channels): None}
    values = np.arange(frames * tokens * channels, dtype=np.float32)
    for shape, grid in shapes.items():
        found, found_grid = specs(fields(shape, "float32", frames - 1), tokens=tokens)
        assert found["features"] == ArraySpec("float32", expected)
        assert found_grid == grid
        array = normalised("features", values.reshape(shape), found["features"])
        assert array.shape == expected
        assert np.shares_memory(array, values)


@pytest.mark.parametrize(
    ("features", "rules", "expected"),
    [
        ((24, 8), {}, "only when the option tokens says N"),
        ((25, 8), {"flat_tokens": 6}, "25 rows are no whole frames of 6 tokens"),
        ((4, 6, 8), {"tokens": 7}, "its frames have 6 tokens, the option tokens says 7"),
        ((8,), {}, "must be [F * N, E]"),
        ((4, 0, 8), {}, "must be [F * N, E]"),
        ((0, 6, 8), {}, "must be [F * N, E]"),
        ((1, 6, 8), {}, "there is no transition"),
    ],
)
def test_shapes_that_are_no_frames_are_refused(features: tuple[int, ...], rules: dict[str, int], expected: str) -> None:
    with pytest.raises(BadClip) as caught:
        specs(fields(features), **rules)
    assert expected in str(caught.value)


def test_default_tokens_of_a_kind_do_not_contradict_what_arrays_say() -> None:
    assert specs(fields((4, 6, 8)), flat_tokens=256)[0]["features"].shape == (4, 6, 8)
    assert specs(fields((4 * 256, 8)), flat_tokens=256)[0]["features"].shape == (4, 256, 8)


@pytest.mark.parametrize(
    ("stored", "meant", "expected"),
    [
        ("uint16", "bfloat16", "bfloat16"),
        ("uint16", "uint16", "uint16"),
        ("uint8", "float8_e4m3fn", "float8_e4m3fn"),
        ("uint8", "float8_e5m2", "float8_e5m2"),
        ("int16", None, "int16"),
        ("float64", None, "float64"),
    ],
)
def test_unsigned_integers_are_what_the_user_says(stored: str, meant: str | None, expected: str) -> None:
    assert specs(fields((4, 6, 8), stored), features_dtype=meant)[0]["features"].dtype == expected
    if meant is not None:
        with pytest.raises(BadClip, match="is it"):
            specs(fields((4, 6, 8), stored))
        with pytest.raises(BadClip, match=f"{meant}, as the option features_dtype says, is stored as {stored}"):
            specs(fields((4, 6, 8), "float16"), features_dtype=meant)


def test_int8_features_come_with_their_scale_and_nothing_else_does() -> None:
    def scaled(dtype: str, scale_dtype: str = "float32", channels: int = 8) -> Fields:
        return fields((4, 6, 8), dtype) | {"features_scale": (scale_dtype, (channels,))}

    assert specs(scaled("int8"))[0]["features_scale"] == ArraySpec("float32", (8,))
    for case, expected in (
        (fields((4, 6, 8), "int8"), "mean nothing without features_scale"),
        (scaled("float16"), "belongs to int8"),
        (scaled("int8", channels=7), "has 7 channels, features have 8"),
        (scaled("int8", "float64"), "must be float32 [E]"),
    ):
        with pytest.raises(BadClip) as caught:
            specs(case)
        assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("alignment", "fit", "misfit"),
    [
        ("as-is", (3,), (2, 4)),
        ("first", (3, 4, 99), (2,)),
        ("row1-to-row0", (2, 99), (1,)),
        ("pair-mean", (6, 8), (5,)),
        ("difference", (4, 5), (3,)),
    ],
)
def test_rows_of_actions_fit_the_alignment(alignment: str, fit: tuple[int, ...], misfit: tuple[int, ...]) -> None:
    for rows in fit:
        # All recorded rows are kept: alignment is the reader's.
        assert specs(fields((4, 6, 8), rows=rows), action_alignment=alignment)[0]["actions"].shape == (rows, 2)
    for rows in misfit:
        with pytest.raises(
            BadClip, match=f"actions have {rows} rows, and 4 frames need .*provenance.action_alignment={alignment}"
        ):
            specs(fields((4, 6, 8), rows=rows), action_alignment=alignment)


def test_an_array_that_is_not_what_was_listed_is_refused() -> None:
    spec = ArraySpec("bfloat16", (4, 6, 8))
    assert normalised("features", np.zeros((24, 8), np.uint16), spec).shape == (4, 6, 8)
    for array in (np.zeros((24, 8), np.float16), np.zeros((23, 8), np.uint16)):
        with pytest.raises(BadClip, match="were listed"):
            normalised("features", array, spec)
    with pytest.raises(BadClip, match="were listed"):
        normalised("actions", np.zeros((2, 3), np.float32), ArraySpec("float32", (3, 2)))


def test_the_usual_tokens_are_taken_when_rows_confirm_them() -> None:
    for rows in (7, 8, 14, 16):
        found, _ = specs(fields((8 * 256, 8), rows=rows), flat_tokens=256, action_alignment="row1-to-row0")
        assert found["features"].shape == (8, 256, 8)


@pytest.mark.parametrize(
    ("features", "rows", "expected"),
    [
        ((8 * 576, 8), 16, "frames of 256 tokens would fit and frames of 576; say it with the option tokens"),
        ((64 * 196, 8), 128, "with 256 tokens there would be 49, which 128 rows of actions do not confirm"),
        ((8 * 256, 8), 11, "with 256 tokens there would be 8, which 11 rows of actions do not confirm"),
    ],
)
def test_flat_features_are_not_cut_by_a_guess(features: tuple[int, ...], rows: int, expected: str) -> None:
    rules = {"flat_tokens": 256, "action_alignment": "row1-to-row0"}
    with pytest.raises(BadClip) as caught:
        specs(fields(features, rows=rows), **rules)
    assert expected in str(caught.value)
    assert specs(fields(features, rows=rows), tokens=features[0] // 8, **rules)[0]["features"].shape[0] == 8
