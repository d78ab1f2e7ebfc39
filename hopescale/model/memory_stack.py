"""Two-layer residual memories: how they start a clip, and how a chunk of tokens is read from and written into them.

What all memories share: the five of an H block (`titan.py`), the one of a U block (`compact_titan.py`), and those that
outlive a clip (`longterm.py`). They differ in where keys, values and gates come from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .inner_gradient import InnerGradient
from .precision import at_least_fp32
from .recall import recall
from .schema import MemoryConfig, MemoryName
from .write_rules import FastWeights, Gates, Write, anchored, apply_write, detached, frame_step, token_exact


class MemoryStack(nn.Module):
    """Memories M(z) = z + W2 gelu(W1 z) of equal size (Nested Learning, Eq. 89), and the norm after each.

    Args:
        config: heads, and how the memories are written.
        width: features of a token.
        hidden_multiplier: hidden features of a memory per feature of width.
        names: of the memories, the main one last; those that `config.self_modify` names are written.
    """

    def __init__(self, config: MemoryConfig, width: int, hidden_multiplier: float, names: Sequence[MemoryName]) -> None:
        super().__init__()
        self.config, self.names = config, names
        # Under `scan` all but the main one are read at the start of the clip alone: writing them would reach nothing.
        written = ("main",) if config.chunk_rule == "scan" and config.self_modify else config.self_modify
        self.written = [number for number, name in enumerate(names) if name in written]
        heads, features = config.heads, width // config.heads
        hidden = round(hidden_multiplier * width / heads)
        self.w1 = nn.Parameter(torch.empty(len(names), heads, hidden, features))
        self.w2 = nn.Parameter(torch.empty(len(names), heads, features, hidden))
        self.norm_weight = nn.Parameter(torch.empty(len(names), width))
        self.norm_bias = nn.Parameter(torch.empty(len(names), width))

    def start(self) -> FastWeights:
        """The trained memories, shared by all clips until the first write gives each its own."""
        return FastWeights(at_least_fp32(self.w1).unsqueeze(2), at_least_fp32(self.w2).unsqueeze(2))

    def recall_main(
        self, fast: FastWeights, query: Float[Tensor, "heads batch tokens features"]
    ) -> Float[Tensor, "batch tokens width"]:
        """Read the main memory alone."""
        return self.normed(recall(query.unsqueeze(0), fast.w1[-1:], fast.w2[-1:]), slice(-1, None))[0]

    def write(
        self, fast: FastWeights, gates: Gates, gradient: InnerGradient | None = None, *, last: bool = False
    ) -> tuple[FastWeights, Write]:
        """Write one chunk into the memories of `self_modify`.

        Args:
            fast: memories to write into.
            gates: keys, values and gates of the chunk.
            gradient: what it writes; unless given, that at `fast`.
            last: whether all that is read afterwards is the main memory, which then alone is written and returned.
        """
        config, number = self.config, fast.num_writes
        every, which = config.detach_interval, self.written[-1:] if last else self.written
        chosen = self.select(fast, which)
        if config.detach_rule == "keep_start" and every and number and number % every == 0:
            chosen = anchored(chosen, self.select(self.start(), which))
        if gradient is None:
            gradient = self.inner_gradient(chosen, gates)
        elif last:
            gradient = InnerGradient(*(part[-1:] for part in gradient))
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.meta_grad != "straight_through"):
            new, write = apply_write(
                chosen,
                gradient,
                gates.retention,
                limit=config.write_limit,
                momentum=config.momentum,
                gate=config.surprise_gate,
                live=config.meta_grad == "so",
            )
        new = new._replace(num_writes=number + 1)
        if config.meta_grad == "straight_through":
            new = anchored(new, self.select(self.start(), which))
        if config.detach_rule == "all" and every and (number + 1) % every == 0:
            new = detached(new)
        return new if last else self._replace(fast, new), write

    def inner_gradient(self, chosen: FastWeights, gates: Gates) -> InnerGradient:
        """What a chunk writes into these memories, as far as `meta_grad` lets the outer gradient see it."""
        config = self.config
        if config.meta_grad != "so":
            chosen = chosen._replace(w1=chosen.w1.detach(), w2=chosen.w2.detach())
        if config.meta_grad == "fo":
            gates = gates._replace(key=gates.key.detach(), value=gates.value.detach())
        rule = token_exact if config.chunk_rule == "token_exact" else frame_step
        return rule(chosen, gates, config.preconditioner)

    def retention_logit(self, alpha: Tensor) -> Tensor:
        """Logit of the share that is kept, of the same shape: infinite where nothing may be forgotten."""
        return alpha + self.config.retention_bias if self.config.retention else torch.full_like(alpha, torch.inf)

    def normed(
        self, out: Float[Tensor, "memories heads batch tokens features"], rows: slice
    ) -> Float[Tensor, "memories batch tokens width"]:
        """What the memories of these rows recalled, heads side by side again, after the norm of each."""
        merged = F.layer_norm(out.movedim(1, -2).flatten(-2), self.norm_weight.shape[-1:])
        return merged * at_least_fp32(self.norm_weight[rows, None, None]) + at_least_fp32(
            self.norm_bias[rows, None, None]
        )

    def split(self, x: Float[Tensor, "*lead tokens width"], at: int) -> Float[Tensor, "*lead heads tokens features"]:
        """Heads stand before the batch, so that clips that share a memory are one matrix of tokens."""
        return x.unflatten(-1, (self.config.heads, -1)).movedim(-2, at)

    def select(self, fast: FastWeights, which: Sequence[int]) -> FastWeights:
        """These memories of all; momenta are of written ones alone."""
        if len(which) == len(self.names):
            return fast
        momenta = (None if m is None else m[-len(which) :] for m in (fast.momentum1, fast.momentum2))
        first, end = which[0], which[-1] + 1
        if end - first == len(which):
            w1, w2 = fast.w1[first:end], fast.w2[first:end]
        else:
            w1, w2 = (torch.stack([w[m] for m in which]) for w in (fast.w1, fast.w2))
        return FastWeights(w1, w2, *momenta, num_writes=fast.num_writes)

    def _replace(self, fast: FastWeights, new: FastWeights) -> FastWeights:
        """All memories, of which the written ones are `new`."""
        if len(self.written) == len(self.names):
            return new
        both = []
        for old, changed in ((fast.w1, new.w1), (fast.w2, new.w2)):
            rows = list(old.expand(-1, -1, changed.shape[2], -1, -1).unbind(0))
            for number, row in zip(self.written, changed.unbind(0), strict=True):
                rows[number] = row
            both.append(torch.stack(rows))
        return new._replace(w1=both[0], w2=both[1])
