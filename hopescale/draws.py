"""Every random number of training, as a function of where it is used.

A draw depends on (seed, step, position in the global batch, layer, purpose) and on nothing else: not on ranks, not
on micro-batches, not on what was drawn before. So there is no generator to save, and any split of a global batch
gives the same curve.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from data_pipeline.order import mix64


class Purpose(IntEnum):
    """What a draw is for; a number once given is never reused."""

    DROP_PATH = 1
    JUMP_TARGET = 2


def uniform(seed: int, step: int, positions: np.ndarray, layers: int, purpose: Purpose) -> np.ndarray:
    """Uniform numbers in [0, 1): float64 [clips, layers].

    Args:
        seed: of the run.
        step: attempted step, from 0.
        positions: int64 [clips], places in the global order of samples.
        layers: independent numbers wanted for each clip.
        purpose: keeps the draws of different uses apart.
    """
    clips = mix64(positions.astype(np.uint64), seed, int(purpose), step)
    bits = mix64(clips[:, None] ^ np.arange(layers, dtype=np.uint64)[None, :])
    return (bits >> np.uint64(11)) * 2.0**-53


def drop_path_draws(
    seed: int, step: int, positions: np.ndarray, num_blocks: int, branches: int
) -> Float[Tensor, "clips blocks branches"]:
    """A number in [0, 1] for every residual branch of every block, fp32."""
    draws = uniform(seed, step, positions, num_blocks * branches, Purpose.DROP_PATH)
    return torch.from_numpy(draws.astype(np.float32)).unflatten(1, (num_blocks, branches))


def jump_targets(
    seed: int, step: int, positions: np.ndarray, lengths: np.ndarray, horizons: int, context: int = 1
) -> Int[Tensor, " clips"]:
    """Frame each clip's jump aims at: evenly among the last `horizons` frames, none of the first `context`.

    A clip of no more frames than the context has none to aim at; it gets its last frame, and must not be scored.
    """
    draws = uniform(seed, step, positions, 1, Purpose.JUMP_TARGET)[:, 0]
    choices = np.clip(lengths - context, 1, horizons)
    return torch.from_numpy(lengths - choices + np.floor(draws * choices).astype(np.int64))
