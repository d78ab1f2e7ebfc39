"""Small folders of pixels and videos, a tiny V-JEPA 2 and another encoder: real in every part but their size."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.pixels.simulate import npz_bytes

PATCH_MEANS = f"{__name__}:make_patch_means"
ENCODED: list[int] = []
"""Pixel frames in each call of `PatchMeans.encode`."""


class PatchMeans:
    """Mean colour of each 8 x 8 patch of a tubelet, plus that of everything it is given: so it sees the future too."""

    name = "patch-means"
    version = 3
    modes: tuple[str, ...] = ("per-frame", "prefix", "clip")
    channels = 3
    size: int | None = None
    preprocessing = "x / 255"
    weights_sha256 = "0" * 64

    def __init__(self, tubelet: int) -> None:
        self.tubelet = tubelet

    def grid(self, height: int, width: int) -> tuple[int, int]:
        if height % 8 or width % 8:
            raise ValueError("H and W must be multiples of 8")
        return height // 8, width // 8

    def encode(self, frames: Tensor) -> Tensor:
        ENCODED.append(frames.shape[0] * frames.shape[1])
        colours = frames.float().div(255).unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).mean((3, 5))
        steps = colours.unflatten(1, (-1, self.tubelet)).mean(2).flatten(2, 3)
        return steps + colours.mean((1, 2, 3))[:, None, None]


def make_patch_means(*, weights: str | None, device: str) -> PatchMeans:
    return PatchMeans(int(weights or 1))


def random_frames(seed: int, frames: int, height: int = 32, width: int = 32) -> NDArray[np.uint8]:
    """Smooth enough that no codec has to work hard."""
    coarse = np.random.default_rng(seed).integers(0, 256, (frames, -(-height // 8), -(-width // 8), 3), np.uint8)
    return coarse.repeat(8, 1).repeat(8, 2)[:, :height, :width]


def write_pixels(folder: Path, lengths: Sequence[int], **changed: NDArray[np.uint8]) -> Path:
    """Write clips of 32 x 32 pixels; `changed` names clips with frames of one's own."""
    (folder / "base").mkdir(parents=True)
    clips = []
    for index, length in enumerate(lengths):
        key = f"clip_{index}"
        frames = changed.get(key, random_frames(index, length))
        actions = np.random.default_rng(index).normal(size=(length - 1, 2)).astype(np.float32)
        content = npz_bytes({"frames": frames, "actions": actions})
        (folder / "base" / f"{key}.npz").write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        split = "heldout" if index == 0 else "train"
        clips.append({"key": key, "partition": "base", "split": split, "length": length, "sha256": sha256})
    digest = hashlib.sha256("".join(clip["sha256"] for clip in clips).encode()).hexdigest()
    (folder / "pixels.json").write_text(json.dumps({"format": 1, "digest": digest, "clips": clips}))
    return folder


def write_video(
    path: Path,
    frames: NDArray[np.uint8],
    *,
    rate: int = 30,
    codec: str = "ffv1",
    rotation: int | None = None,
    options: Mapping[str, str] | None = None,
) -> Path:
    """Write a real video file, without loss for ffv1."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=dict(options or {})) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        stream.codec_context.thread_count = 1
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_recording(folder: Path, key: str, frames: NDArray[np.uint8], actions: int, **rows: int) -> Path:
    """Write KEY.mkv with so many rows of actions and of other fields; row i of a field holds i."""
    path = write_video(folder / f"{key}.mkv", frames)
    for field, count in {"actions": actions, **rows}.items():
        np.save(folder / f"{key}.{field}.npy", np.arange(count, dtype=np.float64)[:, None].repeat(2, 1))
    return path


def save_vjepa2(folder: Path, *, seed: int = 0, tubelet: int = 2, **saving: Any) -> Path:
    """Save a random V-JEPA 2 of 32 pixels in its own format."""
    from transformers import VJEPA2Config, VJEPA2Model

    torch.manual_seed(seed)
    config = VJEPA2Config(
        patch_size=16,
        crop_size=32,
        frames_per_clip=8,
        tubelet_size=tubelet,
        hidden_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        mlp_ratio=2,
        num_pooler_layers=1,
        pred_hidden_size=12,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
        initializer_range=0.3,
    )
    VJEPA2Model(config).save_pretrained(folder, **saving)
    return folder


def features_of(out: Path, key: str) -> dict[str, np.ndarray]:
    """Arrays of an encoded clip."""
    (path,) = out.glob(f"*/{key}.npz")
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a features folder, but for the records of its parts."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.parent.name != "parts"
    }
