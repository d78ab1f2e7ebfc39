"""Frames of single clips from a pixels folder, for pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.encode.pixels_folder import read_pixels, read_pixels_folder
from data_pipeline.errors import DataError, Problem


def read_frames(pixels: Path, keys: Sequence[str], num_frames: int) -> np.ndarray:
    """Return u8 `[len(keys), num_frames, H, W, 3]`; a shorter clip stays on its last frame.

    Raises:
        DataError: the folder is not a complete pixels folder, lacks a clip, or a clip's file is damaged.
    """
    clips = {clip.key: clip for clip in read_pixels_folder(pixels).clips}
    missing = [key for key in keys if key not in clips]
    if missing:
        rule = f"lacks the clips {', '.join(missing)}"
        raise DataError(Problem("pixels", pixels, rule, "name the folder these features were encoded from"))
    frames = []
    for key in keys:
        stored = read_pixels(clips[key].path, "frames")
        if stored.dtype != np.uint8 or stored.ndim != 4 or not stored.size:
            rule = f"frames are {stored.dtype} {list(stored.shape)}, not uint8 [F, H, W, 3]"
            raise DataError(Problem("pixels", clips[key].path, rule, "make the pixels folder again"))
        frames.append(stored[np.minimum(np.arange(num_frames), len(stored) - 1)])
    return np.stack(frames)
