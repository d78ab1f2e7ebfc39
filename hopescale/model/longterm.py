"""A memory that outlives the clip: it starts every clip where the clips before it have left it.

Its start is the trained parameter plus `carried`, a buffer that no gradient reaches, smoothly scaled down to stay below
the parameter in norm: a write is limited in proportion to what it is written into, so what goes from clip to clip would
grow without bound. Within a clip it is written like the main memory of its block, with the same keys, values and step
sizes, but keeps at least `retention_floor` of itself in a chunk, and opens `memory.surprise_gate` by its own surprise.
It is read at the queries of the main memory, and what it recalls, r = M(q), is added to what that recalls, through a
gate of one number a token:

    y <- y + sigmoid(w x + b) r        or, with gate "retrieval",        y <- y + sigmoid(w [x, r] + b) r

A pass that is to be consolidated returns how far its clips left the memory from what is carried over. It moves nothing
itself: forward stays a function of its inputs, and `parallel/consolidation.py` moves `carried`, once an optimizer step
is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .memory_stack import MemoryStack
from .precision import at_least_fp32
from .schema import LongTermConfig, MemoryConfig
from .write_rules import FastWeights, Gates, limit_scale, safe_norm

CARRY_LIMIT = 1.0
"""Bound on the norm of what is carried over, as a share of that of the trained matrix."""


class LongTermChange(NamedTuple):
    """Memory after a clip - trained memory - what is carried over; summed over clips with a weight each, no graph."""

    w1: Float[Tensor, "memories heads hidden features"]
    w2: Float[Tensor, "memories heads features hidden"]


class LongTermMemory(MemoryStack):
    """The long-term memory of one block, which the block's other memories give keys, values, gates and queries.

    Buffers: `carried1`, `carried2`, equal on all ranks, are what the clips so far have left, and persist. With
    `sync_every` above 1, `waiting1`, `waiting2` are this rank's changes that `carried` has not taken in yet.
    """

    def __init__(self, config: MemoryConfig, longterm: LongTermConfig, width: int) -> None:
        super().__init__(config, width, longterm.hidden_multiplier, ("main",))
        self.settings = longterm
        self.gate = nn.Linear(2 * width if longterm.gate == "retrieval" else width, 1)
        for number, parameter in ((1, self.w1), (2, self.w2)):
            self.register_buffer(f"carried{number}", torch.zeros_like(parameter, requires_grad=False))
            if longterm.sync_every > 1:
                waiting = torch.zeros_like(parameter, requires_grad=False)
                self.register_buffer(f"waiting{number}", waiting, persistent=False)

    @property
    def carried(self) -> LongTermChange:
        """What is added to the trained memory at the start of a clip."""
        return LongTermChange(self.get_buffer("carried1"), self.get_buffer("carried2"))

    @property
    def waiting(self) -> LongTermChange | None:
        """This rank's changes since the last synchronisation, or None where every step is one."""
        if self.settings.sync_every == 1:
            return None
        return LongTermChange(self.get_buffer("waiting1"), self.get_buffer("waiting2"))

    def forward(
        self,
        x: Float[Tensor, "batch frames tokens width"],
        queries: Sequence[Float[Tensor, "heads batch tokens features"]],
        gates: Sequence[Gates],
        fast: FastWeights | None = None,
        consolidate: Float[Tensor, "batch frames"] | None = None,
    ) -> tuple[
        Float[Tensor, "batch frames tokens width"], Float[Tensor, "batch frames 1"], FastWeights, LongTermChange | None
    ]:
        """Read and write chunk by chunk.

        Args:
            x: normalised tokens of the block.
            queries: of each chunk, normalised.
            gates: of each chunk that is to be written, from the first on.
            fast: memory to go on from; None starts a clip.
            consolidate: weights of frames in the change that is returned, None returns none. A chunk has the weight of
                its last frame: what reaches past the end of a clip counts nowhere.

        Returns:
            What to add to the main memory's output, the share of what is recalled that this is (a frame's mean,
            detached), the memory after the last write, and the change; changes of passes that go on from each other add
            up to that of the clip.
        """
        outputs, changes, end = [], [], 0
        if fast is None:
            fast = self.start()
            if consolidate is not None:
                first = queries[0].shape[2] // x.shape[2]
                changes.append(_change(self._start(bounded=False), fast, consolidate[:, first - 1]))
        for number, query in enumerate(queries):
            end += query.shape[2] // x.shape[2]
            if number < len(gates):
                output, new = self.step(fast, query, gates[number])
                if consolidate is not None:
                    changes.append(_change(fast, new, consolidate[:, end - 1]))
                fast = new
            else:
                output = self.recall_main(fast, query)
            outputs.append(output)
        retrieved = torch.cat(outputs, dim=1).view(x.shape)
        given = torch.cat([at_least_fp32(x), retrieved], dim=-1) if self.settings.gate == "retrieval" else x
        opened = torch.sigmoid(at_least_fp32(self.gate(given)))
        return opened * retrieved, opened.detach().mean(dim=2), fast, total(changes) if changes else None

    def start(self) -> FastWeights:
        """The trained memory plus what is carried over, shared by all clips until the first write."""
        return self._start(bounded=True)

    def _start(self, *, bounded: bool) -> FastWeights:
        starts = []
        for part, trained in zip(self.carried, super().start()[:2], strict=True):
            carried = part.unsqueeze(2)
            if bounded:
                carried = carried * limit_scale(carried, safe_norm(trained.detach()), CARRY_LIMIT)[1]
            starts.append(trained + carried)
        return FastWeights(*starts)

    def step(
        self, fast: FastWeights, query: Float[Tensor, "heads batch tokens features"], gates: Gates
    ) -> tuple[Float[Tensor, "batch tokens width"], FastWeights]:
        """Read one chunk, then write it."""
        output, gates = self.recall_main(fast, query), self.lasting(gates)
        gradient = self.inner_gradient(self.start(), gates) if self.config.chunk_rule == "scan" else None
        return output, self.write(fast, gates, gradient)[0]

    def lasting(self, gates: Gates) -> Gates:
        """The gates with retention lifted to at least the floor."""
        floor, each = self.settings.retention_floor, gates.token_retention
        if each is None:
            return gates._replace(retention=floor + (1 - floor) * gates.retention)
        of_token = floor ** (1 / each.shape[-2])
        each = of_token + (1 - of_token) * each
        return gates._replace(retention=each.log().sum(dim=-2, keepdim=True).exp(), token_retention=each)


def total(changes: Sequence[LongTermChange]) -> LongTermChange:
    """The sum of changes of one memory."""
    return LongTermChange(*(torch.stack(parts).sum(dim=0) for parts in zip(*changes, strict=True)))


@torch.no_grad()
def _change(before: FastWeights, after: FastWeights, counted: Float[Tensor, " batch"]) -> LongTermChange:
    moves = ((new - old).expand(-1, -1, len(counted), -1, -1) for old, new in zip(before[:2], after[:2], strict=True))
    return LongTermChange(*(torch.einsum("b,mhbij->mhij", counted.to(move.dtype), move) for move in moves))
