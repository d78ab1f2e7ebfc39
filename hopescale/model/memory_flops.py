"""FLOPs of reading and writing memories, as parts of a block in one pass of the predictor.

One product of a memory's matrix with a token is 2 m D^2 / heads FLOPs, m the hidden multiplier: the unit of the tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .passes import Pass, chunk_tokens
from .schema import MEMORIES, ModelConfig

READ = 2
"""Products of reading a memory: W1 z, then W2 gelu."""
WRITE = 7
"""Products of writing a memory: key and value through both matrices, E W2, and the gradients of both matrices."""

WRITE_BACKWARD = {"fo": 2, "fo_kv": 8, "so": 13, "straight_through": 0}
"""Products of the backward of a write, by `memory.meta_grad`: what `inner_gradient.py` does."""
TOKEN_EXACT_BACKWARD = {"fo": 2, "fo_kv": 9, "so": 14, "straight_through": 0}
"""The same for `chunk_rule: token_exact`, which autograd differentiates; its triangular systems apart."""
REFERENCE_BACKWARD = {"fo": 0, "fo_kv": 9, "so": 14, "straight_through": 0}
"""The same by the equations, where fo has only to differentiate by step sizes and retention."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of one clip."""

    forward: float = 0.0
    backward: float = 0.0
    recomputed: float = 0.0
    """Forward run again in backward."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.forward + self.backward + self.recomputed

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed)


class Chunk(NamedTuple):
    """One chunk of a pass."""

    tokens: int
    live: bool
    """Whether the memories pass gradients to what they were made from when the chunk is read."""
    written: bool
    consolidated: bool
    """Whether it is not written but into the long-term memory, for clips to come."""
    taught: bool
    """Whether its keys and values have an auxiliary loss."""
    last: bool
    """Whether only the main memory is read after its write."""
    differentiated: bool
    """Whether the write has a backward."""
    gates_live: bool
    """The same as `live`, for what the chunk is written with."""
    batch_differentiated: bool
    """The same as `differentiated`, for all chunks whose inner gradient is taken in one batch."""


def chunks(model: ModelConfig, call: Pass) -> list[Chunk]:
    """The chunks of a pass; the last is written only if more follow, and where long-term memories take it in."""
    memory, before = model.memory, writes_before(model, call)
    sizes, scan = chunk_tokens(model, call.frames), memory.chunk_rule == "scan"
    num_writes = len(sizes) - (not call.keep_state) if memory.self_modify else 0
    trains = [differentiated(model, before + n) for n in range(num_writes)]
    found = []
    for number, tokens in enumerate(sizes):
        live, written = path_to_trained(model, before + number), number < num_writes
        trained = written and trains[number]
        # Scan takes all chunks of equal length in one batch, at the trained memories.
        batch = any(trains[n] for n in range(num_writes) if sizes[n] == tokens) if scan else trained
        consolidated = call.consolidates and bool(memory.self_modify) and not written
        last = number == num_writes - 1 and not call.keep_state and not call.consolidates
        taught = written and call.auxiliary
        found.append(Chunk(tokens, live, written, consolidated, taught, last, trained, live or scan, batch))
    return found


def writes_before(model: ModelConfig, call: Pass) -> int:
    """Writes of the earlier passes whose state a pass goes on from."""
    return sum(len(chunk_tokens(model, frames)) for frames in call.carried) if model.memory.self_modify else 0


def path_to_trained(model: ModelConfig, writes: int) -> bool:
    """Whether a memory that was written so often still passes gradients to what it was made from."""
    memory = model.memory
    cuts = memory.detach_rule == "all" and memory.detach_interval > 0
    return not (cuts and writes and writes % memory.detach_interval == 0)


def differentiated(model: ModelConfig, writes: int) -> bool:
    """Whether the write that follows so many others has a backward."""
    return model.memory.meta_grad != "straight_through" and path_to_trained(model, writes + 1)


def five_memories(model: ModelConfig, chunk: Chunk) -> Flops:
    """Reading and writing a chunk of an H block."""
    product, scan = chunk.tokens * memory_product(model), model.memory.chunk_rule == "scan"
    main, gates = read(product, chunk.live), read((len(MEMORIES) - 1) * product, chunk.gates_live)
    if chunk.consolidated:
        return read(len(MEMORIES) * product, chunk.live)
    if not chunk.written:
        return main
    # Scan reads them on their own; else all five are one product, which is differentiated whole.
    gates = gates if chunk.batch_differentiated or chunk.taught or not scan else Flops(gates.forward)
    # Memories that are not read again are not written; scan reads all but the main one at the start of the clip alone.
    written = 1 if chunk.last or scan else len(model.memory.self_modify)
    return main + gates + write(model, chunk, memory_product(model), written)


def single_memory(model: ModelConfig, chunk: Chunk) -> tuple[Flops, Flops, Flops]:
    """Reading a chunk of a U block, its keys and values, which are projections, and writing it."""
    product = memory_product(model)
    reading, given, writing = read(chunk.tokens * product, chunk.live), Flops(), Flops()
    if chunk.written or chunk.consolidated:
        projected = 4 * chunk.tokens * model.width**2
        has_gradient = chunk.taught or (chunk.written and chunk.batch_differentiated and model.memory.meta_grad != "fo")
        given = Flops(projected, 2 * projected if has_gradient else 0)
    if chunk.written:
        writing = write(model, chunk, product, 1)
    return reading, given, writing


def longterm_memory(model: ModelConfig, chunk: Chunk, multiplier: float) -> tuple[Flops, Flops]:
    """Reading and writing a chunk of a long-term memory."""
    product, writing = memory_product(model, multiplier), Flops()
    if chunk.written or chunk.consolidated:
        alone = chunk._replace(batch_differentiated=chunk.differentiated)
        writing = write(model, alone, product, 1)
    return read(chunk.tokens * product, chunk.live), writing


def read(product: float, live: bool) -> Flops:
    """Reading; the products of a token's gradient, and of the memory's where it is live, are as many again each."""
    return Flops(READ * product, READ * (1 + live) * product)


def write(model: ModelConfig, chunk: Chunk, product: float, memories: int) -> Flops:
    """The inner gradient of a chunk in some memories."""
    memory, products = model.memory, memories * chunk.tokens * product
    exact = memory.chunk_rule == "token_exact"
    table = TOKEN_EXACT_BACKWARD if exact else WRITE_BACKWARD
    meta_grad = "fo_kv" if memory.meta_grad == "so" and not chunk.gates_live else memory.meta_grad
    found = Flops(WRITE * products, table[meta_grad] * products)
    if exact and memory.preconditioner:
        found += triangular_systems(model, chunk.tokens, memories * product)
    return found if chunk.batch_differentiated else Flops(found.forward)


def triangular_systems(model: ModelConfig, tokens: int, products: float) -> Flops:
    """Of `chunk_rule: token_exact`: overlaps of all keys, and a system in as many columns as each memory is wide."""
    overlap = 2 * tokens**2 * model.width
    solve = tokens**2 * products * model.memory.heads / (2 * model.width)
    of_keys = 0 if model.memory.meta_grad == "fo" else 2 * overlap
    # Backward solves the transposed system, then multiplies the two solutions.
    return Flops(overlap + solve, of_keys + 3 * solve)


def memory_product(model: ModelConfig, multiplier: float | None = None) -> float:
    """One product of one memory's matrix with one token; `multiplier` where it is not that of `memory`."""
    multiplier = model.memory.hidden_multiplier if multiplier is None else multiplier
    return 2 * multiplier * model.width**2 / model.memory.heads


def memory_reference(model: ModelConfig, call: Pass, product: float, memories: int, writes: bool) -> Flops:
    """Reads and writes of an H or U block's memories, or of a long-term one, as the equations have them.

    Every chunk is written, whether or not it is read again. The writes of `compat=ac_hope` are first order, whatever
    `memory.meta_grad`, which it does not read, says.
    """
    meta_grad = "fo" if model.compat == "ac_hope" else model.memory.meta_grad
    before, backward = writes_before(model, call), REFERENCE_BACKWARD[meta_grad]
    total = Flops()
    for number, tokens in enumerate(chunk_tokens(model, call.frames)):
        live = not writes or path_to_trained(model, before + number)
        # Past a cut nothing reaches the memories that serve the write alone.
        cut = writes and not path_to_trained(model, before + number + 1)
        gates = read((memories - 1) * tokens * product, live)
        total += read(tokens * product, live) + (Flops(gates.forward) if cut else gates)
        if writes:
            products = memories * tokens * product
            total += Flops(WRITE * products, 0 if cut else backward * products)
    return total
