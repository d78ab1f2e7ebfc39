"""Frames of video files: found beside their recorded actions, decoded by PyAV, thinned, cut to a square.

Everything is exact and repeatable: frames are chosen by rational time stamps, and resized in integers by Pillow.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError, Problem, missing_extra
from data_pipeline.schema import ROW_FIELDS
from data_pipeline.sources.npy_file import read_npy
from data_pipeline.sources.stored import reason

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

VIDEO_SUFFIXES = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")
"""Files that are taken for videos even when no actions lie beside them, so that missing actions are named."""

_MP4_BOXES = (
    b"ftyp",
    b"free",
    b"mdat",
    b"meta",
    b"mfra",
    b"moof",
    b"moov",
    b"sidx",
    b"skip",
    b"styp",
    b"uuid",
    b"wide",
)
MAX_DECODED = 4 << 30
"""Bytes of frames that one video may become in memory."""

_EBML, _SEGMENT = bytes.fromhex("1a45dfa3"), bytes.fromhex("18538067")


@dataclass(frozen=True)
class Video:
    """A video file and what was recorded with it.

    Attributes:
        key: Path below the folder without suffix.
        path: The video, or None where only its rows were found.
        rows: Paths of the recorded rows, by field.
        problem: Why it cannot be used, or None.
    """

    key: str
    path: Path | None
    rows: Mapping[str, Path]
    problem: str | None = None


@dataclass(frozen=True)
class Decoded:
    """Frames taken from a video.

    Attributes:
        frames: u8 `[F, H, W, 3]`.
        taken: i64 `[F]`, which of the video's frames they are.
        total: Frames of the video, or None if it was not read to its end.
    """

    frames: NDArray[np.uint8]
    taken: NDArray[np.int64]
    total: int | None


def find_videos(folder: Path) -> list[Video]:
    """Return every video below a folder, sorted by key: `KEY.mp4`, `KEY.actions.npy`, optionally states and extrinsics.

    Hidden files are left out. A file counts as a video by its suffix, or because there are rows of the same name.
    """
    videos: dict[str, list[Path]] = {}
    rows: dict[str, dict[str, Path]] = {}
    others: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts) or not path.is_file():
            continue
        field = next((field for field in ROW_FIELDS if path.name.endswith(f".{field}.npy")), None)
        if field is not None:
            rows.setdefault(relative.as_posix().removesuffix(f".{field}.npy"), {})[field] = path
        elif path.suffix.lower() in VIDEO_SUFFIXES:
            videos.setdefault(relative.with_suffix("").as_posix(), []).append(path)
        elif path.suffix != ".npy":
            others.setdefault(relative.with_suffix("").as_posix(), []).append(path)
    keys = sorted({*videos, *rows})
    return [_video(key, videos.get(key) or others.get(key, []), rows.get(key, {})) for key in keys]


def _video(key: str, paths: list[Path], rows: dict[str, Path]) -> Video:
    if not paths:
        return Video(key, None, rows, f"there is no video beside {', '.join(path.name for path in rows.values())}")
    if len(paths) > 1:
        return Video(key, paths[0], rows, f"several videos have this key: {', '.join(path.name for path in paths)}")
    if "actions" not in rows:
        return Video(key, paths[0], rows, f"there is no {Path(key).name}.actions.npy beside it")
    return Video(key, paths[0], rows)


def decode_video(
    path: Path, *, frames: int | None = None, fps: float | None = None, side: int | None = None
) -> Decoded:
    """Decode a video.

    Args:
        path: File of any container and codec that FFmpeg reads.
        frames: Take so many, the first ones; None takes all.
        fps: Take for each time n / fps, counted from the first frame, the frame nearest to it, of two equally near ones
            the earlier; None takes every frame. A frame may be the nearest to two times in a row, not to more.
        side: Pixels of the square they are brought to (`fit_square`); None leaves them as they are.

    Raises:
        DataError: The file is not a video, damaged, truncated, too short, has gaps, or becomes more than `MAX_DECODED`
            bytes of frames; the file is named.
        MissingExtra: PyAV, or Pillow for `side`, is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise missing_extra("av", "encode", "decoding videos") from error
    _check_whole(path)
    # Strict decoding: a decoder that patches a damaged picture up would hand on what was never filmed.
    strict = {"err_detect": "explode"}
    try:
        with av.open(str(path.absolute()), options={**strict, "protocol_whitelist": "file"}) as container:
            stream = next(iter(container.streams.video), None)
            if stream is None:
                raise _bad_video(path, "it holds no video stream")
            stream.codec_context.options = strict
            # Clips are decoded side by side; more threads for each would only get in their way.
            stream.codec_context.thread_count = 1
            return _take(path, container, stream, frames, fps, side)
    except (av.FFmpegError, OSError) as error:
        raise _bad_video(path, f"it cannot be decoded ({type(error).__name__}: {error})") from error


