"""What can be encoded: a folder of pixels, or a folder of videos with their recorded actions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.encode.pixels_folder import read_clip, read_pixels_folder
from data_pipeline.encode.rows import Rows
from data_pipeline.errors import DataError, Problem
from data_pipeline.pixels.simulate import PIXELS_FILE
from data_pipeline.pixels.video import Video, decode_video, describe_square, find_videos, fit_square, read_rows
from data_pipeline.schema import Split
from data_pipeline.shard.tar import KEY_RULE, is_valid_key
from data_pipeline.sources.base import Listing, SourceClip
from data_pipeline.sources.labels import DEFAULT_PARTITION, Labels

HELD_OUT = 0.1
"""Share of the videos that is held out where nothing else is asked for."""


@dataclass(frozen=True)
class InputClip:
    """A clip to encode.

    Attributes:
        key: Unique name.
        partition: Group that views select by.
        split: train or heldout.
        frames: Pixel frames, or None if they are only known once it is decoded.
        where: Its file.
        problem: Why it cannot be encoded, or None.
    """

    key: str
    partition: str
    split: Split
    frames: int | None
    where: Path
    problem: str | None = None


@dataclass(frozen=True)
class LoadedClip:
    """The content of a clip.

    Attributes:
        frames: u8 `[P, H, W, 3]`, P at least 1.
        rows: f32 `[rows, numbers]` by field, with actions.
        taken: i64 `[P]`, which recorded frame each is.
        recorded: Frames of the recording, or None if its end was not seen.
        sha256: Of the files, where the folder has no digest of its own; else empty.
    """

    frames: NDArray[np.uint8]
    rows: Mapping[str, Rows]
    taken: NDArray[np.int64]
    recorded: int | None
    sha256: str


class Input(Protocol):
    """A folder of clips."""

    kind: str
    """pixels or videos."""

    clips: Sequence[InputClip]
    """In the order in which they are encoded."""

    stamp: str
    """Changes whenever the folder does."""

    steps: tuple[str, ...]
    """What is done to frames before they are brought to a square, as text."""

    def digest(self, sources: Mapping[str, str]) -> str:
        """Return the digest of the content, from `LoadedClip.sha256` of the encoded clips by key, in order."""
        ...

    def load(self, clip: InputClip, side: int | None) -> LoadedClip:
        """Return a clip, its frames brought to a square of some side, or as they are.

        Raises:
            DataError: Its file is missing or damaged; the file is named.
        """
        ...


def open_input(folder: Path, *, frames: int | None, fps: float | None, heldout: float | None) -> Input:
    """Return the clips of a folder.

    Args:
        folder: With `pixels.json`, or with videos.
        frames: Pixel frames to take of each video, or None for all.
        fps: Frames a second to thin videos to, or None for all.
        heldout: Share of each partition's videos that is held out; None takes `HELD_OUT`.

    Raises:
        DataError: Neither kind of folder, or settings of videos for a folder of pixels.
    """
    if (folder / PIXELS_FILE).is_file():
        given = {"frames": frames, "fps": fps, "heldout": heldout}
        rule = f"is for videos, and {folder} has pixels"
        problems = [Problem(name, value, rule, "leave it out") for name, value in given.items() if value is not None]
        if problems:
            raise DataError(problems)
        return _Pixels(folder)
    videos = find_videos(folder) if folder.is_dir() else []
    if videos:
        return _Videos(folder, videos, frames, fps, HELD_OUT if heldout is None else heldout)
    if folder.is_dir():
        rule = f"the folder has no {PIXELS_FILE}, so it is not complete, and it has no videos with actions either"
        fix = "make it with `hopescale data simulate`, or put KEY.mp4 and KEY.actions.npy there"
        raise DataError(Problem("pixels", folder, rule, fix))
    rule = "the folder does not exist"
    raise DataError(Problem("pixels", folder, rule, "make it with `hopescale data simulate`, or name one of videos"))


class _Pixels:
    kind = "pixels"
    steps: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        document = read_pixels_folder(folder)
        self.stamp: str = document.digest
        self._clips = {clip.key: clip for clip in document.clips}
        self.clips: Sequence[InputClip] = [
            InputClip(clip.key, clip.partition, clip.split, clip.length, clip.path) for clip in document.clips
        ]

    def digest(self, sources: Mapping[str, str]) -> str:
        return self.stamp

    def load(self, clip: InputClip, side: int | None) -> LoadedClip:
        frames, rows = read_clip(self._clips[clip.key])
        if side is not None:
            frames = np.stack([fit_square(frame, side) for frame in frames])
        return LoadedClip(frames, rows, np.arange(len(frames)), len(frames), "")


class _Videos:
    kind = "videos"

    def __init__(
        self, folder: Path, videos: Sequence[Video], frames: int | None, fps: float | None, heldout: float
    ) -> None:
        self._videos = {video.key: video for video in videos}
        self._frames, self._fps = frames, None if fps is None else float(fps)
        self.clips: Sequence[InputClip] = _video_clips(folder, videos, frames, heldout)
        self.stamp = hashlib.sha256("".join(_stamp_lines(folder, videos)).encode()).hexdigest()
        chosen = [] if fps is None else [f"the frame nearest to n / {float(fps)!r} s"]
        chosen += [] if frames is None else [f"the first {frames}"]
        self.steps = ("rgb24 frames by FFmpeg", *chosen)

    def digest(self, sources: Mapping[str, str]) -> str:
        return hashlib.sha256("".join(f"{key} {sha256}\n" for key, sha256 in sources.items()).encode()).hexdigest()

    def load(self, clip: InputClip, side: int | None) -> LoadedClip:
        video = self._videos[clip.key]
        if video.path is None or clip.problem is not None:
            raise DataError(clip_problem(clip))
        content = hashlib.sha256()
        for path in (video.path, *(video.rows[field] for field in sorted(video.rows))):
            try:
                with path.open("rb") as file:
                    content.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise DataError(Problem("video", path, f"it cannot be read ({error})", "copy it again")) from error
        rows = {field: read_rows(path) for field, path in video.rows.items()}
        decoded = decode_video(video.path, frames=self._frames, fps=self._fps, side=side)
        return LoadedClip(decoded.frames, rows, decoded.taken, decoded.total, content.hexdigest())


def clip_problem(clip: InputClip) -> Problem:
    """Return the problem of a clip that has one."""
    fix = "add what is missing, or leave such clips out with on_error=skip"
    return Problem("video", clip.where, clip.problem or "", fix)


def describe_steps(source: Input, side: int | None, encoder: str) -> str:
    """Return everything that is done to pixels before the network, in order, as recorded."""
    square = () if side is None else (describe_square(side),)
    return "; ".join((*source.steps, *square, encoder))


def _video_clips(folder: Path, videos: Sequence[Video], frames: int | None, heldout: float) -> list[InputClip]:
    listed = [SourceClip(video.key, _partition(video.key), None, {}, "", video.key) for video in videos]
    if heldout > 0:
        listed = Labels(heldout=heldout).apply(Listing(listed)).clips
    return [
        InputClip(
            clip.key,
            clip.partition,
            clip.split or "train",
            frames,
            video.path or next(iter(video.rows.values())),
            video.problem if is_valid_key(clip.key) else f"a key must have {KEY_RULE}, and {clip.key} has not",
        )
        for clip, video in zip(listed, videos, strict=True)
    ]


def _partition(key: str) -> str:
    return key.split("/")[0] if "/" in key else DEFAULT_PARTITION


def _stamp_lines(folder: Path, videos: Sequence[Video]) -> list[str]:
    paths = [path for video in videos for path in (video.path, *video.rows.values()) if path is not None]
    lines = []
    for path in sorted(paths):
        status = path.stat()
        lines.append(f"{path.relative_to(folder).as_posix()} {status.st_size} {status.st_mtime_ns}\n")
    return lines
