from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.encode.run import encode
from data_pipeline.errors import DataError
from tests.unit.data_pipeline.encode.small_inputs import (
    ENCODED,
    PATCH_MEANS,
    PatchMeans,
    contents,
    features_of,
    random_frames,
    write_pixels,
    write_recording,
    write_video,
)

HERE = PATCH_MEANS.split(":")[0]
FRAMES = random_frames(3, 8)


class _Crooked(PatchMeans):
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        return super().encode(frames)[:, :, :-1]


class _Loud(PatchMeans):
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        return super().encode(frames) * 1e6


class _NotANumber(PatchMeans):
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        return super().encode(frames) * torch.nan


def make_crooked(*, weights: str | None, device: str) -> _Crooked:
    return _Crooked(1)


def make_loud(*, weights: str | None, device: str) -> _Loud:
    return _Loud(1)


def make_not_a_number(*, weights: str | None, device: str) -> _NotANumber:
    return _NotANumber(1)


def make_incomplete(*, weights: str | None, device: str) -> object:
    return object()


def make_per_frame_only(*, weights: str | None, device: str) -> PatchMeans:
    encoder = PatchMeans(2)
    encoder.modes = ("per-frame",)
    return encoder


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pixels(tmp_path_factory.mktemp("pixels") / "p", [6, 9, 6])


def _means(frames: np.ndarray) -> np.ndarray:
    """`PatchMeans` of a tubelet that sees exactly these frames, and as last step of them: [N, 3] of the last two."""
    patches = frames.reshape(len(frames), 4, 8, 4, 8, 3).mean((2, 4)) / 255
    return patches[-2:].mean(0).reshape(-1, 3) + patches.mean((0, 1, 2))


def test_own_encoders_see_the_frames_of_each_mode_whatever_the_batch(pixels: Path, tmp_path: Path) -> None:
    frames = random_frames(1, 9)
    expected = {
        "per-frame": [_means(frame[None].repeat(2, 0)) for frame in frames],
        "prefix": [_means(frames[:end]) for end in (2, 4, 6, 8)],
        "clip": [_means(frames[:8]) - _means(frames[:8]) + _step(frames, step) for step in range(4)],
    }
    for mode, features in expected.items():
        for batch in (1, 4, 64):
            out = tmp_path / f"{mode}-{batch}"
            document = encode(
                pixels, out, encoder=PATCH_MEANS, weights="2", mode=mode, batch_frames=batch, dtype="float32"
            )
            np.testing.assert_allclose(features_of(out, "clip_1")["features"], np.stack(features), atol=1e-5)
        assert (document["encoder"], document["encoder_version"]) == ("patch-means", 3)
        assert document["pixel_frames_per_step"] == (1 if mode == "per-frame" else 2)
        assert [clip["length"] for clip in document["clips"]] == ([6, 9, 6] if mode == "per-frame" else [3, 4, 3])


def _step(frames: np.ndarray, step: int) -> np.ndarray:
    """Step of a clip that is encoded at once; its ninth frame fills no tubelet."""
    patches = frames[:8].reshape(8, 4, 8, 4, 8, 3).mean((2, 4)) / 255
    return patches[2 * step : 2 * step + 2].mean(0).reshape(-1, 3) + patches.mean((0, 1, 2))