def _check_whole(path: Path) -> None:
    """Compare a file's length with what its outermost boxes say: MP4 and MOV, Matroska and WebM, AVI.

    A decoder does not miss what was cut off at the end of a packet. Other containers cannot tell.

    Raises:
        DataError: The file is shorter, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            start = file.read(12)
            if start[4:8] in _MP4_BOXES:
                end = _last_end(file, length, _mp4_box)
            elif start[:4] == b"RIFF":
                end = _last_end(file, length, _riff_chunk)
            elif start[:4] == _EBML:
                end = _matroska_end(file)
            else:
                return
    except OSError as error:
        raise _bad_video(path, f"it cannot be read ({error})") from error
    if end > length:
        raise _bad_video(path, f"it has {length} of {end} bytes, so it is truncated")


def _last_end(file: BinaryIO, length: int, box_size: Callable[[bytes], int]) -> int:
    """Return where the last of a row of boxes ends; a size of 0 means the end of the file."""
    at = 0
    while at + 8 <= length:
        file.seek(at)
        size = box_size(file.read(16))
        if size < 8:
            return length
        at += size
    return at


def _mp4_box(head: bytes) -> int:
    size = int.from_bytes(head[:4], "big")
    if head[4:8] not in _MP4_BOXES:
        # Some cameras append notes of their own.
        return 0
    return int.from_bytes(head[8:16], "big") if size == 1 else size


def _riff_chunk(head: bytes) -> int:
    size = int.from_bytes(head[4:8], "little")
    return 8 + size + size % 2 if head[:4] == b"RIFF" and size else 0


def _matroska_end(file: BinaryIO) -> int:
    """Return where the segment after the EBML header ends, 0 if that is not recorded."""
    file.seek(4)
    header, _ = _ebml_size(file)
    file.seek(header, os.SEEK_CUR)
    if file.read(4) != _SEGMENT:
        return 0
    size, known = _ebml_size(file)
    return file.tell() + size if known else 0


def _ebml_size(file: BinaryIO) -> tuple[int, bool]:
    """Read a size and whether it is known: its first bit set tells how many bytes it has, all others set none."""
    first = file.read(1)
    width = 9 - first[0].bit_length() if first else 9
    if width > 8:
        return 0, False
    value = int.from_bytes(first + file.read(width - 1), "big") & ((1 << 7 * width) - 1)
    return value, value != (1 << 7 * width) - 1


def _take(
    path: Path,
    container: InputContainer,
    stream: av.VideoStream,
    frames: int | None,
    fps: float | None,
    side: int | None,
) -> Decoded:
    pictures: list[NDArray[np.uint8]] = []
    taken: list[int] = []
    clock = _Clock(path)
    chosen = _every(clock, container.decode(stream)) if fps is None else _nearest(clock, container.decode(stream), fps)
    nbytes = 0
    for index, frame in chosen:
        if taken[-2:] == [index, index]:
            rule = f"fps={fps:g} would take frame {index} three times: the recording is slower, or has a gap there"
            raise DataError(Problem("video", path, rule, "lower fps, or leave the video out with on_error=skip"))
        if taken and taken[-1] == index:
            pictures.append(pictures[-1])
        else:
            pictures.append(_picture(path, frame, side))
        taken.append(index)
        nbytes += pictures[-1].nbytes
        if nbytes > MAX_DECODED:
            rule = f"its first {len(taken)} frames have {nbytes} bytes, more than {MAX_DECODED}"
            raise DataError(Problem("video", path, rule, "set frames, fps or size, or cut it into clips"))
        if len(taken) == frames:
            break
    else:
        if frames is not None or not pictures:
            at = "" if fps is None else f" at {fps:g} frames a second"
            raise _bad_video(path, f"it has {len(pictures)} frames{at}, and {frames or 'some'} are asked for")
        return _decoded(path, pictures, taken, clock.count)
    return _decoded(path, pictures, taken, None)


def _decoded(path: Path, pictures: list[NDArray[np.uint8]], taken: list[int], total: int | None) -> Decoded:
    if len({picture.shape for picture in pictures}) != 1:
        raise _bad_video(path, "its frames change their size")
    return Decoded(np.stack(pictures), np.asarray(taken, np.int64), total)


class _Clock:
    """Follows the time stamps of a video's frames, as exact seconds from the first one."""

    def __init__(self, path: Path) -> None:
        self.count = 0
        self._path = path
        self._first: Fraction | None = None
        self._last = self._before = Fraction(0)

    @property
    def gap(self) -> Fraction:
        """Seconds between the last two frames."""
        return self._last - self._before

    def tick(self, frame: av.VideoFrame, *, needed: bool) -> Fraction | None:
        """Count a frame and return its time; None without a time stamp.

        Raises:
            DataError: The frame is damaged, or its time is needed and not there.
        """
        if frame.is_corrupt:
            raise _bad_video(self._path, f"frame {self.count} is damaged")
        self.count += 1
        if frame.pts is None or frame.time_base is None:
            if needed:
                raise _bad_video(self._path, f"frame {self.count - 1} has no time stamp, which fps needs")
            return None
        time = frame.pts * Fraction(frame.time_base)
        if self._first is None:
            self._first = time
        self._before, self._last = self._last, time - self._first
        return self._last


