"""Self-modifying Titan memories (Nested Learning, Eq. 76-91).

Five two-layer residual memories M(z) = z + W2 gelu(W1 z) live in every clip: key, value, eta (step size), alpha
(retention) and main. A chunk of frames is first read with the memories as they are, then written into them:

    k, v, eta, alpha = M_key(x), M_value(x), M_eta(x), M_alpha(x)      y = M_main(q),  q = W_q x
    W1 <- a W1 - (eta * (S + A))^T K        W2 <- a W2 - (eta * E)^T Hd

for each of the five, with the gradient of |M(k) - M(v)|^2 in closed form (`inner_gradient.py`), so there is no autograd
inside forward. `write_rules.py` holds the write, and what may be chosen about it.

Everything here is a pure function of (fast weights, input): nothing is kept on the module, so sharding, activation
checkpointing and several passes per step are safe. Fast weights are never narrower than fp32; under autocast only
products are bf16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .inner_gradient import InnerGradient
from .longterm import LongTermChange, LongTermMemory
from .memory_stack import MemoryStack
from .precision import at_least_fp32
from .recall import recall, recall_at_both, unit
from .schema import MEMORIES, LongTermConfig, MemoryConfig, MemoryName
from .write_rules import FastWeights, Gates, Write, matrix_norm

KEY, VALUE, ETA, ALPHA, MAIN = range(len(MEMORIES))


class MemoryTrace(NamedTuple):
    """Figures of one pass, detached but for `auxiliary`: one column a write (none where nothing was written)."""

    surprise: Float[Tensor, "batch writes"]
    """|v - o|^2 / (|v|^2 + |o|^2) of target v and prediction o, in [0, 2], of the main memory."""
    retention: Float[Tensor, "batch writes"]
    """Share of the old memory that was kept, mean over heads."""
    retention_min: Float[Tensor, "batch writes"]
    """The same of the head that kept least."""
    step_size: Float[Tensor, "batch writes"]
    """Summed over a chunk's tokens, mean over heads: at most eta_max."""
    step_size_p99: Float[Tensor, "batch writes"]
    """99th percentile over a chunk's tokens and heads of a token's step size, times tokens: at most eta_max."""
    gate: Float[Tensor, "batch writes"]
    """1 where the clip's memories were written, 0 where its surprise was below `surprise_gate`."""
    write_ratio: Float[Tensor, "batch writes memories"]
    """Norm of the limited write over the norm of what it is written into; 0 for a memory that is only read."""
    limited: Float[Tensor, "batch writes memories"]
    """Share of matrices whose change was larger than `write_limit` before it was limited."""
    norm_ratio: Float[Tensor, "batch memories"]
    """Norm of W1 after the last write over its trained norm."""
    drift: Float[Tensor, "batch memories"]
    """Norm of the change of W1 since the start of the clip over its trained norm."""
    level_ratio: Float[Tensor, "batch frames levels"]
    """Norm of what each CMS level of the block adds to a frame's tokens over the norm of what it adds it to, 0 where it
    passes the frame by; the block fills it in."""
    longterm_gate: Float[Tensor, "batch frames gates"]
    """Share of what the long-term memory recalls that is added, mean over a frame's tokens; no column without one."""
    longterm: LongTermChange | None = None
    """What the long-term memory is to carry over to other clips."""
    auxiliary: Float[Tensor, " batch"] | None = None
    """Sum over written chunks of how far keys and values are from agreeing (`disagreement`): not detached, for it is
    trained. None unless asked for."""


NO_FIGURES = ("longterm", "auxiliary")
"""Fields of a trace that are for training to go on with, not for reports."""


