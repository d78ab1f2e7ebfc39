"""The inside of each kind of panel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from hopescale.dashboards.panel import Colour, Kind, Panel
from hopescale.dashboards.prometheus_api import Series
from hopescale.report.canvas import Canvas
from hopescale.report.dashboard_style import DIM, EDGE, GRID, NUMBER_COLOURS, PANEL, SERIES, TEXT
from hopescale.report.units import Scale, scale_of, shown, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NamedSeries = tuple[str, Series]

_SMALL = 7.5
_LINE = 0.17
_LEGEND_LINES = 2
_HIDDEN_LABELS = {"__name__", "instance", "job"}
_TIME_STEPS = (
    1,
    2,
    5,
    10,
    15,
    30,
    60,
    120,
    300,
    600,
    900,
    1800,
    3600,
    7200,
    10800,
    21600,
    43200,
    86400,
    172800,
    604800,
)


@dataclass(frozen=True)
class Place:
    """A part of the canvas, in inches from its top left corner."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Times:
    """The time that is shown.

    Attributes:
        start: Unix seconds.
        end: Unix seconds.
        step: seconds between two points.
        marks: moments and colours of what is marked in every graph.
    """

    start: float
    end: float
    step: float
    marks: Sequence[tuple[float, str]]


def colour_of(index: int) -> str:
    """Of a series, by its number in the panel."""
    return SERIES[index % len(SERIES)]


def _number_colour(panel: Panel, number: float) -> str:
    reached: list[Colour] = [colour for start, colour in panel.colours if start is None or number >= start]
    return NUMBER_COLOURS[reached[-1]] if reached else TEXT


def newest(series: Series) -> float:
    """The last finite number of a series that has one."""
    return next(value for value in reversed(series.values) if math.isfinite(value))