def _every(clock: _Clock, decoded: Iterator[av.VideoFrame]) -> Iterator[tuple[int, av.VideoFrame]]:
    for frame in decoded:
        clock.tick(frame, needed=False)
        yield clock.count - 1, frame


def _nearest(clock: _Clock, decoded: Iterator[av.VideoFrame], fps: float) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield for each time n / fps the nearest frame; times more than half a frame after the last one have none."""
    step = 1 / Fraction(repr(fps))
    target, before, held = Fraction(0), Fraction(0), None
    for frame in decoded:
        time = clock.tick(frame, needed=True) or Fraction(0)
        while target <= time:
            if held is not None and target - before <= time - target:
                yield clock.count - 2, held
            else:
                yield clock.count - 1, frame
            target += step
        before, held = time, frame
    while held is not None and target <= before + clock.gap / 2:
        yield clock.count - 1, held
        target += step


def _picture(path: Path, frame: av.VideoFrame, side: int | None) -> NDArray[np.uint8]:
    quarters = round(frame.rotation / 90)
    if abs(frame.rotation - 90 * quarters) > 1:
        rule = f"it is to be shown turned by {frame.rotation} degrees, not by quarters of a turn"
        raise _bad_video(path, rule)
    pixels = np.rot90(cast(NDArray[np.uint8], frame.to_ndarray(format="rgb24")), quarters)
    return np.ascontiguousarray(pixels) if side is None else fit_square(pixels, side)


def fit_square(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Resize an image so that its shorter side fits, and cut the middle out of the longer one.

    Args:
        pixels: u8 `[H, W, 3]`.
        side: Pixels of the result's sides.

    Returns:
        u8 `[side, side, 3]`; the input where it has this size already.

    Raises:
        MissingExtra: Pillow is not installed and needed.
    """
    height, width = pixels.shape[:2]
    if height == width == side:
        return np.ascontiguousarray(pixels)
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("PIL", "encode", "resizing frames") from error
    short = min(height, width)
    rows, columns = (_scaled(length, side, short) for length in (height, width))
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if (rows, columns) != (height, width):
        image = image.resize((columns, rows), Image.Resampling.BILINEAR)
    top, left = (rows - side) // 2, (columns - side) // 2
    return np.ascontiguousarray(np.asarray(image)[top : top + side, left : left + side])


def _scaled(length: int, side: int, short: int) -> int:
    return (length * side + short // 2) // short


def describe_square(side: int) -> str:
    """Return what `fit_square` does, as recorded beside features."""
    return (
        f"shorter side s to {side} by Pillow's bilinear filter, longer side l to (l * {side} + s // 2) // s, "
        f"then the middle {side} x {side} from row and column (length - {side}) // 2"
    )


def _bad_video(path: Path, rule: str) -> DataError:
    return DataError(Problem("video", path, rule, "copy or record the file again, or leave it out with on_error=skip"))


def read_rows(path: Path) -> NDArray[np.float32]:
    """Return the rows recorded with a video, f32 `[rows, numbers]`.

    Raises:
        DataError: The file is damaged, or holds something else than finite numbers of two axes.
    """
    fix = "store finite numbers [rows, numbers] with numpy.save"
    try:
        content = read_npy(path)
    except (OSError, ValueError) as error:
        raise DataError(Problem("rows", path, f"the file cannot be read: {reason(error)}", fix)) from error
    if content.dtype.kind not in "fiu" or content.ndim != 2 or not content.size:
        kind = f"{content.dtype} {list(content.shape)}"
        raise DataError(Problem("rows", path, f"it holds {kind}, not numbers [rows, numbers]", fix))
    with np.errstate(over="ignore"):
        rows = content.astype(np.float32)
    if not np.isfinite(rows).all():
        raise DataError(Problem("rows", path, "some numbers are not finite in float32", fix))
    return rows
