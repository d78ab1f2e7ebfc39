from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes

from hopescale.report.dashboard_picture import draw
from tests.dashboard_answers import TIMES, answers_for, layout_of

RAMP = np.linspace(0.0, 1.0, len(TIMES))


def axes_of(title: str, values: np.ndarray, board: str = "overview") -> Axes:
    """The axes of a panel whose series has these values; no other graph has any."""
    layout = layout_of(board)
    (axes,) = draw(layout, answers_for(layout, {title: [({"run": "a"}, values.tolist())]})).axes
    return axes


def y_labels(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


@pytest.mark.parametrize(
    ("title", "board", "values", "labels"),
    [
        ("Loss", "overview", 2 + RAMP, ["2.00", "2.25", "2.50", "2.75", "3.00"]),
        ("Loss", "overview", 2e-5 * RAMP, ["0", "5.0e-06", "1.0e-05", "1.5e-05", "2.0e-05"]),
        ("FLOPs per second", "overview", 4e12 * RAMP, ["0 TFLOPS", "1 TFLOPS", "2 TFLOPS", "3 TFLOPS", "4 TFLOPS"]),
        ("Time spent waiting for data", "overview", 0.05 * RAMP, ["0%", "2%", "4%"]),
        ("Reader position", "data", 4e6 * RAMP, ["0", "1,000,000", "2,000,000", "3,000,000", "4,000,000"]),
        ("Reader epoch", "data", 0 * RAMP, ["0", "1"]),
        ("Data wait seconds", "data", 0.004 * RAMP, ["0 ms", "1 ms", "2 ms", "3 ms", "4 ms"]),
        ("Memory bytes", "nodes", 2**30 * (3 + RAMP), ["3.00 GiB", "3.25 GiB", "3.50 GiB", "3.75 GiB", "4.00 GiB"]),
        ("Gradient norm", "optimizer", 10 ** (4 * RAMP - 2), ["0.01", "0.1", "1", "10", "100"]),
    ],
)
def test_the_axis_has_round_numbers_of_one_size(title: str, board: str, values: np.ndarray, labels: list[str]) -> None:
    assert y_labels(axes_of(title, values, board)) == labels


@pytest.mark.parametrize("values", [0 * RAMP, 3 + 0 * RAMP, -2 + 0 * RAMP, np.where(RAMP > 0.5, RAMP, np.nan)])
def test_flat_and_broken_lines_are_inside_their_axes(values: np.ndarray) -> None:
    low, high = axes_of("Loss", values).get_ylim()
    assert low <= np.nanmin(values) <= np.nanmax(values) <= high
    assert low < high


def test_an_axis_goes_below_0_only_for_numbers_that_do() -> None:
    assert axes_of("Loss", 0.01 * RAMP).get_ylim()[0] == 0
    assert axes_of("Loss", RAMP - 0.5).get_ylim()[0] < -0.5


def test_moments_are_in_utc_at_round_steps_and_inside() -> None:
    axes = axes_of("Loss", RAMP)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels[0] == "22:13:20"
    assert all(tick % 10 == 0 for tick in axes.get_xticks())
    assert TIMES[0] <= min(axes.get_xticks()) <= max(axes.get_xticks()) < TIMES[-1]


def test_numbers_that_are_not_positive_have_no_place_on_a_logarithmic_axis() -> None:
    assert axes_of("Gradient norm", 0 * RAMP, "optimizer").get_ylim() == (0.1, 10.0)