def test_the_clip_mode_warns_that_it_leaks(
    pixels: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Training elsewhere in this process may have taken over what this logger sends on.
    monkeypatch.setattr(logging.getLogger("data_pipeline"), "propagate", True)
    for mode, warned in (("prefix", False), ("clip", True)):
        caplog.clear()
        encode(pixels, tmp_path / mode, encoder=PATCH_MEANS, weights="2", mode=mode)
        assert ("allow_leaky_features=true" in caplog.text) == warned


@pytest.mark.parametrize(("dtype", "stored"), [("float16", "f2"), ("float32", "f4"), ("bfloat16", "u2")])
def test_features_are_stored_as_asked(pixels: Path, tmp_path: Path, dtype: str, stored: str) -> None:
    document = encode(pixels, tmp_path / "out", encoder=PATCH_MEANS, dtype=dtype)
    assert document["dtype"] == dtype
    features = features_of(tmp_path / "out", "clip_0")["features"]
    assert features.dtype == np.dtype(stored)
    tensor = torch.from_numpy(features.view(np.int16)).view(torch.bfloat16) if stored == "u2" else features
    expected = np.stack([_means(frame[None].repeat(2, 0)) for frame in random_frames(0, 6)])
    np.testing.assert_allclose(np.asarray(torch.as_tensor(tensor).float()), expected, rtol=1e-2)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"encoder": "vjepa"}, "did you mean vjepa2?"),
        ({"encoder": "vjepa2", "weights": "x", "mode": "prefixes"}, "did you mean prefix?"),
        ({"encoder": "efficientnet-lite0", "weights": "some"}, "brings its own weights"),
        ({"encoder": "nowhere_to_be_found:make"}, "cannot be imported"),
        ({"encoder": f"{HERE}:make_patch_mean"}, "did you mean make_patch_means?"),
        ({"encoder": f"{__name__}:make_incomplete"}, "returned object without name, version"),
        ({"encoder": f"{__name__}:make_per_frame_only", "mode": "clip"}, "does not offer this encode mode"),
        ({"encoder": f"{__name__}:make_crooked"}, "not [4, 1, 16, 3]"),
        ({"encoder": f"{__name__}:make_loud"}, "larger than float16 can hold"),
        ({"encoder": f"{__name__}:make_not_a_number"}, "some features are not finite"),
        ({"dtype": "fp16"}, "did you mean float16?"),
        ({"device": "gpu"}, "unknown device"),
        ({"device": "cuda:77"}, "CUDA devices here"),
        ({"on_error": "skp"}, "did you mean skip?"),
        ({"alignment": "pairmean"}, "did you mean pair-mean?"),
        ({"part": (4, 4)}, "index from 0 to count - 1"),
        ({"fps": 4.0}, "is for videos"),
        ({"fps": 0.0}, "must be a positive number"),
        ({"frames": 8, "heldout": 0.2}, "heldout=0.2: is for videos"),
        ({"size": 20}, "for patch-means H and W must be multiples of 8"),
    ],
)
def test_wrong_settings_name_field_rule_and_fix(pixels: Path, tmp_path: Path, settings: dict, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        encode(pixels, tmp_path / "out", **{"encoder": PATCH_MEANS, "batch_frames": 4, **settings})
    assert expected in str(caught.value)
    assert not (tmp_path / "out/features.json").exists()


def test_frames_of_two_sizes_are_refused_unless_resized(tmp_path: Path) -> None:
    folder = write_pixels(tmp_path / "pixels", [3, 3], clip_1=random_frames(0, 3, 64, 48))
    for batch in (2, 16):
        with pytest.raises(DataError, match=r"same size, and these are \[64, 48\]"):
            encode(folder, tmp_path / f"bad-{batch}", encoder=PATCH_MEANS, batch_frames=batch)
    document = encode(folder, tmp_path / "good", encoder=PATCH_MEANS, size=16)
    assert document["grid"] == [2, 2]
    assert document["preprocessing"].startswith("shorter side s to 16")


def test_progress_counts_frames_and_goes_on_where_it_was(pixels: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    encode(pixels, tmp_path / "out", encoder=PATCH_MEANS, progress=lambda *at: seen.append(at))
    assert seen == [(15, 21), (21, 21)]


@pytest.mark.requires("encode")
def test_videos_become_clips_with_partitions_and_splits(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    for index in range(5):
        write_recording(folder / "ice", f"clip_{index}", random_frames(index, 8), actions=8, states=8, extrinsics=8)
    write_recording(folder, "alone", FRAMES, actions=7, states=8, extrinsics=7)
    document = encode(folder, tmp_path / "out", encoder=PATCH_MEANS, weights="2", mode="clip", heldout=0.4)
    clips = {clip["key"]: clip for clip in document["clips"]}
    assert list(clips) == sorted(clips) == ["alone", *(f"ice/clip_{index}" for index in range(5))]
    assert [clip["partition"] for clip in clips.values()] == ["all", *["ice"] * 5]
    assert [clip["split"] for clip in clips.values()].count("heldout") == 2
    assert (document["source"], document["action_alignment"]) == ("videos", "pair-mean")
    assert document["preprocessing"] == "rgb24 frames by FFmpeg; x / 255"
    stored = features_of(tmp_path / "out", "alone")
    np.testing.assert_allclose(stored["features"][3], _step(FRAMES, 3), rtol=2e-3)
    assert stored["actions"][:, 0].tolist() == list(range(7))
    assert stored["states"][:, 0].tolist() == [0, 2, 4, 6]
    assert stored["extrinsics"][:, 0].tolist() == [0, 2, 4]
    assert (tmp_path / "out/ice/ice/clip_0.npz").is_file()


@pytest.mark.requires("encode")
def test_thinned_and_cut_videos_say_so(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    write_recording(folder, "a", FRAMES, actions=3, states=8)
    write_recording(folder, "b", FRAMES, actions=2, states=3)
    document = encode(folder, tmp_path / "out", encoder=PATCH_MEANS, fps=10.0, frames=3, size=16, dtype="float32")
    assert document["action_alignment"] == "first"
    assert document["preprocessing"].startswith(
        "rgb24 frames by FFmpeg; the frame nearest to n / 10.0 s; the first 3; shorter side s to 16"
    )
    assert [clip["length"] for clip in document["clips"]] == [3, 3]
    assert features_of(tmp_path / "out", "a")["states"][:, 0].tolist() == [0, 3, 6]


@pytest.mark.requires("encode")
def test_bad_videos_are_named_before_anything_is_encoded_or_skipped_with_a_reason(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    write_recording(folder, "good", FRAMES, actions=7)
    cut = write_recording(folder, "cut", FRAMES, actions=7)
    cut.write_bytes(cut.read_bytes()[:-50])
    few = write_recording(folder, "few", FRAMES, actions=2)
    write_video(folder / "silent.mkv", FRAMES)
    np.save(folder / "blind.actions.npy", np.zeros((7, 2)))
    write_recording(folder, "dotted.name", FRAMES, actions=7)
    ENCODED.clear()
    with pytest.raises(DataError) as caught:
        encode(folder, tmp_path / "raised", encoder=PATCH_MEANS)
    assert all(name in str(caught.value) for name in ("silent.actions.npy", "blind.actions.npy", "dotted.name"))
    assert ENCODED == []
    document = encode(folder, tmp_path / "skipped", encoder=PATCH_MEANS, on_error="skip")
    assert [clip["key"] for clip in document["clips"]] == ["good"]
    reasons = {clip["key"]: clip["reason"] for clip in document["skipped"]}
    assert sorted(reasons) == ["blind", "cut", "dotted.name", "few", "silent"]
    assert str(cut) in reasons["cut"]
    assert "truncated" in reasons["cut"]
    assert str(few) in reasons["few"]
    assert "2 actions for 8 stored frames, not 7 or 8" in reasons["few"]


@pytest.mark.requires("encode")
def test_a_folder_of_bad_videos_alone_is_refused(tmp_path: Path) -> None:
    write_video(tmp_path / "videos/silent.mkv", FRAMES)
    with pytest.raises(DataError, match=r"no clip is left, 1 were skipped; the first: .*silent\.actions\.npy"):
        encode(tmp_path / "videos", tmp_path / "out", encoder=PATCH_MEANS, on_error="skip")


@pytest.mark.requires("encode")
def test_clips_that_differ_in_how_their_actions_were_recorded_are_named(tmp_path: Path) -> None:
    write_recording(tmp_path / "videos", "a", FRAMES, actions=7)
    write_recording(tmp_path / "videos", "b", FRAMES, actions=3)
    with pytest.raises(DataError, match="actions=b: clips need different rules: as-is, pair-mean"):
        encode(tmp_path / "videos", tmp_path / "out", encoder=PATCH_MEANS, weights="2", mode="prefix")


@pytest.mark.requires("encode")
def test_changed_videos_are_not_mixed_with_old_features(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    for key in ("a", "b"):
        write_recording(folder, key, FRAMES, actions=7)
    encode(folder, tmp_path / "out", encoder=PATCH_MEANS, part=(0, 2))
    before = contents(tmp_path / "out")
    write_recording(folder, "a", 255 - FRAMES, actions=7)
    with pytest.raises(DataError, match=r"input=.*the clips have changed since"):
        encode(folder, tmp_path / "out", encoder=PATCH_MEANS, part=(1, 2))
    assert contents(tmp_path / "out") == before


@pytest.mark.requires("encode")
def test_the_digest_of_videos_is_that_of_their_content(tmp_path: Path) -> None:
    digests = []
    write_recording(tmp_path / "one", "a", FRAMES, actions=7)
    shutil.copytree(tmp_path / "one", tmp_path / "same")
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    np.save(tmp_path / "other/a.actions.npy", np.ones((7, 2)))
    for name in ("one", "same", "other"):
        digests.append(encode(tmp_path / name, tmp_path / f"out-{name}", encoder=PATCH_MEANS)["pixels_digest"])
    assert digests[0] == digests[1] != digests[2]
