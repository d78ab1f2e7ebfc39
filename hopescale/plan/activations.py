"""Bytes that training on one clip keeps on a rank until its backward, in closed form.

Approximate: tensors of a token or a matrix are counted, as the modules save them; statistics of norms, gates, masks and
the allocator's rounding are not, nor what `cms.mode: online` makes of its levels. A test holds it near what autograd
saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hopescale.model.flops import Recompute
from hopescale.model.memory_flops import Chunk, chunks
from hopescale.model.objective_schema import ObjectiveConfig
from hopescale.model.passes import Pass, active_frames, passes
from hopescale.model.schema import MEMORIES, ModelConfig

STREAM_BYTES = 4
"""Of a number in the residual stream, in norms, gates and fast weights, whatever the precision of products."""


@dataclass(frozen=True)
class ClipBytes:
    """What one clip needs on a rank."""

    fast_state: int
    """One set of fast weights, over all blocks."""
    block_input: int
    """What a recomputed block keeps of its tokens, in the longest pass of the objective."""
    saved: int
    """Largest sum of tensors kept for backward at one time."""


class Kept(NamedTuple):
    """Bytes that a block or a chunk keeps in one pass."""

    saved: float
    again: float = 0.0
    """Besides, for a moment, while it or the largest of its parts runs again."""


def clip_bytes(
    model: ModelConfig, objective: ObjectiveConfig, frames: int, recompute: Recompute, precision: str
) -> ClipBytes:
    """Bytes of one clip.

    Args:
        model: the predictor, without `compat`.
        objective: its branches of weight above 0 are run.
        frames: stored frames of the clip.
        recompute: `parallel.recompute`.
        precision: `parallel.precision`; bf16 halves what only products read.
    """
    calls = passes(model, objective, frames)
    blocks = [
        block_kept(model, kind, call, recompute, 2 if precision == "bf16" else 4)
        for call in calls
        for kind in model.block_pattern
    ]
    saved = sum(block.saved for block in blocks) + max(block.again for block in blocks)
    longest = max(calls, key=lambda call: call.frames)
    return ClipBytes(
        fast_state=sum(fast_state(model, kind) for kind in model.block_pattern),
        block_input=_stream(model, longest),
        saved=round(saved + sum(_ends(model, call) for call in calls)),
    )


def fast_state(model: ModelConfig, kind: str) -> int:
    """One set of fast weights of one block: two matrices of each memory, in fp32."""
    if kind not in ("H", "U"):
        return 0
    multipliers = model.memory.hidden_multiplier * (len(MEMORIES) if kind == "H" else 1)
    multipliers += 0 if model.longterm is None else model.longterm.hidden_multiplier
    return round(multipliers * _matrices(model))


def block_kept(model: ModelConfig, kind: str, call: Pass, recompute: Recompute, product_bytes: int) -> Kept:
    """What one block keeps in one pass."""
    parts = [_attention(model, kind, call, product_bytes)] if kind != "H" else []
    if kind in ("H", "U"):
        parts += _memory(model, kind, call, recompute, product_bytes)
        parts.append(_cms_and_mixing(model, kind, call, product_bytes))
    whole = Kept(sum(part.saved for part in parts), max(part.again for part in parts))
    if recompute != "block":
        return whole
    carried = fast_state(model, kind) if call.carried else 0
    return Kept(_stream(model, call) + carried, whole.saved)


def _attention(model: ModelConfig, kind: str, call: Pass, product_bytes: int) -> Kept:
    """Stream; then what products read: normed, query, key, value in a tensor of three, attended twice. And the MLP."""
    features = STREAM_BYTES + 8 * product_bytes
    if kind != "U":
        features += STREAM_BYTES + product_bytes * (1 + 2 * model.attention.mlp_multiplier)
    return Kept(_tokens(model, call) * model.width * features)


def _memory(model: ModelConfig, kind: str, call: Pass, recompute: Recompute, product_bytes: int) -> list[Kept]:
    """Reads and writes of all memories, projections and norm around them."""
    # Stream, normed, query, output.
    parts = [Kept(4 * _stream(model, call))]
    for chunk in chunks(model, call):
        inside, state = _chunk(model, kind, chunk, product_bytes)
        if recompute == "chunk" and chunk.written:
            # Tokens and queries that go into it, and the memories it leaves.
            parts.append(Kept(state + 2 * chunk.tokens * model.width * STREAM_BYTES, inside))
        else:
            parts.append(Kept(inside + state))
        if chunk.taught:
            parts.append(_auxiliary_chunk(model, chunk, recompute, product_bytes))
        if model.longterm is not None:
            parts.append(_longterm_chunk(model, chunk, product_bytes))
    return parts


def _chunk(model: ModelConfig, kind: str, chunk: Chunk, product_bytes: int) -> tuple[float, float]:
    """Activations of reading and writing a chunk, and the memories after it."""
    memory, narrow = model.memory, model.width * STREAM_BYTES
    wide = memory.hidden_multiplier * model.width * product_bytes
    gates = chunk.written or chunk.consolidated
    read = len(MEMORIES) if gates and kind == "H" else 1
    # W1 z; output before and after the norm.
    inside = read * (wide + 2 * narrow)
    if gates:
        # Key and value; of a U block also the tokens they are projected from.
        inside += (2 if kind == "H" else 4) * narrow
    if not chunk.written:
        return chunk.tokens * inside, 0.0
    alone = kind == "U" or chunk.last or memory.chunk_rule == "scan"
    written = 1 if alone else len(memory.self_modify)
    # Of each memory W1 k, W1 v, E W2 and the error.
    inside += written * (3 * wide + narrow)
    if memory.chunk_rule == "token_exact":
        # Left to autograd: seven more as wide, and two systems.
        inside += written * (7 * wide + 2 * chunk.tokens * STREAM_BYTES)
    state = memory.hidden_multiplier * _matrices(model)
    # With momentum its own state; part of the memories is also kept together with the rest.
    together = kind == "H" and not chunk.last and written < len(MEMORIES)
    states = written * (1 + bool(memory.momentum)) + len(MEMORIES) * together
    return chunk.tokens * inside, states * state


def _auxiliary_chunk(model: ModelConfig, chunk: Chunk, recompute: Recompute, product_bytes: int) -> Kept:
    """W1 k and both differences, and with them the keys and values of a chunk that runs again."""
    wide = model.memory.hidden_multiplier * model.width * product_bytes
    return Kept(chunk.tokens * (wide + (4 if recompute == "chunk" else 2) * model.width * STREAM_BYTES))


def _longterm_chunk(model: ModelConfig, chunk: Chunk, product_bytes: int) -> Kept:
    assert model.longterm is not None
    narrow, multiplier = model.width * STREAM_BYTES, model.longterm.hidden_multiplier
    wide = multiplier * model.width * product_bytes
    # W1 z; output before and after the norm, gated, and beside the gate's input.
    saved = chunk.tokens * (wide + (5 if model.longterm.gate == "retrieval" else 3) * narrow)
    if chunk.written:
        saved += chunk.tokens * (3 * wide + narrow) + multiplier * _matrices(model)
    return Kept(saved)


def _cms_and_mixing(model: ModelConfig, kind: str, call: Pass, product_bytes: int) -> Kept:
    stream, tokens, width = _stream(model, call), _tokens(model, call), model.width
    saved = float(stream) if model.cms.levels else 0.0
    for number, level in enumerate(model.cms.levels):
        active = active_frames(model, number, call) * model.num_tokens
        saved += stream if active else 0
        saved += active * width * product_bytes * (1 + 2 * level.hidden_multiplier)
    if model.spatial_mixing and kind == "H":
        saved += stream + 3 * tokens * width * product_bytes
    return Kept(saved)


def _ends(model: ModelConfig, call: Pass) -> float:
    """Normalised features and predictions, the loss, and the norm before the output projection."""
    patches = call.frames * model.num_patches
    return (3 * patches * model.encoder_dim + (patches + _tokens(model, call)) * model.width) * STREAM_BYTES


def _matrices(model: ModelConfig) -> float:
    """Both matrices of a memory as wide as the tokens."""
    return 2 * model.width**2 / model.memory.heads * STREAM_BYTES


def _stream(model: ModelConfig, call: Pass) -> int:
    return _tokens(model, call) * model.width * STREAM_BYTES


def _tokens(model: ModelConfig, call: Pass) -> int:
    return call.frames * model.num_tokens
