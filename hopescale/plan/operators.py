"""How many operators a step hands to a device, one after the other: what a step costs however small its tensors are."""

from __future__ import annotations

from collections import Counter

from hopescale.model.flops import Recompute
from hopescale.model.objective_schema import ObjectiveConfig
from hopescale.model.passes import Pass, chunk_tokens, executed_passes, passes
from hopescale.model.schema import ModelConfig

KEPT = {
    "ends": 96,
    "S": 214,
    "T": 220,
    "H": 144,
    "U": 306,
    "read": 106,
    "keys": 102,
    "write": 247,
    "longterm": 341,
    "online": 170,
}
COUNTS: dict[Recompute, dict[str, int]] = {
    "none": KEPT,
    "chunk": KEPT | {"write": 420},
    "block": {
        "ends": 82,
        "S": 346,
        "T": 360,
        "H": 290,
        "U": 568,
        "read": 160,
        "keys": 111,
        "write": 404,
        "longterm": 522,
        "online": 254,
    },
}
"""Operators of forward and backward, fitted to what a dispatch mode counts, views included: of what is outside the
blocks, of a block in each pass by its kind, and of its memories for each chunk they read, take keys, values and rates
from, or write, for each chunk of a long-term memory and each frame of an online CMS. A sum holds within a tenth."""


def operators(model: ModelConfig, objective: ObjectiveConfig, frames: int, recompute: Recompute) -> float:
    """Operators of forward and backward of one micro-batch, whatever its clips.

    Args:
        model: the predictor, not compiled.
        objective: its branches of weight above 0 are run.
        frames: stored frames of a clip.
        recompute: what backward runs again.
    """
    done = Counter(ends=len(passes(model, objective, frames)))
    with_memories = sum(kind in "HU" for kind in model.block_pattern)
    for call in executed_passes(model, objective, frames):
        done.update(model.block_pattern)
        done.update({what: with_memories * times for what, times in _of_memories(model, call).items()})
    return float(sum(COUNTS[recompute][what] * times for what, times in done.items()))


def _of_memories(model: ModelConfig, call: Pass) -> dict[str, int]:
    """What a block's memories do in a pass; what the last chunk would write only a later pass reads."""
    chunks, learns = len(chunk_tokens(model, call.frames)), bool(model.memory.self_modify)
    return {
        "read": chunks,
        "keys": chunks * learns,
        "write": (chunks - (not call.keep_state)) * learns,
        "longterm": chunks if model.longterm is not None else 0,
        "online": int(model.cms.mode == "online"),
    }
