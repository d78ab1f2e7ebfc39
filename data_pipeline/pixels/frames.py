"""Frames of single clips from a pixels folder, for pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.encode.documents import read_document
from data_pipeline.errors import DataError, Problem
from data_pipeline.pixels.simulate import PIXELS_FILE


def read_frames(pixels: Path, keys: Sequence[str], num_frames: int) -> np.ndarray:
    """Return u8 `[len(keys), num_frames, H, W, 3]`; a shorter clip stays on its last frame.

    Raises:
        DataError: the folder is not a complete pixels folder, or lacks a clip.
    """
    document = read_document(pixels, PIXELS_FILE, "pixels", "hopescale data simulate")
    partitions = {clip["key"]: clip["partition"] for clip in document["clips"]}
    missing = [key for key in keys if key not in partitions]
    if missing:
        rule = f"lacks the clips {', '.join(missing)}"
        raise DataError(Problem("pixels", pixels, rule, "name the folder these features were encoded from"))
    frames = []
    for key in keys:
        with np.load(pixels / partitions[key] / f"{key}.npz", allow_pickle=False) as arrays:
            stored = arrays["frames"]
            frames.append(stored[np.minimum(np.arange(num_frames), len(stored) - 1)])
    return np.stack(frames)
