"""FLOPs of training on one clip, in closed form: matrix products only, two FLOPs a multiplication and addition.

`flops_reference` counts what the equations ask for: all five memories, every write, no masked product. It compares
models and papers. `flops_executed` counts what this implementation does: no write that nothing reads, only the memories
of `self_modify`, masked products, and what activation checkpointing runs again. Speed is measured against it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from .memory_flops import (
    Flops,
    chunks,
    differentiated,
    five_memories,
    longterm_memory,
    memory_product,
    memory_reference,
    read,
    single_memory,
    writes_before,
)
from .objective_schema import ObjectiveConfig
from .passes import Pass, active_frames, chunk_tokens, executed_passes, passes
from .schema import MEMORIES, ModelConfig

Recompute = Literal["none", "chunk", "block"]
Parts = Mapping[str, Flops]
"""FLOPs of a block in one pass, by part, in order of execution."""

ATTENTION_FORWARD, ATTENTION_BACKWARD = 2, 5
"""Products of fused attention: scores, values; then scores again, and gradients of values, weights, queries, keys."""

FEEDS_STATE = {
    "S": (),
    "T": ("qkv",),
    "H": ("query", "memory", "longterm write"),
    "U": ("qkv", "attention", "project", "keys and values", "write", "longterm write"),
}
"""Parts whose backward runs in a block of which only the state it leaves is used."""


def flops_executed(model: ModelConfig, objective: ObjectiveConfig, frames: int, recompute: Recompute = "none") -> Flops:
    """What forward and backward of one clip execute.

    Args:
        model: the predictor, without `compat`.
        objective: its branches of weight above 0 are run.
        frames: stored frames of the clip.
        recompute: what backward runs again (`parallel.recompute`).
    """
    return _sum(_executed(model, call, recompute) for call in executed_passes(model, objective, frames))


def flops_reference(model: ModelConfig, objective: ObjectiveConfig, frames: int, *, writes: bool = True) -> Flops:
    """What the equations ask for on one clip.

    Every memory is read and written in every chunk, whatever `self_modify` says and whether or not it is read again;
    attention looks at the frames up to the query's. What `cms.mode: online` teaches, the systems of
    `chunk_rule: token_exact` and the auxiliary loss are left out.

    Args:
        model: the predictor.
        objective: its branches of weight above 0 count.
        frames: stored frames of the clip.
        writes: False counts reads alone.
    """
    total = Flops()
    for call in passes(model, objective, frames):
        total += ends(model, call)
        for kind in model.block_pattern:
            total += _sum(_reference_parts(model, kind, call, writes).values())
    return total


def ends(model: ModelConfig, call: Pass) -> Flops:
    """Embedding of features and conditioning, and projection back to channels."""
    patches = call.frames * model.num_patches
    channels = _product(patches, model.encoder_dim, model.width)
    conditioning = _product(call.frames, model.action_dim + model.state_dim + model.extrinsics_dim, model.width)
    taught = channels if model.cms.mode == "online" and call.carried else 0
    # Of what comes in, only predictions have a gradient.
    embed = Flops(channels + conditioning, channels + conditioning + (channels if call.fed_back else 0))
    return embed + (_trained(channels) if call.scored else Flops(channels)) + Flops(taught)


def block_parts(model: ModelConfig, kind: str, call: Pass) -> Parts:
    """One block in one pass."""
    if kind == "H":
        return hope_parts(model, call)
    return unified_parts(model, call) if kind == "U" else attention_parts(model, kind, call)


def attention_parts(model: ModelConfig, kind: str, call: Pass) -> Parts:
    """An S or T block."""
    mlp = _product(_tokens(model, call), model.width, round(model.attention.mlp_multiplier * model.width))
    return {**_attention(model, kind, call), "fc1": _trained(mlp), "fc2": _trained(mlp)}


def hope_parts(model: ModelConfig, call: Pass) -> Parts:
    """An H block."""
    square = _trained(_product(_tokens(model, call), model.width, model.width))
    parts = {"query": square, "memory": _sum(five_memories(model, chunk) for chunk in chunks(model, call))}
    parts |= {"auxiliary": _auxiliary(model, call), **_longterm(model, call), "out": square, **_cms(model, call)}
    if model.spatial_mixing:
        parts["mixing"] = _trained(2 * _product(call.frames * model.width, model.num_tokens, model.num_tokens))
    return parts


def unified_parts(model: ModelConfig, call: Pass) -> Parts:
    """A U block."""
    square = _trained(_product(_tokens(model, call), model.width, model.width))
    each = [single_memory(model, chunk) for chunk in chunks(model, call)]
    reads, given, writes = (_sum(part) for part in zip(*each, strict=True))
    parts = {**_attention(model, "U", call), "query": square}
    parts |= {"memory": reads, "keys and values": given, "write": writes}
    return {**parts, "auxiliary": _auxiliary(model, call), **_longterm(model, call), "out": square, **_cms(model, call)}


def levels_taught(model: ModelConfig, call: Pass) -> float:
    """What the levels of `cms.mode: online` learn from the error of the frame before, outside the outer gradient."""
    flops = 0.0
    for level in model.cms.levels:
        if call.first % level.period == 0 or (call.keep_state and level.period < model.max_frames):
            flops += 3 * _product(model.num_patches, model.width, round(level.hidden_multiplier * model.width))
    return flops


def _attention(model: ModelConfig, kind: str, call: Pass) -> dict[str, Flops]:
    tokens, width = _tokens(model, call), model.width
    # Masked keys are multiplied like others.
    frames = 1 if kind == "S" else call.frames + sum(call.carried)
    scores = _product(tokens, width, frames * model.num_tokens)
    return {
        "qkv": _trained(_product(tokens, width, 3 * width)),
        "attention": Flops(ATTENTION_FORWARD * scores, ATTENTION_BACKWARD * scores),
        "project": _trained(_product(tokens, width, width)),
    }


def _cms(model: ModelConfig, call: Pass) -> dict[str, Flops]:
    """Levels that no frame of the pass is due for are left out."""
    parts = {}
    if model.cms.mode == "online" and call.carried:
        parts["teaching"] = Flops(levels_taught(model, call))
    for number, level in enumerate(model.cms.levels):
        active = active_frames(model, number, call) * model.num_tokens
        if active:
            parts[f"level {number}"] = _trained(
                2 * _product(active, model.width, round(level.hidden_multiplier * model.width))
            )
    return parts


def _auxiliary(model: ModelConfig, call: Pass) -> Flops:
    """Reading the main memory at the keys of written chunks, held: its matrices get no gradient."""
    tokens = sum(chunk.tokens for chunk in chunks(model, call) if chunk.taught)
    return read(tokens * memory_product(model), live=False)


def _longterm(model: ModelConfig, call: Pass) -> dict[str, Flops]:
    if model.longterm is None:
        return {}
    multiplier = model.longterm.hidden_multiplier
    each = [longterm_memory(model, chunk, multiplier) for chunk in chunks(model, call)]
    reads, writes = (_sum(part) for part in zip(*each, strict=True))
    return {"longterm read": reads + _longterm_gate(model, call), "longterm write": writes}


def _longterm_gate(model: ModelConfig, call: Pass) -> Flops:
    assert model.longterm is not None
    inputs = 2 if model.longterm.gate == "retrieval" else 1
    return _trained(_product(_tokens(model, call), inputs * model.width, 1))


def _executed(model: ModelConfig, call: Pass, recompute: Recompute) -> Flops:
    pattern = model.block_pattern
    # Where only the state is used, gradients come in at the last block whose state has one.
    with_state = [n for n, kind in enumerate(pattern) if _state_has_gradient(model, kind, call)]
    entry = len(pattern) if call.scored else max(with_state, default=-1)
    total = ends(model, call) if entry >= 0 else Flops(ends(model, call).forward)
    for number, kind in enumerate(pattern):
        parts = block_parts(model, kind, call)
        forward = sum(part.forward for part in parts.values())
        reached = parts if number < entry else FEEDS_STATE[kind] if number == entry else ()
        backward = sum(parts[name].backward for name in reached if name in parts)
        total += Flops(forward, backward, _run_again(model, number, call, recompute) if reached else 0)
    return total


def _state_has_gradient(model: ModelConfig, kind: str, call: Pass) -> bool:
    """Whether what a pass leaves behind passes gradients to its tokens."""
    if kind != "H":
        return kind in ("T", "U")
    writes = writes_before(model, call) + len(chunk_tokens(model, call.frames))
    return bool(model.memory.self_modify) and differentiated(model, writes - 1)


def _run_again(model: ModelConfig, number: int, call: Pass, recompute: Recompute) -> float:
    """Forward of a block that backward runs again."""
    kind = model.block_pattern[number]
    if recompute == "none":
        return 0
    if recompute == "chunk":
        return _written_chunks(model, kind, call)
    parts = block_parts(model, kind, call)
    # A second run ends where the last tensor was saved: before the last product, unless drop-path scales its result.
    again = sum(part.forward for part in parts.values())
    last = list(parts)[-1]
    if (number and model.drop_path) or (last == "out" and model.cms.levels):
        return again
    return again - parts[last].forward / (1 if last in ("fc2", "out") else 2)


def _written_chunks(model: ModelConfig, kind: str, call: Pass) -> float:
    """Reading and writing the chunks that are written, without long-term memories."""
    if kind not in ("H", "U"):
        return 0
    written = [chunk for chunk in chunks(model, call) if chunk.written]
    if kind == "H":
        return sum(five_memories(model, chunk).forward for chunk in written)
    return sum(part.forward for chunk in written for part in single_memory(model, chunk))


def _reference_parts(model: ModelConfig, kind: str, call: Pass, writes: bool) -> dict[str, Flops]:
    parts = dict(block_parts(model, kind, call))
    if "attention" in parts:
        before = sum(call.carried)
        seen = call.frames if kind == "S" else sum(range(before + 1, before + call.frames + 1))
        parts["attention"] = _trained(2 * _product(seen * model.num_tokens, model.width, model.num_tokens))
    if kind in ("H", "U"):
        memories = len(MEMORIES) if kind == "H" else 1
        parts["memory"] = memory_reference(model, call, memory_product(model), memories, writes)
        # Of a U block, keys and values of every chunk are projections.
        square = _trained(2 * _product(_tokens(model, call), model.width, model.width))
        parts |= {"write": Flops(), "keys and values": square if kind == "U" and writes else Flops()}
        parts["auxiliary"] = Flops()
        parts.pop("teaching", None)
        if model.longterm is not None:
            product = memory_product(model, model.longterm.hidden_multiplier)
            lasting = memory_reference(model, call, product, 1, writes)
            parts |= {"longterm read": lasting + _longterm_gate(model, call), "longterm write": Flops()}
    return parts


def _sum(parts: Iterable[Flops]) -> Flops:
    return sum(parts, Flops())


def _tokens(model: ModelConfig, call: Pass) -> int:
    return call.frames * model.num_tokens


def _product(rows: float, inner: float, columns: float) -> float:
    return 2 * rows * inner * columns


def _trained(forward: float) -> Flops:
    """A product both of whose factors have gradients."""
    return Flops(forward, 2 * forward)
