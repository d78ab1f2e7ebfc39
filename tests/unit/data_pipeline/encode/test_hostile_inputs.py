from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.encode.run import encode
from data_pipeline.errors import DataError
from data_pipeline.pixels import video
from data_pipeline.pixels.frames import read_frames
from data_pipeline.pixels.simulate import npz_bytes
from tests.unit.data_pipeline.encode.small_inputs import PATCH_MEANS, random_frames, write_pixels, write_video


@pytest.fixture
def pixels(tmp_path: Path) -> Path:
    return write_pixels(tmp_path / "pixels", [4, 4])


def edit(pixels: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((pixels / "pixels.json").read_text())
    change(document)
    (pixels / "pixels.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d["clips"][1].update(key="../../owned"), r"clips\[1\].*'../../owned' has not"),
        (lambda d: d["clips"][1].update(key="/owned"), r"clips\[1\].*'/owned' has not"),
        (lambda d: d["clips"][1].update(partition=".."), r"clips\[1\].*'..' has not"),
        (lambda d: d["clips"][1].update(partition="a/../.."), r"clips\[1\]"),
        (lambda d: d["clips"][1].pop("key"), r"clips\[1\].*key is 'None', not of type str"),
        (lambda d: d["clips"][1].update(length=True), "length is 'True', not of type int"),
        (lambda d: d["clips"][1].update(length=-4), "are not possible"),
        (lambda d: d["clips"][1].update(split="test"), "are not possible"),
        (lambda d: d["clips"][1].update(key="clip_0"), "the key clip_0 is there twice"),
        (lambda d: d.update(clips=[3]), "it is not an object"),
        (lambda d: d.update(clips={}), "it lacks the digest"),
        (lambda d: d.pop("digest"), "it lacks the digest"),
    ],
)
def test_a_document_that_leads_elsewhere_or_lacks_something_is_refused(
    pixels: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], expected: str
) -> None:
    edit(pixels, change)
    for read in (lambda: encode(pixels, tmp_path / "out", encoder=PATCH_MEANS), lambda: read_frames(pixels, ["x"], 2)):
        with pytest.raises(DataError, match=expected):
            read()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pixels"]


def test_clips_are_not_written_through_a_link(pixels: Path, tmp_path: Path) -> None:
    encode(pixels, tmp_path / "out", encoder=PATCH_MEANS, part=(0, 2), batch_frames=4)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    for path in (tmp_path / "out" / "base").iterdir():
        path.unlink()
    (tmp_path / "out" / "base").rmdir()
    (tmp_path / "out" / "base").symlink_to(elsewhere)
    with pytest.raises(DataError, match="it is a link"):
        encode(pixels, tmp_path / "out", encoder=PATCH_MEANS, part=(1, 2), batch_frames=4)
    assert list(elsewhere.iterdir()) == []


def _link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _rows(rows: np.ndarray) -> Callable[[Path], object]:
    frames = random_frames(1, 4)
    return lambda path: path.write_bytes(npz_bytes({"frames": frames, "actions": rows}))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "not a .npz archive, or truncated"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:200] + b"x" + path.read_bytes()[201:]),
            "damaged|truncated|header cannot",
        ),
        (lambda path: path.unlink(), "the file is missing"),
        (_link, "it is a link"),
        (_pipe, "not a regular file"),
        (_rows(np.ones((3, 2), ">f4")), "big-endian"),
        (_rows(np.full((3, 2), 1e300)), "actions are float64"),
        (_rows(np.ones(3, "f4")), "actions are float32"),
    ],
)
def test_a_bad_clip_is_named_and_can_be_left_out(
    pixels: Path, tmp_path: Path, damage: Callable[[Path], object], expected: str
) -> None:
    damage(pixels / "base" / "clip_1.npz")
    with pytest.raises(DataError, match=rf"clip_1\.npz.*({expected})"):
        encode(pixels, tmp_path / "out", encoder=PATCH_MEANS)
    document = encode(pixels, tmp_path / "skipped", encoder=PATCH_MEANS, on_error="skip")
    assert [clip["key"] for clip in document["skipped"]] == ["clip_1"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 2)}, "it is truncated"),
        ({"descr": ">f4", "fortran_order": False, "shape": (2, 2)}, "big-endian"),
    ],
)
def test_recorded_rows_are_read_by_what_their_file_holds(
    tmp_path: Path, content: dict[str, Any], expected: str
) -> None:
    path = tmp_path / "a.actions.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, content)
        file.write(bytes(16))
    with pytest.raises(DataError, match=expected):
        video.read_rows(path)


@pytest.mark.requires("encode")
def test_a_rate_above_the_recordings_does_not_repeat_frames_without_end(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", random_frames(7, 6), rate=10)
    assert video.decode_video(path, fps=20).taken.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    with pytest.raises(DataError, match=r"a\.mkv: fps=35 would take frame 1 three times"):
        video.decode_video(path, fps=35)


@pytest.mark.requires("encode")
def test_a_gap_in_a_recording_is_named_before_it_fills_the_memory(tmp_path: Path) -> None:
    import av

    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("ffv1", rate=30)
        stream.height = stream.width = 32
        stream.pix_fmt = "bgr0"
        for number, picture in enumerate(random_frames(3, 4)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number if number < 2 else 30_000 + number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert len(video.decode_video(path).frames) == 4
    with pytest.raises(DataError, match="or has a gap there"):
        video.decode_video(path, fps=30)


@pytest.mark.requires("encode")
def test_frames_of_a_video_are_bounded_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mkv", random_frames(7, 6))
    monkeypatch.setattr(video, "MAX_DECODED", 5 * 32 * 32 * 3)
    assert len(video.decode_video(path, frames=5).frames) == 5
    with pytest.raises(DataError, match="its first 6 frames have 18432 bytes, more than 15360"):
        video.decode_video(path)