def draw_stat(canvas: Canvas, panel: Panel, place: Place, series: Sequence[NamedSeries], times: Times) -> None:
    """The newest numbers, as large as fits; with their names where there are several."""
    numbers = [(name, newest(one)) for name, one in series[: int(place.height // 0.3) or 1]]
    room = place.height / len(numbers)
    for index, (name, number) in enumerate(numbers):
        text, y = shown(number, panel.unit, panel.decimals), place.y + (index + 0.5) * room - 0.03
        size = min(25.0, 72 * room * 0.5)
        width = place.width if len(numbers) == 1 else place.width * 0.55
        size = min(size, size * width / canvas.text_width(text, size, "bold"))
        x, across = (place.x + place.width / 2, "center") if len(numbers) == 1 else (place.x + place.width, "right")
        canvas.text(x, y, text, size=size, colour=_number_colour(panel, number), weight="bold", across=across)
        if len(numbers) > 1:
            canvas.text(place.x, y, canvas.fitting(name, place.width * 0.42, _SMALL), size=_SMALL, colour=DIM)


def draw_gauges(canvas: Canvas, panel: Panel, place: Place, series: Sequence[NamedSeries], times: Times) -> None:
    """A bar for the newest number of each series."""
    numbers = [newest(one) for _, one in series]
    texts = [shown(number, panel.unit, panel.decimals) for number in numbers]
    names = [canvas.fitting(name, place.width * 0.35, 8.5) for name, _ in series]
    left = max(canvas.text_width(name, 8.5) for name in names) + 0.1
    right = max(canvas.text_width(text, 8.5, "bold") for text in texts) + 0.1
    room, length = min(place.height / len(numbers), 0.36), place.width - left - right
    largest = max([*numbers, panel.high or 0.0]) or 1.0
    for index, (name, number, text) in enumerate(zip(names, numbers, texts, strict=True)):
        y = place.y + (index + 0.5) * room
        canvas.text(place.x + left - 0.1, y, name, size=8.5, colour=TEXT, across="right")
        canvas.box(place.x + left, y - room * 0.33, length, room * 0.66, fill=GRID)
        if number > 0:
            canvas.box(place.x + left, y - room * 0.33, length * number / largest, room * 0.66, fill=colour_of(index))
        canvas.text(place.x + place.width, y, text, size=8.5, colour=colour_of(index), weight="bold", across="right")


def draw_table(canvas: Canvas, panel: Panel, place: Place, series: Sequence[NamedSeries], times: Times) -> None:
    """A row of its labels for each series, as many as fit."""
    columns = sorted({label for _, one in series for label in one.labels} - _HIDDEN_LABELS)
    room, width = 0.25, place.width / max(len(columns), 1)
    rows = [columns, *([one.labels.get(label, "") for label in columns] for _, one in series)]
    for index, row in enumerate(rows[: int(place.height // room)]):
        y = place.y + (index + 0.5) * room
        for column, text in enumerate(row):
            colour, weight = (SERIES[5], "bold") if index == 0 else (TEXT, "normal")
            cut = canvas.fitting(text, width - 0.1, 8.5, weight)
            canvas.text(place.x + column * width, y, cut, size=8.5, colour=colour, weight=weight)
        canvas.line(place.x, y + room / 2, place.width, EDGE, 0.7)


def draw_graph(canvas: Canvas, panel: Panel, place: Place, series: Sequence[NamedSeries], times: Times) -> None:
    """Lines, areas or bars over time, with a legend below."""
    below = _legend(canvas, place, [name for name, _ in series])
    layers = np.array([_on_grid(one, times) for _, one in series])
    if panel.shares:
        layers = _stacked(layers)
    low, high = _limits(panel, layers)
    scale = scale_of(panel.unit, max(abs(low), abs(high)))
    ticks = _ticks(panel, low / scale.divisor, high / scale.divisor)
    labels = _tick_labels(ticks, panel, scale)
    left = max((canvas.text_width(label, _SMALL) for label in labels), default=0.0) + 0.09
    axes = canvas.axes(place.x + left, place.y + 0.03, place.width - left - 0.03, place.height - below - 0.25)
    _style_axes(axes, panel, times, (low / scale.divisor, high / scale.divisor))
    axes.set_yticks(ticks, labels)
    axes.minorticks_off()
    axes.set_xticks(*_time_ticks(times, place.width - left, canvas.text_width("00:00:00", _SMALL)))
    _plot(axes, panel, layers / scale.divisor, times)


def _plot(axes: Axes, panel: Panel, layers: np.ndarray, times: Times) -> None:
    at = _grid(times)
    for moment, colour in times.marks:
        axes.axvline(moment, color=colour, linewidth=0.8, linestyle=(0, (3, 3)), alpha=0.55, zorder=1)
    for index, values in enumerate(layers):
        colour = colour_of(index)
        if panel.kind == "bars":
            axes.bar(at, np.nan_to_num(values), width=0.8 * times.step, color=colour, alpha=0.75, zorder=2)
            continue
        axes.plot(at, values, color=colour, linewidth=1.1, zorder=3)
        if panel.shares:
            below = layers[index - 1] if index else np.zeros_like(values)
            axes.fill_between(at, below, values, color=colour, alpha=0.55, linewidth=0, zorder=2)
        elif len(layers) == 1 and not panel.logarithmic:
            axes.fill_between(at, axes.get_ylim()[0], values, color=colour, alpha=0.08, linewidth=0, zorder=2)
        alone = np.isfinite(values) & ~np.isfinite(_shifted(values, 1)) & ~np.isfinite(_shifted(values, -1))
        axes.plot(at[alone], values[alone], linestyle="", marker="o", markersize=2.5, color=colour, zorder=3)


def _shifted(values: np.ndarray, by: int) -> np.ndarray:
    shifted = np.full_like(values, np.nan)
    if by > 0:
        shifted[by:] = values[:-by]
    else:
        shifted[:by] = values[-by:]
    return shifted


def _grid(times: Times) -> np.ndarray:
    return times.start + times.step * np.arange(round((times.end - times.start) / times.step) + 1)


def _on_grid(series: Series, times: Times) -> np.ndarray:
    """Numbers at every point of time, not a number where there is none: a gap is not drawn over."""
    values = np.full(len(_grid(times)), np.nan)
    index = np.rint((np.array(series.times) - times.start) / times.step).astype(int)
    inside = (index >= 0) & (index < len(values))
    values[index[inside]] = np.array(series.values)[inside]
    values[~np.isfinite(values)] = np.nan
    return values


def _stacked(layers: np.ndarray) -> np.ndarray:
    """Upper edges of the areas, as shares of their sum; nothing where there is nothing to share."""
    numbers = np.nan_to_num(layers)
    total = numbers.sum(axis=0)
    return numbers.cumsum(axis=0) / np.where(total > 0, total, np.nan)


def _limits(panel: Panel, layers: np.ndarray) -> tuple[float, float]:
    """Ends of the axis: those of the panel, or a little more than what the numbers need."""
    if panel.logarithmic:
        positive = layers[layers > 0]
        if positive.size:
            return float(positive.min()) / 1.3, float(positive.max()) * 1.3
        return 0.1, 10.0
    lowest, highest = float(np.nanmin(layers)), float(np.nanmax(layers))
    margin = 0.08 * (highest - lowest) or 0.1 * abs(highest) or 0.5
    low = lowest - margin if panel.low is None else panel.low
    # Nothing in the figures is negative where none is: an axis that went below 0 would suggest so.
    low = max(low, 0.0) if lowest >= 0 else low
    high = highest + margin if panel.high is None else max(panel.high, highest)
    # Counts have whole numbers on their axis, and two of them.
    least = 1.0 if panel.unit == "locale" else 0.0
    return low, max(high, low + least) if max(high, low + least) > low else low + 1.0


def _ticks(panel: Panel, low: float, high: float) -> list[float]:
    from matplotlib.ticker import LogLocator, MaxNLocator

    if panel.logarithmic and high / low > 10:
        found = LogLocator(numticks=6).tick_values(low, high)
    else:
        whole = panel.unit == "locale"
        found = MaxNLocator(5, steps=[1, 2, 5, 10] if whole else [1, 2, 2.5, 5, 10], integer=whole).tick_values(
            low, high
        )
    return [float(tick) for tick in found if low <= tick <= high * (1 + 1e-9)]


def _tick_labels(ticks: Sequence[float], panel: Panel, scale: Scale) -> list[str]:
    if panel.logarithmic:
        return [f"{tick:.3g}{scale.suffix}" for tick in ticks]
    top = max(map(abs, ticks), default=0.0)
    apart = min((second - first for first, second in pairwise(ticks)), default=1.0)
    decimals = max(0, -math.floor(math.log10(apart) + 1e-9))
    # 2.5 apart needs one more than 2 or 5 apart.
    decimals += round(apart * 10**decimals, 6) != round(apart * 10**decimals)
    if 0 < top < 1e-3:
        digits = max(0, decimals + math.floor(math.log10(top)))
        return [(f"{tick:.{digits}e}" if tick else "0") + scale.suffix for tick in ticks]
    return [written(tick, decimals, panel.unit) + scale.suffix for tick in ticks]


def _time_ticks(times: Times, width: float, label: float) -> tuple[list[float], list[str]]:
    """Moments and their labels, of a width, all of them inside."""
    most = max(2, int(width / (1.5 * label)))
    step = next((step for step in _TIME_STEPS if (times.end - times.start) / step <= most), _TIME_STEPS[-1])
    first = math.ceil(times.start / step) * step
    last = times.end - (times.end - times.start) * label / 2 / width
    ticks = [float(tick) for tick in np.arange(first, last, step)]
    form = "%H:%M:%S" if step < 60 else "%H:%M" if step < 86400 else "%m-%d"
    return ticks, [datetime.fromtimestamp(tick, UTC).strftime(form) for tick in ticks]


def _style_axes(axes: Axes, panel: Panel, times: Times, limits: tuple[float, float]) -> None:
    axes.set_facecolor(PANEL)
    axes.set_yscale("log" if panel.logarithmic else "linear")
    axes.set_xlim(times.start, times.end)
    axes.set_ylim(*limits)
    axes.grid(True, axis="both", color=GRID, linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, labelsize=_SMALL, labelcolor=DIM, pad=3)


def _legend(canvas: Canvas, place: Place, names: Sequence[str]) -> float:
    """Names with the colours of their lines, at the bottom of a place; its height."""
    lines: list[list[tuple[int, str, float]]] = [[]]
    used = 0.0
    for index, name in enumerate(names):
        name = canvas.fitting(name, place.width - 0.25, _SMALL)
        width = canvas.text_width(name, _SMALL) + 0.36
        if lines[-1] and used + width > place.width:
            lines.append([])
            used = 0.0
        lines[-1].append((index, name, width))
        used += width
    left_out = sum(map(len, lines[_LEGEND_LINES:]))
    lines = lines[:_LEGEND_LINES]
    for number, line in enumerate(lines):
        x, y = place.x, place.y + place.height - (len(lines) - number - 0.5) * _LINE
        for index, name, width in line:
            canvas.line(x, y, 0.14, colour_of(index), 2.2)
            canvas.text(x + 0.2, y, name, size=_SMALL, colour=TEXT)
            x += width
        if left_out and number == len(lines) - 1:
            canvas.text(place.x + place.width, y, f"+{left_out} more", size=_SMALL, colour=DIM, across="right")
    return len(lines) * _LINE


DRAWN_BY: Mapping[Kind, Callable[[Canvas, Panel, Place, Sequence[NamedSeries], Times], None]] = MappingProxyType(
    {"stat": draw_stat, "lines": draw_graph, "bars": draw_graph, "gauges": draw_gauges, "table": draw_table}
)
