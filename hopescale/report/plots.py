"""Curves of a run: losses, skill, error per horizon and step, memory surprise, CMS activity. Each returns a Figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hopescale.report import style
from hopescale.report.evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOSSES = (
    ("loss", "total", style.INK),
    ("loss_teacher", "teacher forcing", style.BLUE),
    ("loss_jump", "jump", style.ORANGE),
    ("loss_rollout", "rollout", style.TEAL),
    ("loss_auxiliary", "keys and values", style.PURPLE),
)
_SKILLS = (
    ("skill_one_step", "one step", style.BLUE),
    ("skill_far", "far rollout", style.TEAL),
    ("skill_jump", "jump", style.ORANGE),
    ("skill_context", "from 4 frames", style.PURPLE),
)
_HORIZON_LINES = (
    ("mean_frame_error", "mean frame", style.MEAN_FRAME),
    ("copy_last_error", "copy last", style.COPY_LAST),
    ("shuffled_rollout_error", "shuffled actions", style.SHUFFLED),
    ("writes_off_rollout_error", "writes off", style.WRITES_OFF),
    ("rollout_error", "model", style.MODEL),
)


def series(records: Sequence[Mapping[str, Any]], kind: str, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and finite values of `field` in the metrics records of one kind, both [n]."""
    pairs = [
        (record["step"], float(record[field]))
        for record in records
        if record.get("kind") == kind and isinstance(record.get(field), int | float)
    ]
    kept = [pair for pair in pairs if math.isfinite(pair[1])]
    return np.array([step for step, _ in kept], dtype=float), np.array([value for _, value in kept], dtype=float)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return a centred moving average, [n] -> [n], over about a fiftieth of the curve; windows shrink at the ends."""
    half = len(values) // 100
    totals = np.concatenate([[0.0], np.cumsum(values)])
    positions = np.arange(len(values))
    reach = np.minimum(half, np.minimum(positions, len(values) - 1 - positions))
    return (totals[positions + reach + 1] - totals[positions - reach]) / (2 * reach + 1)


def loss_curves(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw training losses (log scale) and, beside them, the skill of each evaluation.

    Args:
        records: lines of metrics.jsonl.
    """
    with style.styled():
        figure = style.new_figure(11, 4.2)
        left, right = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.06, right=0.905, top=0.86, bottom=0.14, wspace=0.44)
        _draw_losses(left, records)
        _draw_skills(right, records)
        return figure


def _draw_losses(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title("Training loss")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("mean L1, log scale")
    ends, everything = [], []
    for field, text, colour in _LOSSES:
        steps, values = series(records, "train", field)
        steps, values = steps[values > 0], values[values > 0]
        if not len(steps):
            continue
        average = smoothed(values)
        axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.9)
        axes.plot(steps, average, color=colour, linewidth=2.0, marker="o" if len(steps) == 1 else None)
        ends.append((steps[-1], average[-1], text, colour))
        everything.append(values)
    if not ends:
        return _say(axes, "no training records in metrics.jsonl")
    low, high = (float(bound) for bound in np.percentile(np.concatenate(everything), (0, 100)))
    axes.set_yscale("log")
    # A log axis over less than a decade has at most one labelled tick of its own.
    axes.set_ylim(low * 0.93, high * 1.07)
    _label_log_axis(axes)
    axes.set_xlim(0, max(float(end[0]) for end in ends))
    style.label_ends(axes, ends)


