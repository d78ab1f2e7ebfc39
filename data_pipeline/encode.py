"""Pixels to features: one frozen encoder over all frames of a folder, recorded so that nobody has to guess later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline import lite0
from data_pipeline.cache import write_json
from data_pipeline.errors import DataError, Problem, nearest
from data_pipeline.simulate import PIXELS_FILE, npz_bytes

FEATURES_FILE = "features.json"
_Group = list[dict[str, Any]]
_Result = tuple[list[dict[str, Any]], set[tuple[int, int]]]
ENCODER_VERSION = 1
ENCODERS: dict[str, tuple[str, ...]] = {"efficientnet-lite0": ("per-frame",)}
"""Encoder id to the encode modes it offers: an image network can only look at one frame at a time."""


def encode(
    pixels: Path,
    out: Path,
    *,
    encoder: str = "efficientnet-lite0",
    mode: str = "per-frame",
    batch_frames: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Encode every clip of a pixels folder, with as many batches at a time as torch has threads.

    Writes `PARTITION/KEY.npz` with features f16 `[F, N, E]`, raw encoder output, and actions f32 `[F - 1, A]`, then
    `features.json`, whose presence means the folder is complete.

    Args:
        pixels: Folder with `pixels.json`.
        out: New or empty folder.
        encoder: A key of `ENCODERS`.
        mode: An encode mode the encoder offers.
        batch_frames: Frames in one forward pass; batches run across clips. 16 frames of 128 pixels fit the caches of a
            CPU core.
        progress: Called with (frames done, frames in all) after each batch.

    Returns:
        The content of `features.json`.

    Raises:
        DataError: Unknown encoder or mode, unusable pixels folder, or `out` holds something.
        MissingExtra: The encoder's weights are not installed.
    """
    _check_encoder(encoder, mode, batch_frames)
    source = read_document(pixels, PIXELS_FILE, "pixels", "hopescale data simulate")
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise DataError(Problem("out", out, "the folder must be new or empty", "name another one"))
    network = lite0.load_lite0()
    clips = source["clips"]
    total = sum(clip["length"] for clip in clips)
    done = 0
    digest = hashlib.sha256()
    records: list[dict[str, Any]] = []
    grids: set[tuple[int, int]] = set()
    work = partial(_encode_group, network, pixels, out, batch_frames)
    for group_records, grid in _in_parallel(work, list(_groups(clips, batch_frames))):
        records += group_records
        grids |= grid
        for record in group_records:
            digest.update(f"{record['key']} {record['sha256']}\n".encode())
            done += record["length"]
        if progress is not None:
            progress(done, total)
    if len(grids) != 1:
        rule = "all frames must have the same size"
        raise DataError(Problem("pixels", pixels, f"{rule}; token grids found: {sorted(grids)}", "resize the frames"))
    document = {
        "format": 1,
        "encoder": encoder,
        "encoder_version": ENCODER_VERSION,
        "weights_sha256": lite0.weights_sha256(),
        "encode_mode": mode,
        "preprocessing": lite0.PREPROCESSING,
        "grid": list(grids.pop()),
        "channels": lite0.CHANNELS,
        "dtype": "float16",
        "pixels_digest": source["digest"],
        "digest": digest.hexdigest(),
        "clips": records,
    }
    write_json(out / FEATURES_FILE, document)
    return document


def features_key_parts(pixels_digest: str, encoder: str = "efficientnet-lite0", mode: str = "per-frame") -> tuple:
    """Return everything the encoded features depend on, for `cache.content_key`."""
    return ("features", ENCODER_VERSION, pixels_digest, encoder, lite0.weights_sha256(), mode)


def read_document(folder: Path, name: str, field: str, command: str) -> dict[str, Any]:
    """Return the JSON document that completes a folder of clips.

    Args:
        folder: The folder.
        name: File name of the document.
        field: Setting to name in the error.
        command: Command that makes such a folder.

    Raises:
        DataError: The folder or its document is missing, unreadable, or of another format version.
    """
    path = folder / name
    if not path.is_file():
        rule = f"the folder has no {name}, so it is not complete" if folder.is_dir() else "the folder does not exist"
        raise DataError(Problem(field, folder, rule, f"make it with `{command}`"))
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            Problem(field, path, f"not readable as JSON ({error})", f"make it again with `{command}`")
        ) from error
    if document.get("format") != 1:
        rule = "this release reads format 1"
        raise DataError(Problem(f"{field}.format", document.get("format"), rule, f"make it again with `{command}`"))
    return document


