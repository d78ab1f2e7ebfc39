"""Initial weights, each a function of (seed, parameter name) and of nothing else.

So they do not depend on the number of ranks, on the order of construction, or on which other parameters exist.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from .schema import MEMORIES

EMBEDDING_STD = 0.02

MATRIX_STD = 0.02
REFERENCE_FAN_IN = 384
"""A matrix with this many inputs starts at MATRIX_STD; others keep the size of their output, MATRIX_STD
sqrt(REFERENCE_FAN_IN / inputs)."""

CONDITIONING_STD = 3.0
"""Of the embedding of an action, a state or extrinsics, for inputs of about 1. Large, because a few numbers must be
heard beside a whole frame: the demo learns to use its actions a hundred steps earlier than at a third of it."""

HEAD_STD = 0.004
"""Of the projection back to channels: a fresh predictor that emits changes all but repeats the newest frame."""

# First match wins; what matches nothing is a matrix.
CONSTANTS: tuple[tuple[str, float], ...] = (
    ("*norm*weight", 1.0),
    ("*longterm.gate.weight", 0.0),
    ("*longterm.gate.bias", 1.0),
    ("*bias", 0.0),
    ("*.spatial_mixing.second.weight", 0.0),
)


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Set every parameter of an unsharded model in place; see `initial_value`."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, seed))


def initial_value(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """What a parameter starts from, fp32 on the CPU: a function of its name, its shape and the seed alone.

    Constants: norms 1, biases 0, the output matrix of spatial mixing 0 (a fresh block is then the block without it).
    The norms of the eta and alpha memories are 1 over half of the features and -1 over the rest. The gate of a
    long-term memory starts at sigmoid(1) for every token.
    All others: truncated normal, of standard deviation 0.02 for position tables, 0.004 for the output projection,
    3 / sqrt(inputs) for encoders of actions, states and extrinsics, and 0.02 sqrt(384 / inputs) for other matrices.
    """
    constant = next((value for pattern, value in CONSTANTS if fnmatchcase(name, pattern)), None)
    if constant is not None:
        value = torch.full(tuple(shape), constant)
        if fnmatchcase(name, "*.memory.norm_weight") and len(value) == len(MEMORIES):
            _split_gates(value)
        return value
    if fnmatchcase(name, "*_position.weight"):
        return _truncated_normal(shape, EMBEDDING_STD, seed, name)
    if fnmatchcase(name, "*_encoder.weight"):
        return _truncated_normal(shape, CONDITIONING_STD / shape[-1] ** 0.5, seed, name)
    if name == "project.weight":
        return _truncated_normal(shape, HEAD_STD, seed, name)
    return _truncated_normal(shape, MATRIX_STD * (REFERENCE_FAN_IN / shape[-1]) ** 0.5, seed, name)


def _split_gates(norm_weight: Tensor) -> None:
    # Gates are means over a head's features of vectors normalised over all: with equal weights and one head they would
    # be 0 whatever these memories say, and the memories' matrices would have no gradient.
    for gate in ("eta", "alpha"):
        norm_weight[MEMORIES.index(gate), norm_weight.shape[1] // 2 :] = -1


def _truncated_normal(shape: Sequence[int], std: float, seed: int, name: str) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return nn.init.trunc_normal_(torch.empty(tuple(shape)), std=std, a=-2 * std, b=2 * std, generator=generator)
