"""Which pixel frames each step is encoded from, and in which batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.dtypes import STORED_TYPES
from data_pipeline.encode.encoders import Encoder
from data_pipeline.errors import DataError, Problem

DTYPES = ("float16", "float32", "bfloat16")

_Clips = UInt8[Tensor, "B F H W 3"]
_Features = Float[Tensor, "B S N E"]


def pixel_frames_per_step(encoder: Encoder, mode: str) -> int:
    """Return how many pixel frames become one stored frame.

    In per-frame mode each one does: it is repeated to fill its tubelet. In the others a tubelet of successive frames
    does, and frames left over at the end of a clip belong to none.
    """
    return 1 if mode == "per-frame" else encoder.tubelet


def encode_clips(
    encoder: Encoder, mode: str, clips: Sequence[NDArray[np.uint8]], batch_frames: int, dtype: str
) -> list[np.ndarray]:
    """Encode clips, batched across clips.

    Args:
        encoder: Offers the mode.
        mode: per-frame, prefix (step t from the frames up to its own, one pass a step) or clip.
        clips: u8 `[P, H, W, 3]` each, all of one size H, W; P may differ.
        batch_frames: Pixel frames in one pass, more where a single clip has more.
        dtype: Out of `DTYPES`.

    Returns:
        For each clip `[F, N, E]` of the dtype; bfloat16 as u2 with the same bits.

    Raises:
        DataError: The encoder returned another shape than it announced, or numbers that the dtype cannot hold.
    """

    def run(frames: _Clips) -> _Features:
        return _checked(encoder, frames, encoder.encode(frames), dtype)

    if mode == "per-frame":
        return _each_frame(run, encoder.tubelet, clips, batch_frames)
    by_length: dict[int, list[int]] = {}
    for index, clip in enumerate(clips):
        by_length.setdefault(len(clip) // encoder.tubelet * encoder.tubelet, []).append(index)
    encoded: dict[int, np.ndarray] = {}
    steps = _prefixes if mode == "prefix" else _together
    for length, members in by_length.items():
        stacked = torch.from_numpy(np.stack([clips[index][:length] for index in members]))
        encoded.update(zip(members, _numpy(steps(run, encoder.tubelet, stacked, batch_frames)), strict=True))
    return [encoded[index] for index in range(len(clips))]


def _each_frame(
    run: Callable[[_Clips], _Features], tubelet: int, clips: Sequence[NDArray[np.uint8]], batch_frames: int
) -> list[np.ndarray]:
    frames = torch.from_numpy(np.concatenate(clips))[:, None].expand(-1, tubelet, -1, -1, -1)
    features = _numpy(torch.cat([run(batch)[:, 0] for batch in frames.split(batch_frames)]))
    return np.split(features, np.cumsum([len(clip) for clip in clips])[:-1])


def _prefixes(run: Callable[[_Clips], _Features], tubelet: int, clips: _Clips, batch_frames: int) -> _Features:
    steps = []
    for end in range(tubelet, clips.shape[1] + 1, tubelet):
        batches = clips[:, :end].split(max(1, batch_frames // end))
        steps.append(torch.cat([run(batch)[:, -1] for batch in batches]))
    return torch.stack(steps, 1)


def _together(run: Callable[[_Clips], _Features], tubelet: int, clips: _Clips, batch_frames: int) -> _Features:
    return torch.cat([run(batch) for batch in clips.split(max(1, batch_frames // clips.shape[1]))])


def _checked(encoder: Encoder, frames: _Clips, features: _Features, dtype: str) -> _Features:
    rows, columns = encoder.grid(frames.shape[2], frames.shape[3])
    expected = (len(frames), frames.shape[1] // encoder.tubelet, rows * columns, encoder.channels)
    if tuple(features.shape) != expected:
        rule = f"it returned {list(features.shape)} for frames {list(frames.shape)}, not {list(expected)}"
        raise DataError(Problem("encoder", encoder.name, rule, "correct the encoder"))
    stored = features.detach().to(STORED_TYPES[dtype].torch)
    if not bool(torch.isfinite(stored).all()):
        finite = bool(torch.isfinite(features).all())
        rule = f"some features are larger than {dtype} can hold" if finite else "some features are not finite"
        fix = "set dtype=float32 or dtype=bfloat16" if finite else "look at the weights and the frames"
        raise DataError(Problem("dtype" if finite else "encoder", dtype if finite else encoder.name, rule, fix))
    return stored.cpu()


def _numpy(features: Tensor) -> np.ndarray:
    if features.dtype == torch.bfloat16:
        return features.view(torch.int16).numpy().view(np.uint16)
    return features.numpy()
