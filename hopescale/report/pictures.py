"""Pictures of sample clips: PCA colours of feature maps, pixels under an error overlay, and the README's hero image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hopescale.report import features, plots, style
from hopescale.report.evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def pca_rgb(evaluation: Evaluation, clip: int) -> Figure:
    """Draw truth, rollout and error of one sample clip, a column per frame.

    Colours are the first three principal components of the *true* features of all sample clips; the error scale is
    also shared by all sample clips, so figures compare with each other.

    Args:
        evaluation: evaluation arrays.
        clip: index of the sample clip, 0 <= clip < K.
    """
    projection = features.fit_projection(evaluation.sample_truth)
    maps = features.error_maps(evaluation.sample_truth, evaluation.sample_prediction, evaluation.grid)
    ceiling = features.error_ceiling(maps)
    rows = [
        ("truth", features.colours(evaluation.sample_truth[clip], projection, evaluation.grid)),
        ("rollout", features.colours(evaluation.sample_prediction[clip], projection, evaluation.grid)),
        ("error", maps[clip]),
    ]
    with style.styled():
        figure, panels = _frame_grid(len(rows), evaluation.sample_truth.shape[1], _title(evaluation, clip), bar=True)
        for (name, images), axes_row in zip(rows, panels, strict=True):
            _name_row(axes_row[0], name)
            for axes, image in zip(axes_row, images, strict=True):
                axes.imshow(image, cmap=style.error_map(), vmin=0, vmax=ceiling, interpolation="nearest")
        _colour_bar(figure, panels[-1][-1], ceiling)
        return figure


def filmstrip(evaluation: Evaluation, clips: int = 3) -> Figure:
    """Draw the pixels of a few sample clips and, under each, the rollout's error laid over the pixels.

    Raises:
        ValueError: the evaluation holds no pixels (`sample_frames` is None).
    """
    if evaluation.sample_frames is None:
        raise ValueError("evaluation.sample_frames is absent: the pixels folder was not known to `hopescale eval`")
    maps = features.error_maps(evaluation.sample_truth, evaluation.sample_prediction, evaluation.grid)
    ceiling = features.error_ceiling(maps)
    chosen = varied_clips(evaluation, clips)
    with style.styled():
        figure, panels = _frame_grid(2 * len(chosen), evaluation.sample_truth.shape[1], "", bar=True, pairs=True)
        for position, clip in enumerate(chosen):
            above, below = panels[2 * position], panels[2 * position + 1]
            _name_row(above[0], style.shown(evaluation.sample_partitions[clip], 14))
            _name_row(below[0], "error")
            for frame, pixels in enumerate(evaluation.sample_frames[clip]):
                above[frame].imshow(pixels, interpolation="antialiased")
                _overlay(below[frame], pixels, maps[clip, frame], ceiling)
        _colour_bar(figure, panels[-1][-1], ceiling)
        return figure


def overview(evaluation: Evaluation, clip: int | None = None) -> Figure:
    """Draw the hero picture (1600 x 700 pixels): a clip as pixels, truth and rollout; the error against copy-last.

    Args:
        evaluation: evaluation arrays.
        clip: index of the sample clip; by default the one predicted about as well as clips are on average.
    """
    clip = typical_clip(evaluation) if clip is None else clip
    projection = features.fit_projection(evaluation.sample_truth)
    truth = features.colours(evaluation.sample_truth[clip], projection, evaluation.grid)
    predicted = features.colours(evaluation.sample_prediction[clip], projection, evaluation.grid)
    rows = [("true\nfeatures", "nearest", truth), ("predicted", "nearest", predicted)]
    if evaluation.sample_frames is not None:
        rows.insert(0, ("video", "antialiased", evaluation.sample_frames[clip]))
    width, height = 10.0, 4.375
    with style.styled():
        figure = style.new_figure(width, height)
        horizon = int(evaluation.horizons[-1])
        name = style.shown(evaluation.sample_partitions[clip], 24)
        side = _draw_hero_strip(figure, rows)
        style.headline(
            figure, f"{len(truth) - 1} frames predicted from one", f"Held-out clip, {name}", side, 0.26, height
        )
        curve = figure.add_axes((0.735, 0.6 / height, 0.165, 1 - 1.63 / height))
        skill = mean_skill(evaluation)
        amount = f"{abs(skill):.0%} {'less' if skill >= 0 else 'more'} error"
        style.headline(figure, amount, f"than copying the frame, {horizon} ahead", 0.684, 0.26, height)
        plots.draw_horizon_summary(curve, evaluation)
        curve.set_xlabel("frames ahead")
        curve.set_ylabel("feature error (mean L1)")
        return figure


def _draw_hero_strip(figure: Figure, rows: list[tuple[str, str, np.ndarray]]) -> float:
    """Draw (label, interpolation, [F, ...] images) rows of square panels; return the left edge in figure widths."""
    width, height = figure.get_size_inches()
    frames = len(rows[0][2])
    shown = [0, *np.unique(np.linspace(1, frames - 1, min(4, frames - 1)).round().astype(int))]
    left, top, bottom, gap = 1.02, 1.08, 0.2, 0.07
    side = min((height - top - bottom + gap) / len(rows), (0.655 * width - left) / len(shown)) - gap
    for row, (label, interpolation, images) in enumerate(rows):
        for column, frame in enumerate(shown):
            x, y = left + column * (side + gap), top + row * (side + gap) + side
            axes = figure.add_axes((x / width, 1 - y / height, side / width, side / height))
            _bare(axes)
            axes.imshow(images[frame], interpolation=interpolation)
            if column == 0:
                _name_row(axes, label)
            if row == 0:
                text = "given" if frame == 0 else f"+{frame}"
                axes.set_title(text, fontsize=9, fontweight="normal", color=style.MUTED, loc="center", pad=5)
    return left / width


def varied_clips(evaluation: Evaluation, count: int) -> list[int]:
    """Return up to `count` sample indices, one per partition before any partition repeats."""
    seen: dict[str, int] = {}
    ranked = []
    for index, partition in enumerate(evaluation.sample_partitions):
        ranked.append((seen.get(partition, 0), index))
        seen[partition] = seen.get(partition, 0) + 1
    return sorted(index for _, index in sorted(ranked)[:count])


def mean_skill(evaluation: Evaluation) -> float:
    """Return 1 - error / copy-last error at the last horizon, mean over partitions."""
    copied = np.maximum(evaluation.copy_last_error[:, -1], 1e-12)
    return float(np.mean(1 - evaluation.rollout_error[:, -1] / copied))


def typical_clip(evaluation: Evaluation) -> int:
    """Return the index of the sample clip whose skill at the last frame is nearest to the mean skill."""
    truth, predicted = evaluation.sample_truth, evaluation.sample_prediction[:, -1]
    error = np.abs(predicted - truth[:, -1]).mean(axis=(1, 2))
    copied = np.maximum(np.abs(truth[:, 0] - truth[:, -1]).mean(axis=(1, 2)), 1e-12)
    return int(np.abs(1 - error / copied - mean_skill(evaluation)).argmin())


def _title(evaluation: Evaluation, clip: int) -> str:
    return f"{style.shown(evaluation.sample_partitions[clip])} · {style.shown(evaluation.sample_keys[clip], 40)}"


def _frame_grid(rows: int, frames: int, title: str, bar: bool, pairs: bool = False) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure of square panels, [rows][frames]; with `pairs`, a wider gap after every second row."""
    side, gap, left, right = 1.12, 0.06, 1.25, 0.75 if bar else 0.1
    top = 0.72 if title else 0.36
    pair_gap = 0.16
    extra = pair_gap * (rows // 2 - 1) if pairs else 0.0
    width = left + frames * (side + gap) + right
    height = top + rows * (side + gap) + extra + 0.1
    figure = style.new_figure(width, height)
    if title:
        figure.text(left / width, 1 - 0.16 / height, title, fontsize=10.5, fontweight="bold", va="top")
    panels = []
    for row in range(rows):
        y = top + row * (side + gap) + side + (pair_gap * (row // 2) if pairs else 0.0)
        line = []
        for frame in range(frames):
            x = left + frame * (side + gap)
            axes = figure.add_axes((x / width, 1 - y / height, side / width, side / height))
            _bare(axes)
            if row == 0:
                text = "frame 0, given" if frame == 0 else f"+{frame}"
                axes.set_title(text, fontsize=9, fontweight="normal", color=style.MUTED, loc="center", pad=5)
            line.append(axes)
        panels.append(line)
    return figure, panels


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _name_row(axes: Axes, name: str) -> None:
    axes.text(-0.1, 0.5, name, transform=axes.transAxes, ha="right", va="center", fontsize=9.5, color=style.INK)


def _overlay(axes: Axes, pixels: np.ndarray, error: np.ndarray, ceiling: float) -> None:
    """Show faded grey pixels under the error map, whose opacity grows with the error."""
    height, width = pixels.shape[:2]
    grey = pixels.astype(np.float32).mean(axis=-1) / 255.0
    axes.imshow(0.35 + 0.65 * grey, cmap="gray", vmin=0, vmax=1, interpolation="antialiased")
    strength = np.clip(np.nan_to_num(error / ceiling, nan=1.0), 0.0, 1.0)
    axes.imshow(
        strength,
        cmap=style.error_map(),
        vmin=0,
        vmax=1,
        alpha=0.85 * np.minimum(1.0, 1.6 * strength),
        interpolation="nearest",
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )


def _colour_bar(figure: Figure, beside: Axes, ceiling: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    box = beside.get_position()
    slot = figure.add_axes((box.x1 + 0.1 / figure.get_figwidth(), box.y0, 0.1 / figure.get_figwidth(), box.height))
    bar = figure.colorbar(ScalarMappable(Normalize(0, ceiling), style.error_map()), cax=slot)
    bar.outline.set_visible(False)  # pyright: ignore
    bar.set_ticks([0, ceiling], labels=["0", f"{ceiling:.2f}"])
    slot.set_ylabel("mean L1", fontsize=8.5, labelpad=-12)
    slot.grid(False)
