"""Bytes that training on one clip needs on a rank besides parameters, in closed form.

Tensors of a token or a matrix are counted, as the modules save them and as their backwards work on them; statistics of
norms, gates, masks and the allocator's rounding are not, nor what `cms.mode: online` makes of its levels. Tests hold
the figures within 10 % of the most that is alive in a step, and within 25 % with momentum, `chunk_rule: scan`, rollouts
and recomputed attention in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from hopescale.model.flops import Recompute
from hopescale.model.memory_flops import Chunk, chunks
from hopescale.model.objective_schema import ObjectiveConfig
from hopescale.model.passes import Pass, active_frames, passes
from hopescale.model.schema import MEMORIES, ModelConfig

STREAM_BYTES = 4
"""Of a number in the residual stream, in norms, gates and fast weights, whatever the precision of products."""
WIDE_OF_WRITE = {"fo": 3, "fo_kv": 13, "so": 13, "straight_through": 0}
"""Tensors as wide as a memory's hidden features that the backward of a write works on, by `memory.meta_grad`."""


@dataclass(frozen=True)
class ClipBytes:
    """What one clip needs on a rank."""

    fast_state: int
    """One set of fast weights, over all blocks."""
    block_input: int
    """What a recomputed block keeps of its tokens, in the longest pass of the objective."""
    fast_weights: int
    """Most that fast weights of all chunks, kept for backward, are at one time."""
    activations: int
    """Most that everything else is at one time, with what backward works on."""
    together: int
    """Most that both are at one time."""


class Kept(NamedTuple):
    """Bytes at one time."""

    activations: float = 0.0
    fast_weights: float = 0.0

    def plus(self, *others: Kept) -> Kept:
        """With others beside it."""
        every = (self, *others)
        return Kept(sum(kept.activations for kept in every), sum(kept.fast_weights for kept in every))

    @property
    def total(self) -> float:
        """Of both."""
        return sum(self)


class Stage(NamedTuple):
    """Part of a block, in order of execution."""

    saved: Kept
    """What its forward keeps for its backward."""
    working: tuple[Kept, ...] = (Kept(),)
    """What there is besides at each moment of its backward; negative where it is done with part of what was saved."""


class Span(NamedTuple):
    """A block or an end of the model in one pass."""

    kept: Kept
    """From its forward to its backward."""
    moments: tuple[Kept, ...]
    """In its backward."""


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
    calls, product_bytes = passes(model, objective, frames), 2 if precision == "bf16" else 4
    spans: list[Span] = []
    for call in calls:
        spans.append(_embedded(model, call))
        spans += [block_span(model, kind, call, recompute, product_bytes) for kind in model.block_pattern]
        spans.append(_predicted(model, call))
    moments, before = [], Kept()
    for span in spans:
        moments += [before.plus(moment) for moment in span.moments]
        before = before.plus(span.kept)
    longest = max(calls, key=lambda call: call.frames)
    return ClipBytes(
        fast_state=sum(fast_state(model, kind) for kind in model.block_pattern),
        block_input=_stream(model, longest),
        fast_weights=round(max(moment.fast_weights for moment in moments)),
        activations=round(max(moment.activations for moment in moments)),
        together=round(max(moment.total for moment in moments)),
    )


def fast_state(model: ModelConfig, kind: str) -> int:
    """One set of fast weights of one block: two matrices of each memory, in fp32."""
    if kind not in ("H", "U"):
        return 0
    multipliers = model.memory.hidden_multiplier * (len(MEMORIES) if kind == "H" else 1)
    multipliers += 0 if model.longterm is None else model.longterm.hidden_multiplier
    return round(multipliers * _matrices(model))


def block_span(model: ModelConfig, kind: str, call: Pass, recompute: Recompute, product_bytes: int) -> Span:
    """One block in one pass."""
    stages = list(_stages(model, kind, call, recompute, product_bytes))
    whole = Kept().plus(*(stage.saved for stage in stages))
    # The gradient of the stream comes along.
    gradient, before = Kept(_stream(model, call)), Kept()
    # Of momenta only the last two are there at a time.
    moments = [whole.plus(Kept(0, 2 * fast_state(model, kind) if model.memory.momentum else 0))]
    for stage in stages:
        before = before.plus(stage.saved)
        moments += [before.plus(working, gradient) for working in stage.working]
    if recompute != "block":
        return Span(whole, tuple(moments))
    carried = fast_state(model, kind) if call.carried else 0
    kept = Kept(_stream(model, call), carried)
    return Span(kept, tuple(kept.plus(moment) for moment in moments))


def _stages(model: ModelConfig, kind: str, call: Pass, recompute: Recompute, product_bytes: int) -> Iterator[Stage]:
    if kind != "H":
        yield from _attention(model, kind, call, product_bytes)
    if kind in ("H", "U"):
        yield from _memory(model, kind, call, recompute, product_bytes)
        yield _cms_and_mixing(model, kind, call, product_bytes)


def _attention(model: ModelConfig, kind: str, call: Pass, product_bytes: int) -> Iterator[Stage]:
    """Stream; then what products read: normed, query, key, value in a tensor of three, attended twice. And the MLP."""
    numbers = _tokens(model, call) * model.width
    # Gradients of query, key and value, and as a tensor of three.
    yield Stage(Kept(numbers * (STREAM_BYTES + 8 * product_bytes)), (Kept(numbers * 6 * product_bytes),))
    if kind != "U":
        hidden = model.attention.mlp_multiplier * product_bytes
        yield Stage(Kept(numbers * (STREAM_BYTES + product_bytes + 2 * hidden)), (Kept(numbers * hidden),))


