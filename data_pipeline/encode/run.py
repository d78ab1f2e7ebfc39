"""Pixels or videos to features: one frozen encoder over all frames, recorded so that nobody has to guess later."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import torch

from data_pipeline.alignment import ActionAlignment
from data_pipeline.encode import lite0
from data_pipeline.encode.documents import FEATURES_FILE, read_document
from data_pipeline.encode.encoders import Encoder, make_encoder
from data_pipeline.encode.inputs import Input, InputClip, LoadedClip, clip_problem, describe_steps, open_input
from data_pipeline.encode.journal import Part, Record, begin, check_free, complete, finished_parts, locked, plan_digest
from data_pipeline.encode.modes import encode_clips, pixel_frames_per_step
from data_pipeline.encode.rows import Timeline, common_alignment, stored_rows
from data_pipeline.encode.settings import EncodeSettings
from data_pipeline.errors import DataError, Problem
from data_pipeline.pixels.simulate import npz_bytes
from data_pipeline.schema import LEAKY_ENCODE_MODES

logger = logging.getLogger(__name__)

_LOADERS = 4
"""Threads that load and write clips while a GPU encodes others."""

Group = Sequence[InputClip]
Done = tuple[list[Record], list[Record]]
"""Records of clips that were encoded, and of clips that were skipped."""
T = TypeVar("T")


def encode(
    pixels: Path,
    out: Path,
    *,
    encoder: str = lite0.NAME,
    weights: str | None = None,
    mode: str = "per-frame",
    batch_frames: int = 16,
    dtype: str = "float16",
    device: str = "cpu",
    frames: int | None = None,
    fps: float | None = None,
    size: int | None = None,
    alignment: ActionAlignment | None = None,
    heldout: float | None = None,
    on_error: str = "fail",
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Encode every clip of a folder of pixels or videos.

    Writes `PARTITION/KEY.npz` with features `[F, N, E]`, raw encoder output, actions f32 `[rows, A]` as recorded, and
    states f32 `[F, S]` and extrinsics f32 `[F - 1, X]` where there are any; then `features.json`, whose presence means
    the folder is complete. A killed run goes on when the same command is given again, with the same bytes as if it had
    never stopped.

    Args:
        pixels: Folder with `pixels.json`, or with videos: `KEY.mp4` (any container), `KEY.actions.npy`, optionally
            `KEY.states.npy` and `KEY.extrinsics.npy`, in sub-folders if wanted, which become partitions.
        out: New or empty folder, or one that this command began.
        encoder: Name of an encoder, or `module:function` (`encoders.make_encoder`).
        weights: Folder or hub id of the encoder's weights, where it takes any.
        mode: What step t is encoded from: per-frame (one pixel frame, repeated to fill its tubelet), prefix (a tubelet
            of pixel frames and all before it, one pass a step) or clip (all frames of the clip, later ones too).
        batch_frames: Pixel frames in one forward pass; batches run across clips. 16 frames of 128 pixels fit the caches
            of a CPU core.
        dtype: Of the stored features: float16, float32 or bfloat16 (as u2).
        device: cpu (as many batches at a time as torch has threads), cuda or cuda:INDEX (autocast to bfloat16).
        frames: Pixel frames to take of each video, or None for all.
        fps: Frames a second to thin videos to, or None for all.
        size: Side of the square that frames are resized and cut to; None takes the encoder's, if it has one, or leaves
            them as they are.
        alignment: Rule that makes recorded actions one per transition; None finds it by their number.
        heldout: Share of each partition's videos that is held out, chosen by key; None takes a tenth.
        on_error: fail on a bad clip, or skip it and list it in features.json.
        part: (index, count): encode one share of the clips. The last part to finish completes the folder.
        progress: Called with (frames done, frames in all) of this part; clips where videos' lengths are not known yet.

    Returns:
        The content of `features.json`, or this part's own record while others still work.

    Raises:
        DataError: Unknown settings, unusable clips, or `out` holds something else.
        MissingExtra: A package or the encoder's weights are not installed.
    """
    settings = EncodeSettings(
        encoder, weights, mode, batch_frames, dtype, device, frames, fps, size, alignment, heldout, on_error, part
    )
    settings.check()
    source = open_input(pixels, frames=frames, fps=fps, heldout=heldout)
    bad = [clip_problem(clip) for clip in source.clips if clip.problem is not None]
    if bad and on_error == "fail":
        raise DataError(bad[:20])
    check_free(out)
    network = make_encoder(encoder, weights, mode, device)
    if mode in LEAKY_ENCODE_MODES and part[0] == 0:
        logger.warning(
            "mode=%s: every step is encoded from later frames too, so errors of predicting those mean nothing; "
            "the trainer refuses such features without data.allow_leaky_features=true",
            mode,
        )
    return _run(_Job(settings, source, network, _side(size, network)), out, progress)