def _check_encoder(encoder: str, mode: str, batch_frames: int) -> None:
    problems = []
    if encoder not in ENCODERS:
        problems.append(Problem("encoder", encoder, "unknown encoder", nearest(encoder, ENCODERS)))
    elif mode not in ENCODERS[encoder]:
        rule = f"{encoder} does not offer this encode mode"
        problems.append(Problem("mode", mode, rule, nearest(mode, ENCODERS[encoder])))
    if batch_frames < 1:
        problems.append(Problem("batch_frames", batch_frames, "must be at least 1", "use 16"))
    if problems:
        raise DataError(problems)


def _groups(clips: _Group, batch_frames: int) -> Iterator[_Group]:
    """Yield runs of clips that fill a batch, at least one clip each."""
    group: _Group = []
    frames = 0
    for clip in clips:
        if group and frames + clip["length"] > batch_frames:
            yield group
            group, frames = [], 0
        group.append(clip)
        frames += clip["length"]
    if group:
        yield group


def _in_parallel(work: Callable[[_Group], _Result], groups: list[_Group]) -> Iterator[_Result]:
    """Yield `work(group)` in order.

    One batch a thread, instead of all threads on one batch: nothing waits at the end of each layer, which on a busy
    machine costs more than the convolutions.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    executor = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from executor.map(work, groups)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)


def _encode_group(
    network: lite0.EfficientNetLite0, pixels: Path, out: Path, batch_frames: int, group: _Group
) -> _Result:
    loaded = [_load_clip(pixels, clip) for clip in group]
    records: list[dict[str, Any]] = []
    if len({frames.shape[1:] for frames, _ in loaded}) == 1:
        features = _encode_batches(network, np.concatenate([frames for frames, _ in loaded]), batch_frames)
        row = 0
        for clip, (frames, actions) in zip(group, loaded, strict=True):
            content = npz_bytes({"features": features[row : row + len(frames)], "actions": actions}, compress=False)
            row += len(frames)
            path = out / clip["partition"] / f"{clip['key']}.npz"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            kept = {name: clip[name] for name in ("key", "partition", "split", "length")}
            records.append({**kept, "sha256": hashlib.sha256(content).hexdigest()})
    return records, {(frames.shape[1] // lite0.STRIDE, frames.shape[2] // lite0.STRIDE) for frames, _ in loaded}


def _load_clip(pixels: Path, clip: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    path = pixels / clip["partition"] / f"{clip['key']}.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            frames, actions = arrays["frames"], arrays["actions"].astype(np.float32)
    except (OSError, KeyError, ValueError, EOFError) as error:
        rule = f"clip file cannot be read ({type(error).__name__}: {error})"
        raise DataError(Problem("pixels", path, rule, "make the pixels folder again")) from error
    expected = f"uint8 [{clip['length']}, H, W, 3] with H and W multiples of {lite0.STRIDE}"
    sides_fit = frames.ndim == 4 and frames.shape[1] % lite0.STRIDE == 0 and frames.shape[2] % lite0.STRIDE == 0
    if frames.dtype != np.uint8 or not sides_fit or frames.shape[0] != clip["length"] or frames.shape[3] != 3:
        raise DataError(
            Problem(
                "pixels", path, f"frames are {frames.dtype} {list(frames.shape)}, not {expected}", "store such frames"
            )
        )
    return frames, actions


def _encode_batches(network: lite0.EfficientNetLite0, frames: np.ndarray, batch_frames: int) -> np.ndarray:
    parts = [
        lite0.encode_frames(network, torch.from_numpy(frames[first : first + batch_frames])).half().numpy()
        for first in range(0, len(frames), batch_frames)
    ]
    return np.concatenate(parts)
