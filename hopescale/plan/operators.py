"""How many operators a step hands to a device, one after the other: what a step costs however small its tensors are."""

from __future__ import annotations

from hopescale.model.flops import Recompute
from hopescale.model.objective_schema import ObjectiveConfig
from hopescale.model.passes import chunk_tokens, executed_passes
from hopescale.model.schema import ModelConfig

# Counted by a dispatch mode (views included) in forward, at frames from 4 to 16; a step's sum holds within a fifth.
ENDS = 45
"""Of a pass, outside its blocks: embeddings, projection, loss."""
OF_A_PASS = {"S": 105, "T": 110, "H": 25, "U": 75}
"""Of a block in a pass: all of attention, and what memories do once."""
OF_A_CHUNK = {"S": 0, "T": 0, "H": 180, "U": 190}
"""Of a block in each chunk that its memories read and write."""
LONGTERM = 170
"""More of a chunk where a long-term memory is read and written."""
TIMES = {"none": 2.35, "chunk": 3.25, "block": 3.65}
"""Operators of forward and backward to those of forward, with what is run again."""


def operators(model: ModelConfig, objective: ObjectiveConfig, frames: int, recompute: Recompute) -> float:
    """Operators of forward and backward of one micro-batch, whatever its clips.

    Args:
        model: the predictor, not compiled.
        objective: its branches of weight above 0 are run.
        frames: stored frames of a clip.
        recompute: what backward runs again.
    """
    longterm = LONGTERM if model.longterm is not None else 0
    forward = 0.0
    for call in executed_passes(model, objective, frames):
        chunks = len(chunk_tokens(model, call.frames))
        forward += ENDS
        for kind in model.block_pattern:
            forward += OF_A_PASS[kind] + (OF_A_CHUNK[kind] + longterm if OF_A_CHUNK[kind] else 0) * chunks
    return forward * TIMES[recompute]