def features_key_parts(pixels_digest: str, encoder: str = lite0.NAME, mode: str = "per-frame") -> tuple:
    """Return everything that features of EfficientNet-Lite0 depend on, for `cache.content_key`."""
    return ("features", lite0.VERSION, pixels_digest, encoder, lite0.weights_sha256(), mode)


@dataclass(frozen=True)
class _Job:
    """What is encoded, and how."""

    settings: EncodeSettings
    source: Input
    encoder: Encoder
    side: int | None

    @property
    def tubelet(self) -> int:
        return pixel_frames_per_step(self.encoder, self.settings.mode)

    @property
    def provenance(self) -> dict[str, Any]:
        """What features.json says of where the features come from."""
        return {
            "encoder": self.encoder.name,
            "encoder_version": self.encoder.version,
            "weights_sha256": self.encoder.weights_sha256,
            "encode_mode": self.settings.mode,
            "preprocessing": describe_steps(self.source, self.side, self.encoder.preprocessing),
            "precision": "bfloat16 autocast" if self.settings.on_cuda else "float32",
            "dtype": self.settings.dtype,
            "channels": self.encoder.channels,
            "pixel_frames_per_step": self.tubelet,
            "source": self.source.kind,
        }

    @property
    def plan(self) -> dict[str, Any]:
        """Everything that the bytes of the folder depend on."""
        return {
            **self.provenance,
            "batch_frames": self.settings.batch_frames,
            "alignment": self.settings.alignment,
            "heldout": self.settings.heldout,
            "input": self.source.stamp,
        }


def _shown_weights(weights: str | None) -> str | None:
    """Return the name of weights for readers: a hub id, or the last part of a path, which says nothing elsewhere."""
    return Path(weights).name if weights is not None and Path(weights).expanduser().exists() else weights


def _side(size: int | None, encoder: Encoder) -> int | None:
    if size is not None and encoder.size is not None and size != encoder.size:
        rule = f"these weights of {encoder.name} take frames of {encoder.size} pixels only"
        raise DataError(Problem("size", size, rule, f"leave size out, or set size={encoder.size}"))
    return encoder.size if size is None else size


def _run(job: _Job, out: Path, progress: Callable[[int, int], None] | None) -> dict[str, Any]:
    index, count = job.settings.part
    begin(out, job.plan)
    plan = plan_digest(job.plan)
    if not (out / FEATURES_FILE).is_file():
        with Part(out, index, count) as part:
            document = _encode_part(job, part, plan, progress)
        with locked(out):
            parts = finished_parts(out, count, plan)
            if parts is None:
                return document
            if not (out / FEATURES_FILE).is_file():
                complete(out, _features_document(job, out, plan, parts))
    return read_document(out, FEATURES_FILE, "out", "hopescale data encode")


def _encode_part(job: _Job, part: Part, plan: str, progress: Callable[[int, int], None] | None) -> Record:
    """Encode what is left of a part, and return its document."""
    settings = job.settings
    # Groups, not clips, are dealt out to parts: what shares a batch, and so every bit, is the same for any count.
    mine = list(_groups(job.source.clips, settings.batch_frames))[settings.part[0] :: settings.part[1]]
    todo = [group for group in mine if any(clip.key not in part.done for clip in group)]
    left = {clip.key for group in todo for clip in group}
    frames = {clip.key: clip.frames or 1 for group in mine for clip in group}
    done, total = sum(frames[key] for key in frames if key not in left), sum(frames.values())
    agreement = _Agreement(part.done[key] for key in frames if key not in left)
    work = partial(_encode_group, job, part, Lock() if settings.on_cuda else nullcontext())
    skipped: list[Record] = []
    for records, bad in _in_parallel(work, todo, _LOADERS if settings.on_cuda else torch.get_num_threads()):
        for record in records:
            part.add(record)
            agreement.add(record)
        skipped += bad
        done += sum(frames[record["key"]] for record in (*records, *bad))
        if progress is not None:
            progress(done, total)
    lost = {record["key"] for record in skipped}
    return part.finish(plan, [key for key in frames if key not in lost], skipped)


def _groups(clips: Sequence[InputClip], batch_frames: int) -> Iterator[Group]:
    """Yield runs of clips that fill a batch, at least one clip each; a clip of unknown length stays alone."""
    group: list[InputClip] = []
    total = 0
    for clip in clips:
        frames = clip.frames or batch_frames
        if group and total + frames > batch_frames:
            yield group
            group, total = [], 0
        group.append(clip)
        total += frames
    if group:
        yield group


