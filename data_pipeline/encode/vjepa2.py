"""V-JEPA 2 video encoders in the Hugging Face format (Assran et al., arXiv:2506.09985).

Sizes come from the model's own configuration, so any member of the family will do.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from data_pipeline.errors import DataError, Problem, missing_extra, nearest

if TYPE_CHECKING:
    from transformers import VJEPA2Model

MODES = ("per-frame", "prefix", "clip")
HUB_IDS = (
    "facebook/vjepa2-vitl-fpc64-256",
    "facebook/vjepa2-vith-fpc64-256",
    "facebook/vjepa2-vitg-fpc64-256",
    "facebook/vjepa2-vitg-fpc64-384",
)
"""Published pretrained encoders; others work as well."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PROCESSOR_FILES = ("video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json")
_DOWNLOADED = ["config.json", "*processor_config.json", "*.safetensors", "*.safetensors.index.json"]


@dataclass(frozen=True)
class Normalisation:
    """From u8 pixels to the numbers the network was trained on: `(x * scale - mean) / std` for each colour.

    Attributes:
        scale: Of all pixels.
        mean: Of red, green and blue.
        std: Of red, green and blue.
    """

    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __str__(self) -> str:
        """Return the formula with its numbers."""
        return f"(x * {self.scale!r} - {list(self.mean)}) / {list(self.std)}"


