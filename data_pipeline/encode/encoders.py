"""Frozen encoders behind one protocol, by name or by the entry point of a callable that makes one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, get_args

from jaxtyping import Float, UInt8
from torch import Tensor

from data_pipeline.encode import lite0, vjepa2
from data_pipeline.errors import DataError, Problem, nearest
from data_pipeline.schema import EncodeMode

MODES = tuple(mode for mode in get_args(EncodeMode) if mode != "unknown")


class Encoder(Protocol):
    """A frozen network from pixels to patch tokens. Calls from several threads at a time must be safe."""

    name: str
    """Recorded with the features."""

    version: int
    """Of the code around the weights: features of another version are not the same."""

    modes: tuple[str, ...]
    """Encode modes it offers."""

    tubelet: int
    """Pixel frames that become one stored frame; 1 for an image network."""

    channels: int
    """Numbers in a token, E."""

    size: int | None
    """Side of the square frames it must be given, or None if any size that `grid` takes will do."""

    preprocessing: str
    """What `encode` does to u8 pixels before the network, with its numbers."""

    weights_sha256: str
    """Hex digest of the weights."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return patch rows and columns of frames of a size; N is their product.

        Raises:
            ValueError: It cannot encode frames of this size. The message is the rule, e.g. "H must be even".
        """
        ...

    def encode(self, frames: UInt8[Tensor, "B F H W 3"]) -> Float[Tensor, "B F/tubelet N E"]:
        """Encode clips of pixel frames, F a multiple of `tubelet`, on the encoder's device.

        Step t may depend on every frame it is given with it: what it is given is the driver's choice, by encode mode.
        Tokens run row by row over the grid and are raw output of the network.
        """
        ...


@dataclass(frozen=True)
class _Kind:
    modes: tuple[str, ...]
    make: Callable[[str | None, str], Encoder]
    """From weights and device."""


_KINDS = {
    "efficientnet-lite0": _Kind(lite0.MODES, lite0.load_encoder),
    "vjepa2": _Kind(vjepa2.MODES, vjepa2.load_encoder),
}
ENCODERS: tuple[str, ...] = tuple(_KINDS)
"""Names of the encoders that come with this package."""

_WANTED = ("name", "version", "modes", "tubelet", "channels", "size", "preprocessing", "weights_sha256")


def check_encoder(encoder: str, mode: str) -> list[Problem]:
    """Return what is wrong with an encoder's name and its mode, before anything is loaded."""
    if ":" in encoder:
        known = MODES
    elif encoder in _KINDS:
        known = _KINDS[encoder].modes
    else:
        rule = "unknown encoder"
        return [Problem("encoder", encoder, rule, f"{nearest(encoder, ENCODERS)}, or module:function of your own")]
    return [] if mode in known else [_mode_problem(encoder, mode, known)]


def make_encoder(encoder: str, weights: str | None, mode: str, device: str) -> Encoder:
    """Return an encoder, ready to run.

    Args:
        encoder: Name out of `ENCODERS`, or `module:function`; the function is called with keywords weights and device
            and returns an `Encoder`.
        weights: Folder or hub id, where the encoder takes one.
        mode: Encode mode it has to offer.
        device: `cpu`, `cuda` or `cuda:INDEX`.

    Raises:
        DataError: Unknown encoder, mode or weights.
        MissingExtra: A package it needs is not installed.
    """
    problems = check_encoder(encoder, mode)
    if problems:
        raise DataError(problems)
    if encoder in _KINDS:
        return _KINDS[encoder].make(weights, device)
    made = _call_entry_point(encoder, weights, device)
    if mode not in made.modes:
        raise DataError(_mode_problem(encoder, mode, made.modes))
    return made


def _mode_problem(encoder: str, mode: str, modes: tuple[str, ...]) -> Problem:
    return Problem("mode", mode, f"{encoder} does not offer this encode mode", nearest(mode, modes))


def _call_entry_point(entry_point: str, weights: str | None, device: str) -> Encoder:
    module_name, _, function_name = entry_point.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        rule = f"the module cannot be imported ({error})"
        raise DataError(Problem("encoder", entry_point, rule, "install it, or put its folder on PYTHONPATH")) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        rule = f"{module_name} has no function {function_name}"
        raise DataError(Problem("encoder", entry_point, rule, nearest(function_name, names)))
    made: Any = function(weights=weights, device=device)
    missing = [name for name in (*_WANTED, "grid", "encode") if not hasattr(made, name)]
    if missing:
        rule = f"returned {type(made).__name__} without {', '.join(missing)}"
        fix = "return an object with everything that data_pipeline.encode.encoders.Encoder lists"
        raise DataError(Problem("encoder", entry_point, rule, fix))
    return made