class TitanMemory(MemoryStack):
    """The memories of one H block, with the only static projection (queries) and the output projection.

    With `longterm`, one more memory, which outlives the clip, is read at the same queries and written with the same
    keys, values and gates (`longterm.py`).
    """

    memories: ClassVar[tuple[MemoryName, ...]] = MEMORIES

    def __init__(self, config: MemoryConfig, width: int, longterm: LongTermConfig | None = None) -> None:
        super().__init__(config, width, config.hidden_multiplier, self.memories)
        self.query = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)
        self.longterm = None if longterm is None else LongTermMemory(config, longterm, width)

    def forward(
        self,
        x: Float[Tensor, "batch frames tokens width"],
        fast: FastWeights | None = None,
        *,
        writes: bool = True,
        keep_state: bool = False,
        consolidate: Float[Tensor, "batch frames"] | None = None,
        auxiliary: Float[Tensor, "batch frames"] | None = None,
    ) -> tuple[Float[Tensor, "batch frames tokens width"], FastWeights | None, MemoryTrace]:
        """Read and write chunk by chunk.

        Args:
            x: normalised tokens of consecutive frames.
            fast: memories to go on from; None starts from the trained ones.
            writes: False only reads.
            keep_state: also write the last chunk and return the memories, for a pass that goes on from here.
            consolidate: weights of frames in what is to be carried over to other clips; None carries over nothing.
            auxiliary: weights of frames in the trace's auxiliary loss; None leaves it out.

        Returns:
            The memories' output, the memories after the last chunk (None unless kept), and figures of the writes.
        """
        shape, writes = x.shape, writes and bool(self.written)
        if self.config.scope == "batch":
            # One memory for all clips: their tokens are tokens of one.
            x = x.transpose(0, 1).flatten(1, 2).unsqueeze(0)
        queries = unit(self.split(at_least_fp32(self.query(x)), 0))
        inputs = self.inputs(x)
        chunks = [
            (inputs[:, :, begin:end].flatten(2, 3), queries[:, :, begin:end].flatten(2, 3))
            for begin, end in _spans(x.shape[1], self.config.chunk_size)
        ]
        fast = self.start() if fast is None else fast
        if fast.w1.shape[2] != x.shape[0] and (fast.w1.shape[2] > 1 or fast.num_writes):
            raise ValueError(f"the carried memories are those of {fast.w1.shape[2]} clips, and {x.shape[0]} are given")
        lasting, change, opened = fast.longterm, None, None
        consolidate = None if self.longterm is None else consolidate
        num_writes = len(chunks) - (not keep_state) if writes else 0
        ahead = self.at_start(chunks[:num_writes]) if self.config.chunk_rule == "scan" else [None] * num_writes
        full, outputs, gates, written, disagreements = fast, [], [], [], []
        for number, (tokens, query) in enumerate(chunks):
            # A write after the last read of the pass reaches nothing, so the last chunk reads the main memory alone,
            # and of the last write only what goes into that reaches anything.
            if number < num_writes:
                last = not keep_state and consolidate is None and number == num_writes - 1
                before = fast
                output, fast, figures = self.step(fast, tokens, query, ahead[number], last=last)
                full = full if last else fast
                if auxiliary is not None:
                    disagreements.append(self.disagreement(before, figures[0]))
                gates.append(figures[0])
                written.append(figures[1])
            elif writes and consolidate is not None:
                output, its_gates = self.read(fast, tokens, query)
                gates.append(its_gates)
            else:
                output = self.recall_main(fast, query)
            outputs.append(output)
        recalled = torch.cat(outputs, dim=1).view(x.shape)
        if self.longterm is not None:
            added, opened, lasting, change = self.longterm(x, [q for _, q in chunks], gates, lasting, consolidate)
            recalled = recalled + added
        output = self.out(recalled)
        if self.config.scope == "batch":
            output = output.squeeze(0).unflatten(1, (shape[0], shape[2])).transpose(0, 1)
        state = _owned(fast)._replace(longterm=lasting) if keep_state else None
        trace = self._trace(gates[: len(written)], written, full, fast, shape)
        trace = trace if opened is None else trace._replace(longterm_gate=opened)
        if auxiliary is not None:
            apart = self.of_frames(disagreements, shape)
            trace = trace._replace(auxiliary=chunk_sum(apart, auxiliary, self.config.chunk_size))
        return output, state, trace._replace(longterm=change)

    def inputs(
        self, x: Float[Tensor, "batch frames tokens width"]
    ) -> Float[Tensor, "heads batch frames tokens features"]:
        """What `read` takes, for all frames."""
        return self.split(at_least_fp32(x), 0)

    def step(
        self,
        fast: FastWeights,
        x: Float[Tensor, "heads batch tokens features"],
        query: Float[Tensor, "heads batch tokens features"],
        ahead: tuple[Gates, InnerGradient] | None = None,
        *,
        last: bool = False,
    ) -> tuple[Float[Tensor, "batch tokens width"], FastWeights, tuple[Gates, Write]]:
        """Read one chunk, then write it.

        Args:
            fast: memories before.
            x: tokens of the chunk.
            query: of the same tokens.
            ahead: what was computed for the chunk at the start of the clip.
            last: whether only the main memory is read afterwards; then only that is written and returned.
        """
        if ahead is None:
            output, gates = self.read(fast, x, query)
            fast, write = self.write(fast, gates, last=last)
        else:
            output, gates = self.recall_main(fast, query), ahead[0]
            fast, write = self.write(fast, *ahead, last=last)
        return output, fast, (gates, write)

    def read(
        self,
        fast: FastWeights,
        x: Float[Tensor, "heads batch tokens features"],
        query: Float[Tensor, "heads batch tokens features"],
    ) -> tuple[Float[Tensor, "batch tokens width"], Gates]:
        """Read all five memories: the main one at the query, the others at the input."""
        out = self.normed(recall_at_both(x, query, fast.w1, fast.w2), slice(None))
        return out[MAIN], self._gates(self.split(out[:MAIN], 1))

    def read_gates(self, fast: FastWeights, x: Float[Tensor, "heads batch tokens features"]) -> Gates:
        """Read all memories but the main one."""
        z = x.expand(MAIN, *x.shape)
        return self._gates(self.split(self.normed(recall(z, fast.w1[:MAIN], fast.w2[:MAIN]), slice(MAIN)), 1))

    def disagreement(self, fast: FastWeights, gates: Gates) -> Float[Tensor, "batch tokens"]:
        """Squared distance of what the main memory recalls at a chunk's keys to its values, mean over features.

        Counted twice: once for the keys, with the values held, once for the values. The memory is held in both.
        """
        held = (w[-1:].detach() for w in (fast.w1, fast.w2))
        recalled = recall(gates.key.unsqueeze(0), *held)[0]
        apart = (recalled - gates.value.detach()).square() + (recalled.detach() - gates.value).square()
        return apart.mean(dim=(0, 3))

    def of_frames(
        self, chunks: Sequence[Float[Tensor, "copies tokens"]], shape: Sequence[int]
    ) -> Float[Tensor, "batch frames"]:
        """Means over the tokens of each frame, from those of chunks; none for frames of a last chunk without any."""
        batch, _, tokens = shape[:3]
        if not chunks:
            return at_least_fp32(self.w1).new_zeros(batch, 0)
        together = torch.cat(list(chunks), dim=1)
        if self.config.scope == "batch":
            return together.view(-1, batch, tokens).mean(-1).T
        return together.view(batch, -1, tokens).mean(-1)

    def at_start(self, chunks: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Gates, InnerGradient]]:
        """Gates and inner gradients of all chunks at the trained memories, those of equal length in one batch."""
        start, found = self.start(), []
        for _, group in groupby((x for x, _ in chunks), key=lambda x: x.shape[2]):
            x = torch.stack(list(group), dim=2)
            gates = self.read_gates(start, x.flatten(1, 2))
            gradient = self.inner_gradient(self.select(start, self.written), gates)
            found += zip(_chunks_of(gates, x.shape[2], 1), _chunks_of(gradient, x.shape[2], 2), strict=True)
        return found

    def _gates(self, out: Float[Tensor, "4 heads batch tokens features"]) -> Gates:
        config, tokens = self.config, out.shape[-2]
        key, value = unit(out[KEY]), unit(out[VALUE])
        step_size = torch.sigmoid(out[ETA].mean(dim=-1, keepdim=True)) * (config.eta_max / tokens)
        logit = self.retention_logit(out[ALPHA].mean(dim=-1, keepdim=True))
        if config.chunk_rule != "token_exact":
            return Gates(key, value, step_size, torch.sigmoid(logit.mean(dim=-2, keepdim=True)), None)
        # Each token keeps the tokens-th root, so that a chunk keeps as much as under the other rules.
        kept = F.logsigmoid(logit) / tokens
        return Gates(key, value, step_size, kept.sum(dim=-2, keepdim=True).exp(), kept.exp())

    @torch.no_grad()
    def _trace(
        self, gates: list[Gates], written: list[Write], full: FastWeights, fast: FastWeights, shape: Sequence[int]
    ) -> MemoryTrace:
        """Figures of the writes; `full` are all memories as last known, `fast` those after the last write."""
        batch, frames = shape[:2]
        norm_ratio, drift = self._moved(full, fast, batch)
        none = fast.w1.new_zeros(batch, 0)
        levels = fast.w1.new_zeros(batch, frames, 0)
        if not written:
            each = none.unsqueeze(-1).expand(batch, 0, len(self.names))
            return MemoryTrace(none, none, none, none, none, none, each, each, norm_ratio, drift, levels, levels)

        def column(figures: list[Tensor]) -> Tensor:
            return torch.stack(figures, dim=1).expand(batch, *[-1] * figures[0].ndim)

        def by_memory(figure: Tensor) -> Tensor:
            rows, zero = dict(zip(self.written[-len(figure) :], figure, strict=True)), torch.zeros_like(figure[0])
            return torch.stack([rows.get(m, zero) for m in range(len(self.names))], dim=1)

        return MemoryTrace(
            surprise=column([w.surprise for w in written]),
            retention=column([w.kept.mean(dim=1) for w in written]),
            retention_min=column([w.kept.amin(dim=1) for w in written]),
            step_size=column([g.step_size.sum(dim=2).mean(dim=(0, 2)) for g in gates]),
            step_size_p99=column([_percentile_99(g.step_size) * g.step_size.shape[2] for g in gates]),
            gate=column([w.written.to(none.dtype) for w in written]),
            write_ratio=column([by_memory(w.ratio) for w in written]),
            limited=column([by_memory(w.limited) for w in written]),
            norm_ratio=norm_ratio,
            drift=drift,
            level_ratio=levels,
            longterm_gate=levels,
        )

    def _moved(self, full: FastWeights, fast: FastWeights, batch: int) -> list[Float[Tensor, "batch memories"]]:
        """Norms of W1 and of its change since the start of the clip, over its trained norm, mean over heads."""
        start = self.start().w1
        if not fast.num_writes:
            return [start.new_full((batch, len(self.names)), value) for value in (1.0, 0.0)]
        size, alone = matrix_norm(start).mean(dim=(1, 2, 3, 4)), len(fast.w1)
        found = []
        for of in (lambda w, w0: w, lambda w, w0: w - w0):
            rows = [matrix_norm(of(full.w1[:-alone], start[:-alone])), matrix_norm(of(fast.w1, start[-alone:]))]
            ends = [row.mean(dim=(1, 3, 4)).expand(-1, batch) for row in rows if len(row)]
            found.append((torch.cat(ends) / size[:, None]).T)
        return found


