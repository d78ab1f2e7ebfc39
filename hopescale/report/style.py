"""One visual language for every figure: palette, type sizes, axes and direct labels."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.errors import missing_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure, SubFigure

INK = "#0f172a"
MUTED = "#64748b"
RULE = "#cbd5e1"
GRID = "#e9eef5"
BLUE = "#2563eb"
ORANGE = "#d9660b"
PURPLE = "#9333ea"
TEAL = "#0d8a7d"
SLATE = "#334155"
STONE = "#7d8aa0"

# (colour, dash pattern, width): the model is the only heavy line; baselines recede, ablations are dashed.
MODEL = (BLUE, "-", 2.6)
COPY_LAST = (SLATE, "-", 1.7)
MEAN_FRAME = (STONE, "-", 1.7)
WRITES_OFF = (ORANGE, (0, (4, 2)), 1.7)
SHUFFLED = (PURPLE, (0, (1.5, 1.5)), 1.7)

# Light to dark, so that an error of nothing looks like nothing on white paper and over faded pixels.
ERROR_RAMP = ("#f1f5f9", "#fdc9c3", "#f4506a", "#a3113f", "#3d0a24")

DPI = 160

_SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    # Partition names are the user's text: a dollar sign in one is not a formula.
    "text.parse_math": False,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.5,
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.9,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.titlepad": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 1.0,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "ytick.major.size": 0.0,
    "ytick.minor.size": 0.0,
    "figure.facecolor": "white",
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}


def styled() -> AbstractContextManager[None]:
    """Return a context manager that applies the house style while a figure is built.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib

    return matplotlib.rc_context(_SETTINGS)


def require_matplotlib() -> None:
    """Refuse to go on without matplotlib.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise missing_extra("matplotlib", "demo", "hopescale report") from error


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of `width` x `height` inches, drawn by Agg whatever the user's backend is."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def error_map() -> LinearSegmentedColormap:
    """Return the one colour map every error picture uses."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("error", ERROR_RAMP)


def headline(figure: Figure | SubFigure, title: str, subtitle: str, x: float, top: float, height: float) -> None:
    """Write a bold title and a muted line under it; `top` is the title's top edge in inches below the figure's."""
    figure.text(x, 1 - top / height, title, fontsize=13.5, fontweight="bold", color=INK, va="top")
    figure.text(x, 1 - (top + 0.29) / height, subtitle, fontsize=9.5, color=MUTED, va="top")


def shown(name: str, limit: int = 26) -> str:
    """Return `name` on one printable line of at most `limit` characters."""
    printable = "".join(character if character.isprintable() else " " for character in name)
    return printable if len(printable) <= limit else printable[: limit - 1] + "…"


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move label positions apart until neighbours are `gap` apart, each as near its own value as order allows.

    Args:
        positions: wanted positions, in any order; low <= position <= high.
        gap: smallest distance between two labels; shrunk when they cannot all fit.
        low: lower edge.
        high: upper edge.

    Returns:
        One position per input, same order.
    """
    if len(positions) < 2:
        return [float(min(max(value, low), high)) for value in positions]
    gap = min(gap, (high - low) / (len(positions) - 1))
    order = np.argsort(np.asarray(positions, dtype=float), kind="stable")
    # Subtracting i*gap turns "at least gap apart" into "not decreasing": isotonic regression by pooling neighbours.
    pools: list[list[float]] = []
    for rank, index in enumerate(order):
        pools.append([float(positions[index]) - rank * gap, 1.0])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, weight = pools.pop()
            total = pools[-1][1] + weight
            pools[-1] = [(pools[-1][0] * pools[-1][1] + mean * weight) / total, total]
    flat = [mean for mean, weight in pools for _ in range(int(weight))]
    result = [0.0] * len(positions)
    for rank, index in enumerate(order):
        result[index] = min(max(flat[rank], low), high - (len(positions) - 1) * gap) + rank * gap
    return result


def label_ends(
    axes: Axes,
    ends: Sequence[tuple[float, float, str, str]],
    size: float = 9.0,
    gap: float = 0.062,
    bold: str = "model",
) -> None:
    """Name each line at its right end, in its own colour, instead of in a legend.

    Args:
        axes: axes whose limits are final.
        ends: (x, y, text, colour) per line, in data units.
        size: font size in points.
        gap: smallest distance between two labels, in axes heights.
        bold: labels that begin with this text are bold.
    """
    drawable = [end for end in ends if np.isfinite(end[1])]
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_axes.transform((x, y))[1]) for x, y, _, _ in drawable]
    placed = spread([min(max(value, 0.0), 1.0) for value in wanted], gap, 0.0, 1.0)
    for (x, y, text, colour), height in zip(drawable, placed, strict=True):
        axes.annotate(
            text,
            xy=(x, y),
            xycoords="data",
            xytext=(1.02, height),
            textcoords="axes fraction",
            color=colour,
            fontsize=size,
            fontweight="bold" if text.startswith(bold) else "normal",
            va="center",
            annotation_clip=False,
        )
