"""Turn feature maps [F, N, E] into pictures: colours by PCA of the truth, error maps, overlays on pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Projection:
    """Three principal directions of true features and the colour range they span.

    Attributes:
        mean: [E] mean of the fitted features.
        directions: [E, 3] orthonormal, largest variance first; sign fixed so that equal inputs give equal colours.
        low: [3] value shown as 0.
        high: [3] value shown as 1.
    """

    mean: np.ndarray
    directions: np.ndarray
    low: np.ndarray
    high: np.ndarray


def fit_projection(truth: np.ndarray) -> Projection:
    """Fit the projection on true features only, so that a prediction cannot choose its own colours.

    Args:
        truth: [..., E] features, E >= 1.
    """
    flat = truth.reshape(-1, truth.shape[-1]).astype(np.float64)
    mean = flat.mean(axis=0)
    centred = flat - mean
    _, vectors = np.linalg.eigh(centred.T @ centred)
    directions = vectors[:, ::-1][:, :3]
    directions = np.pad(directions, ((0, 0), (0, 3 - directions.shape[1])))
    largest = np.abs(directions).argmax(axis=0)
    signs = np.sign(directions[largest, np.arange(3)])
    directions = directions * np.where(signs == 0, 1.0, signs)
    scores = centred @ directions
    low, high = np.percentile(scores, (1, 99), axis=0)
    return Projection(mean, directions, low, high)


def colours(features: np.ndarray, projection: Projection, grid: tuple[int, int]) -> np.ndarray:
    """Return RGB in [0, 1], [..., rows, columns, 3], of features [..., N, E] with N = rows * columns.

    Values outside the projection's range are clipped; the range keeps clear of pure black and neon.
    """
    scores = (features.astype(np.float64) - projection.mean) @ projection.directions
    width = np.maximum(projection.high - projection.low, 1e-9)
    unit = np.clip((scores - projection.low) / width, 0.0, 1.0)
    return (0.07 + 0.86 * unit).reshape(*features.shape[:-2], *grid, 3)


def error_maps(truth: np.ndarray, prediction: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return mean absolute error over channels, [..., rows, columns], of features [..., N, E]."""
    return np.abs(prediction - truth).mean(axis=-1).reshape(*truth.shape[:-2], *grid)


def error_ceiling(maps: np.ndarray) -> float:
    """Return the error shown as the strongest colour: the 99.5th percentile, so one patch does not hide the rest."""
    ceiling = float(np.nanpercentile(maps, 99.5)) if maps.size else 0.0
    return ceiling if np.isfinite(ceiling) and ceiling > 0 else 1.0
