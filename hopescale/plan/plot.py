"""A sweep as a picture: memory of a rank and clips a second over the number of ranks, one line a recompute mode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hopescale.report import style

from .memory import RESERVE

COLOURS = {"none": style.BLUE, "chunk": style.TEAL, "block": style.ORANGE}


def plot_sweep(rows: Sequence[dict[str, Any]], name: str, memory_bytes: float, path: Path) -> None:
    """Draw a sweep and write it.

    Args:
        rows: of `sweep_rows`.
        name: what was planned.
        memory_bytes: of a device, drawn as a line.
        path: of a PNG.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    with style.styled():
        figure = style.new_figure(11, 4.4)
        style.headline(figure, name, "predicted; hollow where it does not fit into memory", 0.06, 0.12, 4.4)
        memory, rate = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.06, right=0.925, top=0.76, bottom=0.14, wspace=0.36)
        for axes, field, scale, label in (
            (memory, "memory", 2**30, "GiB on the rank that needs most"),
            (rate, "clips_per_second", 1.0, "clips/s of all ranks"),
        ):
            ends = []
            for mode, colour in COLOURS.items():
                points = [row for row in rows if row["recompute"] == mode and "cannot" not in row]
                if not points:
                    continue
                across, up = [row["ranks"] for row in points], [row[field] / scale for row in points]
                axes.plot(across, up, color=colour, linewidth=2.0)
                for x, y, row in zip(across, up, points, strict=True):
                    axes.plot([x], [y], "o", color=colour, markerfacecolor=colour if row["fits"] else "white")
                ends.append((float(across[-1]), float(up[-1]), mode, colour))
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xlabel("ranks")
            axes.set_title(label)
            style.label_ends(axes, ends)
        memory.axhline((1 - RESERVE) * memory_bytes / 2**30, color=style.MUTED, linestyle="--", linewidth=1.2)
        figure.savefig(path)