def _memory(model: ModelConfig, kind: str, call: Pass, recompute: Recompute, product_bytes: int) -> Iterator[Stage]:
    """Reads and writes of all memories, projections and norm around them."""
    # Stream, normed, query, output.
    yield Stage(Kept(4 * _stream(model, call)))
    for chunk in chunks(model, call):
        stage = _chunk(model, kind, chunk, product_bytes)
        if recompute == "chunk" and chunk.written:
            # Tokens and queries that go into it, and the memories it leaves.
            given = Kept(2 * chunk.tokens * model.width * STREAM_BYTES, stage.saved.fast_weights)
            again = Kept(stage.saved.activations)
            yield Stage(given, (again, *(again.plus(working) for working in stage.working)))
        else:
            yield stage
        if chunk.taught:
            yield _auxiliary_chunk(model, chunk, recompute, product_bytes)
        if model.longterm is not None:
            yield _longterm_chunk(model, chunk, product_bytes)


def _chunk(model: ModelConfig, kind: str, chunk: Chunk, product_bytes: int) -> Stage:
    """Reading and writing a chunk, and the memories after it."""
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
        # W1 z's gradient before and after gelu, and gelu.
        return Stage(Kept(chunk.tokens * inside), (Kept(chunk.tokens * read * 3 * wide),))
    alone = kind == "U" or chunk.last or memory.chunk_rule == "scan"
    written = 1 if alone else len(memory.self_modify)
    # Of each memory W1 k, W1 v, E W2 and the error.
    inside += written * (3 * wide + narrow)
    if memory.chunk_rule == "token_exact":
        # Left to autograd: seven more as wide, and two systems.
        inside += written * (7 * wide + 2 * chunk.tokens * STREAM_BYTES)
    state = memory.hidden_multiplier * _matrices(model)
    # Part of the memories is also kept together with the rest; with momentum, what it was made from.
    together = kind == "H" and not chunk.last and written < len(MEMORIES)
    states = written * state
    left = len(MEMORIES) * state if together else states
    saved = Kept(chunk.tokens * inside + (together + bool(memory.momentum)) * states, left)
    if not chunk.differentiated:
        return Stage(saved)
    # The gradients of the memories before and of what is written into them; then the write's own, once the memories
    # after it are done with.
    gradients = 2 * (len(MEMORIES) if together else written) * state
    wides = chunk.tokens * written * WIDE_OF_WRITE[memory.meta_grad] * wide
    return Stage(saved, (Kept(gradients), Kept(gradients + wides, -left)))


def _auxiliary_chunk(model: ModelConfig, chunk: Chunk, recompute: Recompute, product_bytes: int) -> Stage:
    """W1 k and both differences, and with them the keys and values of a chunk that runs again."""
    wide = model.memory.hidden_multiplier * model.width * product_bytes
    return Stage(Kept(chunk.tokens * (wide + (4 if recompute == "chunk" else 2) * model.width * STREAM_BYTES)))


def _longterm_chunk(model: ModelConfig, chunk: Chunk, product_bytes: int) -> Stage:
    assert model.longterm is not None
    narrow, multiplier = model.width * STREAM_BYTES, model.longterm.hidden_multiplier
    wide = multiplier * model.width * product_bytes
    # W1 z; output before and after the norm, gated, and beside the gate's input.
    saved = chunk.tokens * (wide + (5 if model.longterm.gate == "retrieval" else 3) * narrow)
    if not (chunk.written or chunk.consolidated):
        return Stage(Kept(saved))
    state = multiplier * _matrices(model)
    inside = Kept(saved + chunk.tokens * (3 * wide + narrow), state)
    wides = chunk.tokens * WIDE_OF_WRITE[model.memory.meta_grad] * wide
    return Stage(inside, (Kept(2 * state + wides, -state),) if chunk.differentiated else (Kept(),))


def _cms_and_mixing(model: ModelConfig, kind: str, call: Pass, product_bytes: int) -> Stage:
    stream, tokens, width = _stream(model, call), _tokens(model, call), model.width
    saved, working = float(stream) if model.cms.levels else 0.0, 0.0
    for number, level in enumerate(model.cms.levels):
        active = active_frames(model, number, call) * model.num_tokens
        hidden = active * width * product_bytes * level.hidden_multiplier
        saved += (stream if active else 0) + active * width * product_bytes + 2 * hidden
        # Of the level before, more is saved than this one works on.
        working = hidden
    if model.spatial_mixing and kind == "H":
        saved += stream + 3 * tokens * width * product_bytes
        working = max(working, 3 * tokens * width * product_bytes)
    return Stage(Kept(saved), (Kept(working),))


def _embedded(model: ModelConfig, call: Pass) -> Span:
    """Features, those that the pass reads and predicts, normalised once more; and the stream."""
    features = (2 * call.frames + call.scored) * model.num_patches * model.encoder_dim * STREAM_BYTES
    kept = Kept(features + _stream(model, call))
    return Span(kept, (kept,))


def _predicted(model: ModelConfig, call: Pass) -> Span:
    """The norm before the output projection, the prediction before and after its own, targets, differences."""
    patches = call.frames * model.num_patches
    features = (4 * patches + model.num_patches) * model.encoder_dim
    kept = Kept((features + patches * model.width) * STREAM_BYTES * call.scored)
    return Span(kept, (kept,))


def _matrices(model: ModelConfig) -> float:
    """Both matrices of a memory as wide as the tokens."""
    return 2 * model.width**2 / model.memory.heads * STREAM_BYTES


def _stream(model: ModelConfig, call: Pass) -> int:
    return _tokens(model, call) * model.width * STREAM_BYTES


def _tokens(model: ModelConfig, call: Pass) -> int:
    return call.frames * model.num_tokens
