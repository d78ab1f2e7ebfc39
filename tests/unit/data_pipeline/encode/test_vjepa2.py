from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.encode.run import encode
from data_pipeline.encode.vjepa2 import load_encoder, read_normalisation
from data_pipeline.errors import DataError
from tests.unit.data_pipeline.encode.small_inputs import features_of, random_frames, save_vjepa2, write_pixels

pytestmark = pytest.mark.requires("encode")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vjepa2(tmp_path_factory.mktemp("weights") / "vitl-tiny")


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pixels(tmp_path_factory.mktemp("pixels") / "p", [6, 6, 7])


def _reference(weights: Path, frames: np.ndarray) -> np.ndarray:
    """Tokens [F / 2, N, E] of frames u8 [F, H, W, 3] by the library itself, pixels normalised by its own constants."""
    from transformers import VJEPA2Model
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    model = VJEPA2Model.from_pretrained(weights).eval()
    x = (torch.from_numpy(frames).double() / 255 - torch.tensor(IMAGENET_DEFAULT_MEAN)) / torch.tensor(
        IMAGENET_DEFAULT_STD
    )
    with torch.inference_mode():
        hidden = model(x.float().permute(0, 3, 1, 2)[None], skip_predictor=True).last_hidden_state
    return hidden[0].unflatten(0, (len(frames) // 2, -1)).numpy()


def test_every_mode_is_the_library_on_the_frames_it_may_see(weights: Path, pixels: Path, tmp_path: Path) -> None:
    frames = random_frames(1, 6)
    expected = {
        "per-frame": np.concatenate([_reference(weights, frame[None].repeat(2, 0)) for frame in frames]),
        "prefix": np.stack([_reference(weights, frames[:end])[-1] for end in (2, 4, 6)]),
        "clip": _reference(weights, frames),
    }
    for mode, features in expected.items():
        document = encode(pixels, tmp_path / mode, encoder="vjepa2", weights=str(weights), mode=mode, dtype="float32")
        stored = features_of(tmp_path / mode, "clip_1")
        np.testing.assert_allclose(stored["features"], features, rtol=1e-3, atol=2e-5)
        assert stored["actions"].shape == (5, 2)
        assert document["encode_mode"] == mode
        assert (document["grid"], document["tokens"], document["channels"]) == ([2, 2], 4, 24)
        assert document["action_alignment"] == ("as-is" if mode == "per-frame" else "pair-mean")
        assert [clip["length"] for clip in document["clips"]] == ([6, 6, 7] if mode == "per-frame" else [3, 3, 3])


def test_only_the_clip_mode_sees_later_frames(weights: Path, tmp_path: Path) -> None:
    frames = random_frames(0, 6)
    changed = frames.copy()
    changed[4:] = 255 - changed[4:]
    for name, content in (("before", frames), ("after", changed)):
        folder = write_pixels(tmp_path / name, [6], clip_0=content)
        for mode in ("per-frame", "prefix", "clip"):
            encode(folder, tmp_path / f"{name}-{mode}", encoder="vjepa2", weights=str(weights), mode=mode)
    for mode, unseen in (("per-frame", 4), ("prefix", 2), ("clip", 2)):
        before, after = (features_of(tmp_path / f"{name}-{mode}", "clip_0")["features"] for name in ("before", "after"))
        assert np.array_equal(before[:unseen], after[:unseen]) == (mode != "clip"), mode
        assert not np.array_equal(before[unseen:], after[unseen:])


def test_the_weights_hash_is_that_of_the_file_and_changes_with_it(weights: Path, tmp_path: Path) -> None:
    digest = load_encoder(str(weights), "cpu").weights_sha256
    assert digest == hashlib.sha256((weights / "model.safetensors").read_bytes()).hexdigest()
    other = save_vjepa2(tmp_path / "other", seed=1)
    assert load_encoder(str(other), "cpu").weights_sha256 != digest


def test_weights_in_several_files_and_other_tubelets_load(tmp_path: Path) -> None:
    folder = save_vjepa2(tmp_path / "sharded", tubelet=4, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    encoder = load_encoder(str(folder), "cpu")
    assert len(encoder.weights_sha256) == 64
    assert encoder.encode(torch.zeros(2, 8, 32, 32, 3, dtype=torch.uint8)).shape == (2, 2, 4, 24)


def test_a_saved_processor_decides_over_the_normalisation(weights: Path, tmp_path: Path) -> None:
    usual = read_normalisation(weights)
    assert (usual.mean, usual.std, usual.scale) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1 / 255)
    numbers = {"image_mean": [0.5, 0.5, 0.25], "image_std": [0.5, 1, 2], "rescale_factor": 0.5}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(numbers))
    own = read_normalisation(tmp_path)
    assert (own.mean, own.std, own.scale) == ((0.5, 0.5, 0.25), (0.5, 1, 2), 0.5)
    assert str(own) == "(x * 0.5 - [0.5, 0.5, 0.25]) / [0.5, 1.0, 2.0]"
    (tmp_path / "preprocessor_config.json").unlink()
    nested = {"video_processor": {**numbers, "do_normalize": False}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert str(read_normalisation(tmp_path)) == "(x * 0.5 - [0.0, 0.0, 0.0]) / [1.0, 1.0, 1.0]"
    (tmp_path / "processor_config.json").write_text(json.dumps({**numbers, "image_std": [1, 1, 0]}))
    with pytest.raises(DataError, match=r"processor_config\.json.*not usable"):
        read_normalisation(tmp_path)


def test_unusable_weights_are_named(weights: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(DataError, match="vjepa2 needs weights"):
        load_encoder(None, "cpu")
    with pytest.raises(DataError, match="did you mean vitl-tiny"):
        load_encoder(str(weights.parent / "vitl-tiy"), "cpu")
    with pytest.raises(DataError, match=r"no config\.json"):
        load_encoder(str(tmp_path), "cpu")
    config = json.loads((weights / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    with pytest.raises(DataError, match="of type vit, not vjepa2"):
        load_encoder(str(tmp_path), "cpu")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"no model\.safetensors"):
        load_encoder(str(tmp_path), "cpu")
    tensors = load_file(weights / "model.safetensors")
    name = next(name for name in tensors if name.startswith("encoder."))
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=f"1 tensors of the encoder are missing, e.g. {name}"):
        load_encoder(str(tmp_path), "cpu")
    (tmp_path / "model.safetensors").write_bytes((weights / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(DataError, match="cannot be loaded"):
        load_encoder(str(tmp_path), "cpu")


def test_a_hub_id_is_looked_up_in_the_cache_of_its_library(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--vjepa2-tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(weights)
    found = load_encoder("someone/vjepa2-tiny", "cpu")
    assert found.weights_sha256 == load_encoder(str(weights), "cpu").weights_sha256
    with pytest.raises(DataError, match="did you mean facebook/vjepa2-vitl-fpc64-256"):
        load_encoder("facebook/vjepa2-vitl-fpc64-265", "cpu")


def test_frames_are_brought_to_the_size_of_the_model_and_no_other(weights: Path, tmp_path: Path) -> None:
    folder = write_pixels(tmp_path / "pixels", [3], clip_0=random_frames(0, 3, 48, 64))
    document = encode(folder, tmp_path / "out", encoder="vjepa2", weights=str(weights))
    assert document["grid"] == [2, 2]
    assert "shorter side s to 32" in document["preprocessing"]
    assert (document["weights"], document["precision"]) == ("vitl-tiny", "float32")
    with pytest.raises(DataError, match="take frames of 32 pixels only"):
        encode(folder, tmp_path / "other", encoder="vjepa2", weights=str(weights), size=64)
