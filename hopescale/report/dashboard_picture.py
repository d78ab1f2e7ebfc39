"""Draws a dashboard from the answers to its queries: panels in their places, after Grafana's dark theme."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from hopescale.dashboards.answers import Answers, marks
from hopescale.dashboards.boards import MARKS
from hopescale.dashboards.compose import Heading, Layout, PlacedPanel
from hopescale.dashboards.panel import COLUMNS, Panel
from hopescale.dashboards.prometheus_api import Series
from hopescale.report import style
from hopescale.report.canvas import Canvas
from hopescale.report.dashboard_panels import DRAWN_BY, NamedSeries, Place, Times
from hopescale.report.dashboard_style import BACKGROUND, DIM, EDGE, MARK_COLOURS, PANEL, TEXT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 15.0
MARGIN, GAP = 0.16, 0.075
HEADER = 0.72
ROW = 0.355
"""Inches; a row of the grid is as high as in Grafana when the dashboard is 1600 pixels wide."""
_LABEL = re.compile(r"{{(\w+)}}")


def draw(layout: Layout, answers: Answers) -> Figure:
    """The picture of a dashboard; equal answers give an equal one.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    rows = max(item.y + (1 if isinstance(item, Heading) else item.panel.height) for item in layout.items)
    with style.styled():
        canvas = Canvas(WIDTH, HEADER + rows * ROW + MARGIN, BACKGROUND)
        times = Times(answers.span.start, answers.span.end, answers.span.step, _moments(answers))
        _header(canvas, layout, answers)
        for item in layout.items:
            top = HEADER + item.y * ROW
            if isinstance(item, Heading):
                canvas.text(MARGIN, top + ROW / 2, item.title, size=11, colour=TEXT, weight="bold")
            else:
                _panel(canvas, item, top, answers, times)
        return canvas.figure


def _header(canvas: Canvas, layout: Layout, answers: Answers) -> None:
    canvas.text(MARGIN, 0.24, f"hopescale: {layout.board.dashboard}", size=15, colour=TEXT, weight="bold")
    start, end = (datetime.fromtimestamp(at, UTC) for at in (answers.span.start, answers.span.end))
    until = f"{end:%H:%M:%S}" if start.date() == end.date() else f"{end:%Y-%m-%d %H:%M:%S}"
    runs = ", ".join(answers.span.chosen.get("run", ())) or "all runs"
    canvas.text(
        MARGIN, 0.52, style.shown(f"{runs}   {start:%Y-%m-%d %H:%M:%S} to {until} UTC", 120), size=9.5, colour=DIM
    )
    x = WIDTH - MARGIN
    for mark in reversed(MARKS):
        canvas.text(x, 0.52, mark.name, size=9, colour=DIM, across="right")
        x -= canvas.text_width(mark.name, 9) + 0.1
        canvas.box(x - 0.03, 0.43, 0.03, 0.18, fill=MARK_COLOURS[mark.colour])
        x -= 0.25


def _panel(canvas: Canvas, placed: PlacedPanel, top: float, answers: Answers, times: Times) -> None:
    panel, column = placed.panel, (WIDTH - 2 * MARGIN + GAP) / COLUMNS
    x, width, height = MARGIN + placed.x * column, (panel.width or COLUMNS) * column - GAP, panel.height * ROW - GAP
    canvas.box(x, top, width, height, fill=PANEL, edge=EDGE, radius=0.025)
    title = canvas.fitting(panel.title, width - 0.2, 9.5, "bold")
    canvas.text(x + 0.1, top + 0.17, title, size=9.5, colour=TEXT, weight="bold")
    inside = Place(x + 0.1, top + 0.34, width - 0.2, height - 0.42)
    series = named_series(panel, answers)
    if series:
        DRAWN_BY[panel.kind](canvas, panel, inside, series, times)
    else:
        middle = (inside.x + inside.width / 2, inside.y + inside.height / 2 - 0.1)
        canvas.text(*middle, "No data", size=10, colour=DIM, across="center")


def named_series(panel: Panel, answers: Answers) -> list[NamedSeries]:
    """A panel's series with a finite number, by their legends; the run goes without saying where there is one."""
    found = [(query.legend, one) for query in panel.queries for one in answers.series(query.promql) if _finite(one)]
    if len({one.labels.get("run") for _, one in found}) == 1:
        found = [(legend.removeprefix("{{run}}") or legend, one) for legend, one in found]
    return [(_legend(legend, one), one) for legend, one in found]


def _legend(legend: str, series: Series) -> str:
    filled = _LABEL.sub(lambda label: series.labels.get(label.group(1), ""), legend)
    return style.shown(" ".join(filled.split()), 60)


def _finite(series: Series) -> bool:
    return any(abs(value) < float("inf") for value in series.values)


def _moments(answers: Answers) -> list[tuple[float, str]]:
    """When something that is marked became news, and the colour of its mark."""
    queries, moments = marks(), []
    for mark in MARKS:
        times = sorted({time for series in answers.series(queries[mark.name]) for time in series.times})
        news = [
            at
            for before, at in zip([float("-inf"), *times], times, strict=False)
            if at - before > 1.5 * answers.span.step
        ]
        moments += [(time, MARK_COLOURS[mark.colour]) for time in news]
    return moments