class VJepa2Encoder:
    """A loaded V-JEPA 2 encoder."""

    name = "vjepa2"
    version = 1
    modes: tuple[str, ...] = MODES

    def __init__(self, model: VJEPA2Model, normalisation: Normalisation, weights_sha256: str, device: str) -> None:
        """Take a model in evaluation mode.

        Args:
            model: Only its encoder is used.
            normalisation: Of its pixels.
            weights_sha256: Digest of its weights.
            device: Where it is, and where it runs.
        """
        config: Any = model.config
        self.tubelet: int = config.tubelet_size
        self.channels: int = config.hidden_size
        self.size: int | None = config.crop_size
        self._side: int = config.crop_size
        self.preprocessing = str(normalisation)
        self.weights_sha256 = weights_sha256
        self._patch: int = config.patch_size
        self._model = model
        self._device = torch.device(device)
        self._scale = normalisation.scale
        self._mean = torch.tensor(normalisation.mean, device=device)[:, None, None]
        self._std = torch.tensor(normalisation.std, device=device)[:, None, None]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return patch rows and columns.

        Raises:
            ValueError: Another size than the model's: its positions are counted on a grid of that size only.
        """
        if height != self._side or width != self._side:
            raise ValueError(f"H and W must be {self._side}")
        return self._side // self._patch, self._side // self._patch

    @torch.inference_mode()
    def encode(self, frames: UInt8[Tensor, "B F H W 3"]) -> Float[Tensor, "B F/tubelet N E"]:
        """Encode clips; every step attends to all frames it is given with."""
        pixels = frames.to(self._device).permute(0, 1, 4, 2, 3).float()
        pixels = pixels.mul_(self._scale).sub_(self._mean).div_(self._std)
        tokens = self._model.get_vision_features(pixels)
        return tokens.unflatten(1, (frames.shape[1] // self.tubelet, -1)).float()


def load_encoder(weights: str | None, device: str) -> VJepa2Encoder:
    """Return a V-JEPA 2 encoder, computing in f32.

    Args:
        weights: Folder written by `save_pretrained`, or the id of a repository on the Hugging Face hub, whose
            configuration and safetensors are fetched into that library's cache.
        device: Where it is to run.

    Raises:
        DataError: No such weights, or not all of a V-JEPA 2 encoder.
        MissingExtra: transformers is not installed.
    """
    try:
        from transformers import VJEPA2Model
    except ImportError as error:
        raise missing_extra("transformers", "encode", "the vjepa2 encoder") from error
    folder = _find_folder(weights)
    _check_config(folder)
    files = _weight_files(folder)
    try:
        loaded: Any = VJEPA2Model.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        # The libraries below raise whatever they like on a damaged file.
        raise _bad_weights(folder, f"they cannot be loaded ({type(error).__name__}: {error})") from error
    model, report = loaded
    missing = sorted(name for name in report["missing_keys"] if name.startswith("encoder."))
    if missing:
        raise _bad_weights(folder, f"{len(missing)} tensors of the encoder are missing, e.g. {missing[0]}")
    # Only the encoder is used; the predictor would take up memory.
    model.predictor = torch.nn.Identity()
    model = model.float().to(device).eval().requires_grad_(False)
    return VJepa2Encoder(model, read_normalisation(folder), weights_digest(files), device)


def weights_digest(files: list[Path]) -> str:
    """Return the sha256 of a weights file in hex, or of the lines `NAME SHA256` of several."""
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(files) == 1:
        return digests[0]
    lines = "".join(f"{path.name} {digest}\n" for path, digest in zip(files, digests, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def read_normalisation(folder: Path) -> Normalisation:
    """Return what the processor saved beside a model does to pixel values; without one, ImageNet's numbers.

    Only numbers and switches are read; geometry is the driver's business.

    Raises:
        DataError: The file is damaged.
    """
    path = next((folder / name for name in _PROCESSOR_FILES if (folder / name).is_file()), None)
    if path is None:
        return Normalisation()
    document = _read_json(path)
    settings = document.get("video_processor", document)
    usual = Normalisation()
    scale = settings.get("rescale_factor", usual.scale) if settings.get("do_rescale", True) else 1.0
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if settings.get("do_normalize", True):
        mean, std = settings.get("image_mean", usual.mean), settings.get("image_std", usual.std)
    numbers_fit = all(
        isinstance(colours, list | tuple) and len(colours) == 3 and all(_is_finite(number) for number in colours)
        for colours in (mean, std)
    )
    if not _is_finite(scale) or not numbers_fit or not all(number > 0 for number in std):
        raise _bad_weights(path, f"rescale_factor={scale}, image_mean={mean}, image_std={std} are not usable numbers")
    return Normalisation(float(scale), tuple(map(float, mean)), tuple(map(float, std)))


def _is_finite(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)


def _find_folder(weights: str | None) -> Path:
    if weights is None:
        fix = f"set weights to a folder written by save_pretrained, or to a hub id such as {HUB_IDS[0]}"
        raise DataError(Problem("weights", None, "vjepa2 needs weights", fix))
    folder = Path(weights).expanduser()
    if folder.is_dir():
        return folder
    if _HUB_ID.fullmatch(weights) and not folder.parent.is_dir():
        return _download(weights)
    siblings = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else HUB_IDS
    fix = f"name a folder or a hub id; {nearest(folder.name, siblings)}"
    raise DataError(Problem("weights", weights, "the folder does not exist", fix))


def _download(repository: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise missing_extra("huggingface_hub", "encode", "weights from the Hugging Face hub") from error
    try:
        return Path(snapshot_download(repository, allow_patterns=_DOWNLOADED))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        rule = f"neither a folder nor to be had from the hub ({type(error).__name__}: {reason})"
        raise DataError(Problem("weights", repository, rule, nearest(repository, HUB_IDS))) from error


def _check_config(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise _bad_weights(folder, "there is no config.json, so it is not a saved model")
    config = _read_json(path)
    if config.get("model_type") != "vjepa2":
        raise _bad_weights(path, f"the model is of type {config.get('model_type')}, not vjepa2")
    if config.get("in_chans", 3) != 3 or not isinstance(config.get("patch_size", 16), int):
        raise _bad_weights(path, "the model must read three colours in square patches")


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
    else:
        names = ["model.safetensors"]
    absent = [name for name in names if not (folder / name).is_file()]
    if absent or not names:
        raise _bad_weights(folder, f"there is no {absent[0] if absent else 'weight_map in its index'}")
    return [folder / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _bad_weights(path, f"not readable as JSON ({error})") from error
    if not isinstance(document, dict):
        raise _bad_weights(path, "not a JSON object")
    return document


def _bad_weights(where: Path, rule: str) -> DataError:
    fix = "name a folder that save_pretrained wrote from a VJEPA2Model, or a hub id; .bin files: save as safetensors"
    return DataError(Problem("weights", where, rule, fix))