def _percentile_99(step_size: Float[Tensor, "heads batch tokens each"]) -> Float[Tensor, " batch"]:
    """The smallest number that at least 99 % of a clip's are no larger than."""
    each = step_size.transpose(0, 1).flatten(1)
    return each.kthvalue(math.ceil(0.99 * each.shape[1]), dim=1).values


def chunk_sum(
    apart: Float[Tensor, "batch written"], weights: Float[Tensor, "batch frames"], size: int
) -> Float[Tensor, " batch"]:
    """Sum over chunks of the weighted mean over a chunk's frames that have a weight, of every clip."""
    weights = weights[:, : apart.shape[1]].to(apart.dtype)
    total = apart.new_zeros(len(apart))
    for begin, end in _spans(apart.shape[1], size):
        weight = weights[:, begin:end]
        total = total + (apart[:, begin:end] * weight).sum(1) / (weight > 0).sum(1).clamp_min(1)
    return total


def _spans(frames: int, size: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + size, frames)) for begin in range(0, frames, size)]


def _owned(fast: FastWeights) -> FastWeights:
    """What may outlive the pass: views of the trained memories may not, for a sharded parameter is freed after it."""
    return fast if fast.num_writes else fast._replace(w1=fast.w1.clone(), w2=fast.w2.clone())


def _chunks_of(parts: Gates | InnerGradient, chunks: int, dim: int) -> list[Any]:
    """One of these for each chunk, from tensors whose batch is clips x chunks."""
    split = [None if t is None else t.unflatten(dim, (-1, chunks)).unbind(dim + 1) for t in parts]
    return [type(parts)._make(None if t is None else t[c] for t in split) for c in range(chunks)]
