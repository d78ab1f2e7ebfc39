"""The memory of a U block: a single one, with static keys, values and gates.

    q, k, v = W_q x, W_k x, W_v x     y = M(q)     eta = eta_max sigmoid(b_eta) / tokens     a = sigmoid(b_a + b)
    W1 <- W1 diag(a) - (S + A)^T K diag(eta)             W2 <- diag(a) W2 - diag(eta) E^T Hd

One step size and one retention a feature are trained, b_eta and b_a, with b = `memory.retention_bias`; keys, values and
queries have length 1. Everything else is as for the five memories of an H block (`titan.py`): the inner loss
|M(k) - M(v)|^2, reads before writes, heads, and what may be chosen about a write. Only `chunk_rule: token_exact` cannot
be, for its closed form takes one step size and one retention a token.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .precision import at_least_fp32
from .recall import unit
from .schema import LongTermConfig, MemoryConfig, MemoryName
from .titan import TitanMemory
from .write_rules import FastWeights, Gates


class CompactTitan(TitanMemory):
    """The main memory alone, with projections for queries, keys, values and output."""

    memories: ClassVar[tuple[MemoryName, ...]] = ("main",)

    def __init__(self, config: MemoryConfig, width: int, longterm: LongTermConfig | None = None) -> None:
        super().__init__(config, width, longterm)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.eta_bias = nn.Parameter(torch.empty(width))
        self.alpha_bias = nn.Parameter(torch.empty(width))

    def inputs(self, x: Float[Tensor, "batch frames tokens width"]) -> Float[Tensor, "1 batch frames tokens width"]:
        """The tokens themselves: what is not written needs no keys and values."""
        return x.unsqueeze(0)

    def read(
        self,
        fast: FastWeights,
        x: Float[Tensor, "1 batch tokens width"],
        query: Float[Tensor, "heads batch tokens features"],
    ) -> tuple[Float[Tensor, "batch tokens width"], Gates]:
        """Read the memory at the query; keys, values and gates do not depend on it."""
        return self.recall_main(fast, query), self.read_gates(fast, x)

    def read_gates(self, fast: FastWeights, x: Float[Tensor, "1 batch tokens width"]) -> Gates:
        """Project keys and values; gates are the same for all tokens."""
        key, value = (unit(self.split(at_least_fp32(project(x.squeeze(0))), 0)) for project in (self.key, self.value))
        heads, batch, tokens, features = key.shape
        step_size = torch.sigmoid(self._by_head(self.eta_bias)) * (self.config.eta_max / tokens)
        retention = torch.sigmoid(self.retention_logit(self._by_head(self.alpha_bias))).expand(
            heads, batch, 1, features
        )
        return Gates(key, value, step_size.expand(key.shape), retention, None)

    def _by_head(self, vector: Float[Tensor, " width"]) -> Float[Tensor, "heads 1 1 features"]:
        return at_least_fp32(vector).view(self.config.heads, 1, 1, -1)