def _in_parallel(work: Callable[[Group], T], groups: Sequence[Group], threads: int) -> Iterator[T]:
    """Yield `work(group)` in order.

    One batch a thread, instead of all threads on one batch: nothing waits at the end of each layer, which on a busy
    machine costs more than the convolutions.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    executor = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from executor.map(work, groups)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


def _encode_group(job: _Job, part: Part, turn: AbstractContextManager[Any], group: Group) -> Done:
    """Load, encode and write some clips; `turn` lets one thread at a time onto a GPU."""
    ready: list[tuple[InputClip, LoadedClip, dict[str, np.ndarray], str]] = []
    skipped: list[Record] = []
    for clip in group:
        try:
            loaded = job.source.load(clip, job.side)
            ready.append((clip, loaded, *_clip_rows(job, clip, loaded)))
        except DataError as error:
            if job.settings.on_error == "fail":
                raise
            logger.warning("skipped %s: %s", clip.key, error)
            skipped.append({"key": clip.key, "where": str(clip.where), "reason": "; ".join(map(str, error.problems))})
    if not ready:
        return [], skipped
    for clip, loaded, _, _ in ready:
        _check_size(clip.where, loaded.frames.shape[1:3], ready[0][0].where, ready[0][1].frames.shape[1:3])
    settings = job.settings
    precision = torch.autocast("cuda", torch.bfloat16) if settings.on_cuda else nullcontext()
    with turn, precision:
        pictures = [loaded.frames for _, loaded, _, _ in ready]
        features = encode_clips(job.encoder, settings.mode, pictures, settings.batch_frames, settings.dtype)
    records: list[Record] = []
    for (clip, loaded, rows, rule), encoded in zip(ready, features, strict=True):
        content = npz_bytes({"features": encoded, **rows}, compress=False)
        part.write(clip.partition, clip.key, content)
        records.append(
            {
                "key": clip.key,
                "partition": clip.partition,
                "split": clip.split,
                "length": len(encoded),
                "sha256": hashlib.sha256(content).hexdigest(),
                "bytes": len(content),
                "alignment": rule,
                "size": list(loaded.frames.shape[1:3]),
                "source_sha256": loaded.sha256,
            }
        )
    return records, skipped


def _clip_rows(job: _Job, clip: InputClip, loaded: LoadedClip) -> tuple[dict[str, np.ndarray], str]:
    try:
        job.encoder.grid(*loaded.frames.shape[1:3])
    except ValueError as error:
        rule = f"frames are uint8 {list(loaded.frames.shape)}, and for {job.encoder.name} {error}"
        raise DataError(Problem("frames", clip.where, rule, "set size to have them resized")) from error
    try:
        rows, rule = stored_rows(
            loaded.rows, Timeline(loaded.taken, loaded.recorded, job.tubelet), job.settings.alignment
        )
    except ValueError as error:
        fix = "correct the rows, or leave such clips out with on_error=skip"
        raise DataError(Problem("rows", clip.where, str(error), fix)) from error
    return dict(rows), rule


class _Agreement:
    """Checks that all clips have one frame size and actions of one kind, as soon as one differs."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._first: Record | None = None
        self.alignment: ActionAlignment = "as-is"
        self.size: list[int] = []
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Compare a clip with those before it.

        Raises:
            DataError: It differs; both are named.
        """
        first = self._first
        if first is None:
            self._first, self.alignment, self.size = record, record["alignment"], record["size"]
            return
        _check_size(record["key"], record["size"], first["key"], self.size)
        try:
            self.alignment = common_alignment((self.alignment, record["alignment"]))
        except ValueError as error:
            rule = f"{error}, the latter beside {first['key']}"
            fix = "record equally many actions a frame for all clips, or set alignment"
            raise DataError(Problem("actions", record["key"], rule, fix)) from error


def _check_size(place: object, size: Sequence[int], other: object, expected: Sequence[int]) -> None:
    if list(size) != list(expected):
        rule = f"all frames must have the same size, and these are {list(size)}, those of {other} {list(expected)}"
        raise DataError(Problem("pixels", place, rule, "set size to have them resized"))


def _features_document(job: _Job, out: Path, plan: str, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    by_key = {record["key"]: record for document in parts for record in document["clips"]}
    records = [by_key[clip.key] for clip in job.source.clips if clip.key in by_key]
    skipped = [record for document in parts for record in document["skipped"]]
    if not records:
        rule = f"no clip is left, {len(skipped)} were skipped; the first: {skipped[0]['reason'] if skipped else 'none'}"
        raise DataError(Problem("pixels", out, rule, "correct the clips"))
    agreement = _Agreement(records)
    rows, columns = job.encoder.grid(*agreement.size)
    kept = ("key", "partition", "split", "length", "sha256")
    return {
        "format": 1,
        **job.provenance,
        "weights": _shown_weights(job.settings.weights),
        "grid": [rows, columns],
        "tokens": rows * columns,
        "action_alignment": agreement.alignment,
        "pixels_digest": job.source.digest({record["key"]: record["source_sha256"] for record in records}),
        "plan": plan,
        "digest": hashlib.sha256("".join(f"{r['key']} {r['sha256']}\n" for r in records).encode()).hexdigest(),
        "clips": [{name: record[name] for name in kept} for record in records],
        "skipped": skipped,
    }
