from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.pixels.video import decode_video, find_videos, fit_square, read_rows
from tests.unit.data_pipeline.encode.small_inputs import random_frames, write_video

pytestmark = pytest.mark.requires("encode")

FASTSTART = {"movflags": "faststart"}
FRAMES = random_frames(7, 16, 48, 64)


def test_lossless_frames_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", FRAMES)
    decoded = decode_video(path)
    np.testing.assert_array_equal(decoded.frames, FRAMES)
    assert decoded.taken.tolist() == list(range(16))
    assert decoded.total == 16
    first = decode_video(path, frames=5)
    np.testing.assert_array_equal(first.frames, FRAMES[:5])
    assert first.total is None


@pytest.mark.parametrize("fps", [4.0, 7.5, 11.0, 25.0, 30.0])
def test_thinning_takes_the_frame_nearest_to_each_time(tmp_path: Path, fps: float) -> None:
    decoded = decode_video(write_video(tmp_path / "a.mp4", FRAMES, rate=25, codec="mpeg4"), fps=fps)
    times = np.arange(16) / 25
    wanted = np.arange(0, times[-1] + 0.5 / 25 + 1e-9, 1 / fps)
    distances = np.abs(times[None] - wanted[:, None])
    assert len(decoded.taken) == len(wanted)
    np.testing.assert_allclose(distances[np.arange(len(wanted)), decoded.taken], distances.min(1), atol=1e-9)
    assert decoded.taken[0] == 0


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {}),
        ("a.mp4", "libx264", FASTSTART),
        ("a.mp4", "mpeg4", FASTSTART),
        ("a.mkv", "libx264", {}),
        ("a.webm", "libvpx", {}),
        ("a.avi", "mpeg4", {}),
    ],
)
def test_truncated_videos_are_refused_wherever_they_end(tmp_path: Path, name: str, codec: str, options: dict) -> None:
    path = write_video(tmp_path / name, FRAMES, codec=codec, options=options)
    content = path.read_bytes()
    assert len(decode_video(path).frames) == 16
    for size in np.linspace(20, len(content) - 1, 25).astype(int):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match=name):
            decode_video(path)


def test_damaged_empty_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", FRAMES, codec="libx264", options=FASTSTART)
    content = bytearray(path.read_bytes())
    middle = len(content) * 2 // 3
    content[middle : middle + 200] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.mp4"):
        decode_video(path)
    for bad in (b"", b"not a video\n" * 50):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"a\.mp4.*cannot be decoded"):
            decode_video(path)


def test_too_short_a_video_says_how_long_it_is(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", FRAMES)
    with pytest.raises(DataError, match="it has 16 frames, and 17 are asked for"):
        decode_video(path, frames=17)
    with pytest.raises(DataError, match="it has 3 frames at 4 frames a second, and 9 are asked for"):
        decode_video(path, frames=9, fps=4.0)


def test_frames_are_turned_as_they_are_to_be_shown(tmp_path: Path) -> None:
    upright = decode_video(write_video(tmp_path / "a.mp4", FRAMES[:2], codec="mpeg4")).frames
    turned = decode_video(write_video(tmp_path / "b.mp4", FRAMES[:2], codec="mpeg4", rotation=90)).frames
    np.testing.assert_array_equal(turned, np.rot90(upright, axes=(1, 2)))
    oblique = write_video(tmp_path / "c.mp4", FRAMES[:2], codec="mpeg4", rotation=30)
    with pytest.raises(DataError, match="degrees, not by quarters of a turn"):
        decode_video(oblique)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24))
def test_squares_have_their_size_and_keep_a_plain_colour(height: int, width: int, side: int) -> None:
    plain = np.full((height, width, 3), (9, 100, 255), np.uint8)
    square = fit_square(plain, side)
    assert square.shape == (side, side, 3)
    assert (square == (9, 100, 255)).all()


def test_a_square_is_the_middle_of_the_resized_frame() -> None:
    frame = random_frames(0, 1, 64, 90)[0]
    np.testing.assert_array_equal(fit_square(frame, 64), frame[:, 13:77])
    assert fit_square(frame[:, :64], 64).tolist() == frame[:, :64].tolist()
    # 90 * 32 / 64 = 45 columns, of which those from (45 - 32) // 2 = 6 on are kept.
    x = torch.from_numpy(frame.copy()).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(x, (32, 45), mode="bilinear", antialias=True, align_corners=False)
    expected = resized[0, :, :, 6:38].permute(1, 2, 0).numpy()
    assert np.abs(fit_square(frame, 32) - expected).max() <= 1


def test_videos_are_found_with_what_lies_beside_them(tmp_path: Path) -> None:
    for name in ("b/two.mp4", "one.odd", "b/.hidden.mp4", "notes.txt", "c/lost.webm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("b/two.actions", "b/two.states", "one.actions", "three.actions", "three.extrinsics"):
        np.save(tmp_path / f"{name}.npy", np.zeros((2, 2)))
    found = {video.key: video for video in find_videos(tmp_path)}
    assert list(found) == ["b/two", "c/lost", "one", "three"]
    assert (found["b/two"].path, found["b/two"].problem) == (tmp_path / "b/two.mp4", None)
    assert sorted(found["b/two"].rows) == ["actions", "states"]
    assert (found["one"].path, found["one"].problem) == (tmp_path / "one.odd", None)
    assert "there is no lost.actions.npy" in str(found["c/lost"].problem)
    assert "no video beside three.actions.npy" in str(found["three"].problem)


@pytest.mark.parametrize(
    "content", [np.zeros(3), np.zeros((0, 2)), np.full((2, 2), np.nan), np.array([["a"]]), np.zeros((2, 2), complex)]
)
def test_rows_must_be_finite_numbers_of_two_axes(tmp_path: Path, content: np.ndarray) -> None:
    np.save(tmp_path / "a.actions.npy", content)
    with pytest.raises(DataError, match=r"a\.actions\.npy"):
        read_rows(tmp_path / "a.actions.npy")


def test_truncated_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.actions.npy"
    np.save(path, np.arange(8).reshape(4, 2))
    rows = read_rows(path)
    assert rows.dtype == np.float32
    assert rows.tolist() == np.arange(8).reshape(4, 2).tolist()
    content = path.read_bytes()
    for size in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match="cannot be read"):
            read_rows(path)