def _label_log_axis(axes: Axes) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    low, high = axes.get_ylim()
    decades = 10.0 ** np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(np.arange(1, 10, 0.5))):
        ticks = np.sort(np.outer(decades, mantissas).ravel())
        ticks = ticks[(ticks >= low) & (ticks <= high)]
        if len(ticks) >= 3:
            break
    axes.yaxis.set_major_locator(FixedLocator(ticks.tolist()))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_skills(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title("Held-out skill (0 = copy last, 1 = perfect)")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("skill")
    ends, lowest = [], 0.0
    for field, text, colour in _SKILLS:
        steps, values = series(records, "eval", field)
        if not len(steps):
            continue
        axes.plot(steps, values, color=colour, linewidth=2.0, marker="o", markersize=4)
        ends.append((steps[-1], values[-1], text, colour))
        lowest = min(lowest, float(values.min()))
    if not ends:
        return _say(axes, "no evaluation ran during training")
    axes.axhline(0, color=style.SLATE, linewidth=1.2)
    highest = max(float(line.get_ydata().max()) for line in axes.get_lines()[:-1])  # pyright: ignore
    # An untrained model can be many times worse than copy-last; below -1 the curve leaves the panel.
    lowest = max(lowest, -1.0)
    margin = 0.08 * max(highest - lowest, 0.1)
    axes.set_ylim(lowest - margin, max(highest, 0.1) + margin)
    axes.set_xlim(0, max(float(end[0]) for end in ends) * 1.02)
    style.label_ends(axes, [*ends, (ends[-1][0], 0.0, "copy last", style.SLATE)])


def _say(axes: Axes, text: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=style.MUTED)


def horizon_errors(evaluation: Evaluation) -> Figure:
    """Draw rollout error per horizon, mean over partitions, with every baseline; then one small panel a partition."""
    with style.styled():
        count = len(evaluation.partitions)
        columns = min(3, count)
        rows = math.ceil(count / columns)
        height = max(4.6, 1.2 + 1.75 * rows)
        figure, tall = style.new_figure(11, height), min(height - 1.12, 4.6)
        main = figure.add_axes((0.06, 1 - (0.5 + tall) / height, 0.335, tall / height))
        main.set_title("Rollout error, mean over partitions")
        main.set_ylabel("mean L1 of LayerNormed features")
        main.set_xlabel("horizon (frames after the first)")
        ends = [
            _draw_line(main, evaluation.horizons, getattr(evaluation, field).mean(axis=0), look, text)
            for field, text, look in _HORIZON_LINES
        ]
        main.set_ylim(0, None)
        _frame_ticks(main, evaluation.horizons)
        style.label_ends(main, ends, gap=0.055)
        grid = figure.add_gridspec(
            rows, columns, left=0.565, right=0.99, bottom=0.62 / height, top=1 - 0.5 / height, hspace=0.3, wspace=0.16
        )
        top = max(float(np.nanmax(getattr(evaluation, field))) for field, _, _ in _HORIZON_LINES) * 1.04
        for index, name in enumerate(evaluation.partitions):
            axes = figure.add_subplot(grid[index // columns, index % columns])
            axes.set_title(style.shown(name, 20), fontsize=9, pad=4)
            for field, text, (colour, dashes, width) in _HORIZON_LINES:
                look = (colour, dashes, width * 0.7)
                _draw_line(axes, evaluation.horizons, getattr(evaluation, field)[index], look, text, markers=False)
            axes.set_ylim(0, top if np.isfinite(top) else None)
            _frame_ticks(axes, evaluation.horizons, sparse=True)
            if index % columns:
                axes.tick_params(labelleft=False)
            if index + columns < count:
                axes.tick_params(labelbottom=False)
        return figure


def draw_horizon_summary(axes: Axes, evaluation: Evaluation) -> None:
    """Draw the model against copy-last over horizons, the gap between them shaded and named as skill."""
    model = evaluation.rollout_error.mean(axis=0)
    baseline = evaluation.copy_last_error.mean(axis=0)
    ends = [
        _draw_line(axes, evaluation.horizons, baseline, style.COPY_LAST, "copy last"),
        _draw_line(axes, evaluation.horizons, model, style.MODEL, "model"),
    ]
    axes.fill_between(evaluation.horizons, model, baseline, color=style.BLUE, alpha=0.07, linewidth=0)
    axes.set_ylim(0, None)
    _frame_ticks(axes, evaluation.horizons)
    style.label_ends(axes, ends, size=10)


def one_step_errors(evaluation: Evaluation) -> Figure:
    """Draw the error of predicting each next frame from all true frames before it, beside copy-last."""
    with style.styled():
        figure = style.new_figure(11, 3.7)
        axes = figure.subplots()
        figure.subplots_adjust(left=0.06, right=0.86, top=0.86, bottom=0.16)
        steps = np.arange(1, evaluation.one_step_error.shape[1] + 1)
        axes.set_title("One-step error")
        axes.set_ylabel("mean L1")
        axes.set_xlabel("true frames the model has seen")
        for row in evaluation.one_step_error:
            axes.plot(steps, row, color=style.BLUE, linewidth=0.9, alpha=0.25)
        ends = [
            _draw_line(axes, steps, evaluation.one_step_copy_last.mean(axis=0), style.COPY_LAST, "copy last"),
            _draw_line(axes, steps, evaluation.one_step_error.mean(axis=0), style.MODEL, "model, mean"),
        ]
        highest = float(np.nan_to_num(evaluation.one_step_error[:, -1]).max())
        ends.append((float(steps[-1]), highest, "each partition", "#6d97f2"))
        axes.set_ylim(0, None)
        _frame_ticks(axes, steps)
        style.label_ends(axes, ends, gap=0.08)
        return figure


def _draw_line(
    axes: Axes, x: np.ndarray, y: np.ndarray, look: tuple[str, Any, float], text: str, markers: bool = True
) -> tuple[float, float, str, str]:
    colour, dashes, width = look
    marked = markers and colour == style.BLUE
    axes.plot(x, y, color=colour, linestyle=dashes, linewidth=width, marker="o" if marked else None, markersize=4.5)
    return float(x[-1]), float(y[-1]), text, colour


def _frame_ticks(axes: Axes, frames: np.ndarray, sparse: bool = False) -> None:
    """Put ticks on whole frames, at most about eight of them, or only three in a small panel."""
    if sparse:
        ticks = [frames[0], frames[len(frames) // 2], frames[-1]]
    else:
        ticks = frames[:: math.ceil(len(frames) / 8)]
    axes.set_xticks(sorted({int(tick) for tick in ticks}))
    margin = 0.04 * max(float(frames[-1] - frames[0]), 1.0)
    axes.set_xlim(float(frames[0]) - margin, float(frames[-1]) + margin)


def surprise_over_frames(evaluation: Evaluation) -> Figure:
    """Draw the mean surprise of each memory block at every frame it is written.

    Raises:
        ValueError: the model has no memory blocks (`surprise` is empty).
    """
    if not evaluation.surprise.size:
        raise ValueError("evaluation.surprise is empty: this model has no memory blocks")
    with style.styled():
        from matplotlib import colormaps
        from matplotlib.colors import to_hex

        figure = style.new_figure(11, 3.7)
        axes = figure.subplots()
        figure.subplots_adjust(left=0.06, right=0.86, top=0.86, bottom=0.16)
        axes.set_title("Surprise of the memories")
        axes.set_ylabel("mean surprise")
        axes.set_xlabel("transition")
        count = len(evaluation.surprise)
        shades = [colormaps["viridis"](0.68 * position) for position in np.linspace(1, 0, count)]

        steps = np.arange(1, evaluation.surprise.shape[1] + 1)
        named = np.unique(np.linspace(0, count - 1, min(count, 8)).astype(int))
        ends = []
        for index, (block, row) in enumerate(zip(evaluation.surprise_blocks, evaluation.surprise, strict=True)):
            axes.plot(steps, row, color=shades[index], linewidth=2.0, marker="o", markersize=3.5)
            if index in named:
                ends.append((float(steps[-1]), float(row[-1]), f"block {int(block)}", to_hex(shades[index])))
        axes.set_ylim(0, None)
        _frame_ticks(axes, steps)
        style.label_ends(axes, ends, gap=0.08)
        return figure


def cms_activity(evaluation: Evaluation) -> Figure:
    """Draw which CMS level is active at which frame; blocks with the same pattern share one raster.

    Raises:
        ValueError: the model has no CMS (`cms_active` is empty).
    """
    if not evaluation.cms_active.size:
        raise ValueError("evaluation.cms_active is empty: this model has no CMS blocks")
    patterns = _same_pattern(evaluation)
    levels, frames = evaluation.cms_active.shape[1:]
    with style.styled():
        from matplotlib.patches import FancyBboxPatch

        columns = min(2, len(patterns))
        rows = math.ceil(len(patterns) / columns)
        height = 0.35 + rows * (0.42 * levels + 0.95)
        figure = style.new_figure(11, height)
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        figure.subplots_adjust(
            left=0.95 / figure.get_figwidth(),
            right=0.985,
            top=1 - 0.42 / height,
            bottom=0.58 / height,
            hspace=0.95 / (0.42 * levels),
            wspace=0.3,
        )
        for axes, (names, active) in zip(panels, patterns, strict=False):
            axes.set_title(names, pad=6)
            for level in range(levels):
                for frame in range(frames):
                    axes.add_patch(
                        FancyBboxPatch(
                            (frame + 0.58, level - 0.36),
                            0.84,
                            0.72,
                            boxstyle="round,pad=0,rounding_size=0.1",
                            linewidth=0,
                            facecolor=style.BLUE if active[level, frame] else style.GRID,
                        )
                    )
            axes.set_xlim(0.5, frames + 0.5)
            axes.set_ylim(levels - 0.5, -0.5)
            axes.set_yticks(range(levels), [f"period {int(period)}" for period in evaluation.cms_periods])
            axes.set_xticks(range(1, frames + 1, math.ceil(frames / 16)))
            axes.set_xlabel("transition")
            axes.grid(False)
            axes.spines[["left", "bottom"]].set_visible(False)
            axes.tick_params(length=0)
        for axes in panels[len(patterns) :]:
            axes.set_visible(False)
        return figure


def _same_pattern(evaluation: Evaluation) -> list[tuple[str, np.ndarray]]:
    """Group blocks by raster: [(title, [levels, F - 1] bool)], in order of first appearance."""
    active = evaluation.cms_active.astype(bool)
    numbers = evaluation.surprise_blocks if len(evaluation.surprise_blocks) == len(active) else np.arange(len(active))
    groups: dict[bytes, list[int]] = {}
    for index, raster in enumerate(active):
        groups.setdefault(raster.tobytes(), []).append(index)
    titled = []
    for members in groups.values():
        names = ", ".join(str(int(numbers[index])) for index in members)
        titled.append((style.shown(f"CMS block{'s' if len(members) > 1 else ''} {names}", 48), active[members[0]]))
    return titled
