"""One picture of stored clips: their features in the colours of three principal components, a tile a frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hopescale.report import features, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_FRAMES = 16
MAX_FITTED_TOKENS = 20_000
_SIDE, _GAP, _TITLE, _LEFT, _TOP = 0.92, 0.06, 0.24, 2.15, 0.42


def clip_strip(clips: Sequence[np.ndarray], names: Sequence[str], grid: tuple[int, int]) -> Figure:
    """Draw clips down the page, frames along it.

    Colours are the first three principal components of the tokens of all clips shown, so equal colours mean alike
    features in every tile. Of clips with more than `MAX_FRAMES` frames, evenly spaced ones are shown.

    Args:
        clips: Each LayerNormed features `[F, N, E]`, with N = rows * columns of the grid.
        names: Of the clips.
        grid: Rows and columns of tokens.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    tokens = np.concatenate([clip.reshape(-1, clip.shape[-1]) for clip in clips])
    projection = features.fit_projection(tokens[:: -(-len(tokens) // MAX_FITTED_TOKENS)])
    chosen = [_spaced(len(clip)) for clip in clips]
    columns, aspect = max(map(len, chosen)), grid[0] / grid[1]
    # Tokens without a grid lie in one row; the picture of it stays visible.
    tall = _SIDE * min(max(aspect, 0.25), 4.0)
    alike = all(np.array_equal(frames, chosen[0]) for frames in chosen)
    step = tall + (_GAP if alike else _TITLE)
    width, height = _LEFT + columns * (_SIDE + _GAP) + 0.1, _TOP + len(clips) * step + 0.1
    with style.styled():
        figure = style.new_figure(width, height)
        for row, (clip, frames, name) in enumerate(zip(clips, chosen, names, strict=True)):
            bottom = height - _TOP - row * step - tall
            centre, text = (bottom + tall / 2) / height, style.shown(name, 30)
            figure.text((_LEFT - 0.12) / width, centre, text, fontsize=8, color=style.INK, ha="right", va="center")
            images = features.colours(clip[frames], projection, grid)
            for column, (frame, image) in enumerate(zip(frames, images, strict=True)):
                left = _LEFT + column * (_SIDE + _GAP)
                axes = figure.add_axes((left / width, bottom / height, _SIDE / width, tall / height))
                axes.set_axis_off()
                axes.imshow(image, interpolation="nearest", aspect="auto")
                if row == 0 or not alike:
                    text = f"frame {frame}"
                    axes.set_title(text, fontsize=7.5, fontweight="normal", color=style.MUTED, loc="center", pad=3)
        return figure


def _spaced(frames: int) -> np.ndarray:
    """Numbers of at most `MAX_FRAMES` frames, evenly spaced from the first to the last."""
    return np.unique(np.linspace(0, frames - 1, min(frames, MAX_FRAMES)).round().astype(int))
