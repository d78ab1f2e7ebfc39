from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from matplotlib.text import Text

from hopescale.dashboards.answers import Answers, marks
from hopescale.dashboards.compose import Heading, Layout, compose
from hopescale.dashboards.panel import COLUMNS
from hopescale.dashboards.prometheus_api import Series
from hopescale.report.dashboard_picture import HEADER, ROW, draw, named_series
from hopescale.report.files import png
from tests.dashboard_answers import SPAN, TIMES, answers_for, layout_of, matrix

RAMP = [float(second) for second in range(61)]
NAN = float("nan")


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text()]


def filled(layout: Layout) -> Answers:
    return answers_for(layout, {}, [({"run": "a", "rank": "0", "node": "n1", "kind": "x"}, RAMP)])


@pytest.mark.parametrize("layout", compose(), ids=lambda layout: layout.board.uid)
def test_headings_and_panels_are_drawn_in_their_places(layout: Layout) -> None:
    figure = draw(layout, filled(layout))
    written = texts(figure)
    for item in layout.items:
        assert (item.title if isinstance(item, Heading) else item.panel.title) in written
    assert "No data" not in written
    graphs = [placed for placed in layout.panels if placed.panel.kind in ("lines", "bars")]
    height = figure.get_size_inches()[1]
    for placed, axes in zip(graphs, figure.axes, strict=True):
        box, panel = axes.get_position(), placed.panel
        assert placed.x / COLUMNS <= box.x0 < box.x1 <= (placed.x + (panel.width or 0)) / COLUMNS + 0.01
        top, bottom = HEADER + placed.y * ROW, HEADER + (placed.y + panel.height) * ROW
        assert top < height * (1 - box.y1) < height * (1 - box.y0) < bottom


def test_panels_without_series_or_finite_numbers_say_so() -> None:
    layout = layout_of("overview")
    nothing = answers_for(layout, {"Loss": [({"run": "a"}, [NAN] * 61)]})
    assert texts(draw(layout, nothing)).count("No data") == len(layout.panels)


def test_the_run_is_named_where_there_are_several() -> None:
    layout = layout_of("overview")
    panel = next(placed.panel for placed in layout.panels if placed.panel.title == "Skill")

    def names(*series: tuple[str, str]) -> list[str]:
        samples = [({"run": run, "kind": kind}, RAMP) for run, kind in series]
        return [name for name, _ in named_series(panel, answers_for(layout, {"Skill": samples}))]

    assert names(("a", "far"), ("a", "jump")) == ["far", "jump"]
    assert names(("a", "far"), ("b", "far")) == ["a far", "b far"]


def test_a_series_with_no_label_but_the_run_is_called_like_it() -> None:
    layout = layout_of("overview")
    panel = next(placed.panel for placed in layout.panels if placed.panel.title == "Loss")
    ((name, series),) = named_series(panel, answers_for(layout, {"Loss": [({"run": "a"}, RAMP)]}))
    assert (name, series) == ("a", Series({"run": "a"}, TIMES, RAMP))


def test_numbers_are_shown_with_their_units() -> None:
    layout = layout_of("overview")
    values = {"Speed": 12.34, "Goodput": 0.9, "Time left": 5400.0, "Step": 1234567.0}
    shown = texts(draw(layout, answers_for(layout, {k: [({"run": "a"}, [v] * 61)] for k, v in values.items()})))
    assert {"12.3 clips/s", "90.0%", "1.5 hours", "1,234,567"} <= set(shown)


def test_gaps_are_not_drawn_over_and_lone_points_are_seen() -> None:
    layout = layout_of("overview")
    gappy = [5.0] * 20 + [NAN] * 10 + [7.0] + [NAN] * 30
    axes = draw(layout, answers_for(layout, {"Loss": [({"run": "a"}, gappy)]})).axes[0]
    line, points = axes.lines
    assert np.isnan(np.asarray(line.get_ydata())[20:30]).all()
    assert list(np.asarray(points.get_ydata())) == [7.0]


def test_shares_add_up_to_all() -> None:
    layout = layout_of("reliability")
    figure = draw(layout, answers_for(layout, {"Time by class": [({"run": "a"}, [0.2] * 61)]}))
    layers = [np.asarray(line.get_ydata()) for line in figure.axes[0].lines if len(np.asarray(line.get_ydata())) == 61]
    # Nine classes of the same size, in percent.
    assert [layer[0] for layer in layers] == pytest.approx([100 * n / 9 for n in range(1, 10)])


def test_a_mark_is_drawn_where_something_becomes_news() -> None:
    layout = layout_of("overview")
    answers = answers_for(layout, {"Loss": [({"run": "a"}, RAMP)]})
    # Two checkpoints, each news for three steps.
    times = [*TIMES[10:13], *TIMES[40:43]]
    marked = {marks()["Checkpoint"]: matrix([({"run": "a"}, [1.0] * 6)], times)}
    answers = dataclasses.replace(answers, data={**answers.data, **marked})
    axes = draw(layout, answers).axes[0]
    assert [np.asarray(line.get_xdata())[0] for line in axes.lines[:2]] == [TIMES[10], TIMES[40]]


def test_legends_that_do_not_fit_are_counted() -> None:
    layout = layout_of("overview")
    many = [({"run": "a", "kind": f"a-rather-long-name-{n}"}, RAMP) for n in range(40)]
    shown = texts(draw(layout, answers_for(layout, {"Skill": many})))
    (more,) = [text for text in shown if text.endswith(" more")]
    drawn = sum(text.startswith("a-rather-long-name") for text in shown)
    assert more == f"+{40 - drawn} more"
    assert 0 < drawn < 40


def test_equal_answers_give_equal_bytes() -> None:
    layout = layout_of("nodes")
    first, second = (png(draw(layout, filled(layout))) for _ in range(2))
    assert first == second
    assert first.startswith(b"\x89PNG")


def test_names_of_runs_are_no_formulas() -> None:
    layout, name = layout_of("nodes"), "$x^{$ <b>"
    samples = [({"run": run, "node": "$", "rank": "0"}, RAMP) for run in (name, "b")]
    answers = answers_for(layout, {"Memory bytes": samples})
    figure = draw(layout, dataclasses.replace(answers, span=dataclasses.replace(SPAN, chosen={"run": [name, "b"]})))
    png(figure)
    assert f"{name} $ rank 0" in texts(figure)
