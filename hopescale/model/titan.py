"""Self-modifying Titan memories with a closed-form write (Nested Learning, Eq. 76-91).

Five two-layer residual memories M(z) = z + W2 gelu(W1 z) live in every clip: key, value, eta (step size), alpha
(retention) and main. A chunk of frames is first read with the memories as they are, then written into them. One
write takes the gradient of the inner loss |M(k) - M(v)|^2 in closed form, with the rank-1 preconditioner of the
delta rule folded into it, so it needs neither autograd inside forward nor a matrix product of its own:

    A = K W1^T    H = gelu(A)    U = H W2^T    E = 2 ((U + K) - V^)    S = (E W2) * gelu'(A)
    W1 <- a W1 - (eta * (S + A))^T K        W2 <- a W2 - (eta * E)^T H

Everything here is a pure function of (fast weights, input): nothing is kept on the module, so sharding, activation
checkpointing and several passes per step are safe. Fast weights stay in fp32; under autocast only products are bf16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .schema import MEMORIES, MemoryConfig

KEY, VALUE, ETA, ALPHA, MAIN = range(len(MEMORIES))


class FastWeights(NamedTuple):
    """A clip's own copy of the five memories."""

    w1: Float[Tensor, "memories batch heads hidden features"]
    w2: Float[Tensor, "memories batch heads features hidden"]


class Reading(NamedTuple):
    """What one chunk reads from the memories, before writing into them."""

    output: Float[Tensor, "batch tokens width"]
    key: Float[Tensor, "batch heads tokens features"]
    value: Float[Tensor, "batch heads tokens features"]
    step_size: Float[Tensor, "batch heads tokens 1"]
    retention: Float[Tensor, "batch heads 1 1"]


class MemoryTrace(NamedTuple):
    """Detached figures of the writes of one pass: one column a write (none where nothing was written)."""

    surprise: Float[Tensor, "batch writes"]
    """|v - o|^2 / (|v|^2 + |o|^2) of target v and prediction o, in [0, 2], of the main memory (the first written
    one, if the main memory is only read)."""
    retention: Float[Tensor, "batch writes"]
    write_ratio: Float[Tensor, "batch writes"]
    """Norm of the write over the norm of what it is written into."""
    norm_ratio: Float[Tensor, "batch writes"]
    """Norm of the main memory after the write over its norm at the start of the pass."""


class TitanMemory(nn.Module):
    """The memories of one H block, with the only static projection (queries) and the output projection."""

    def __init__(self, config: MemoryConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.written = sorted(MEMORIES.index(name) for name in config.self_modify)
        self.watched = self.written.index(MAIN) if MAIN in self.written else 0
        heads, features = config.heads, width // config.heads
        hidden = round(config.hidden_multiplier * width / heads)
        self.query = nn.Linear(width, width, bias=False)
        self.w1 = nn.Parameter(torch.empty(len(MEMORIES), heads, hidden, features))
        self.w2 = nn.Parameter(torch.empty(len(MEMORIES), heads, features, hidden))
        self.norm_weight = nn.Parameter(torch.empty(len(MEMORIES), width))
        self.norm_bias = nn.Parameter(torch.empty(len(MEMORIES), width))
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "batch frames tokens width"],
        fast: FastWeights | None = None,
        *,
        writes: bool = True,
        keep_state: bool = False,
    ) -> tuple[Float[Tensor, "batch frames tokens width"], FastWeights | None, MemoryTrace]:
        """Read and write chunk by chunk.

        Args:
            x: normalised tokens of consecutive frames.
            fast: memories to go on from; None starts from the trained ones.
            writes: False only reads.
            keep_state: also write the last chunk and return the memories, for a pass that goes on from here.

        Returns:
            The memories' output, the memories after the last chunk (None unless kept), and figures of the writes.
        """
        batch, frames, tokens, width = x.shape
        fast = self.start(batch) if fast is None else fast
        start_norm = _norm(fast.w1[MAIN].detach()).mean(dim=(1, 2, 3))
        queries = F.normalize(self._split(self.query(x).flatten(1, 2).float()), dim=-1)
        inputs = self._split(x.flatten(1, 2))
        per_chunk = self.config.chunk_size * tokens
        outputs, traces = [], []
        for begin in range(0, frames * tokens, per_chunk):
            end = begin + per_chunk
            reading = self.read(fast, inputs[:, :, begin:end], queries[:, :, begin:end])
            outputs.append(reading.output)
            # A write after the last read of the pass reaches nothing.
            if writes and self.written and (keep_state or end < frames * tokens):
                fast, trace = self.write(fast, reading, start_norm)
                traces.append(trace)
        output = self.out(torch.cat(outputs, dim=1)).view(batch, frames, tokens, width)
        return output, fast if keep_state else None, _stack(traces, x)

    def start(self, batch: int) -> FastWeights:
        """The trained memories, one copy a clip (a copy, because a view would outlive the gathered parameter)."""
        w1, w2 = (w.float().unsqueeze(1).expand(-1, batch, -1, -1, -1).clone() for w in (self.w1, self.w2))
        return FastWeights(w1, w2)

    def read(
        self,
        fast: FastWeights,
        x: Float[Tensor, "batch heads tokens features"],
        query: Float[Tensor, "batch heads tokens features"],
    ) -> Reading:
        """Read all five memories: the main one at the query, the others at the input."""
        z = torch.cat([x.expand(4, *x.shape), query.to(x.dtype).unsqueeze(0)])
        out = z + _product(F.gelu(_product(z, fast.w1)), fast.w2)
        out = F.layer_norm(self._merge(out).float(), (self.out.in_features,))
        out = out * self.norm_weight[:, None, None] + self.norm_bias[:, None, None]
        heads = self._split(out[:MAIN])
        step_size = torch.sigmoid(heads[ETA].mean(dim=-1, keepdim=True)) * (self.config.eta_max / x.shape[-2])
        retention = torch.sigmoid(heads[ALPHA].mean(dim=(-2, -1), keepdim=True) + self.config.retention_bias)
        key, value = F.normalize(heads[KEY], dim=-1), F.normalize(heads[VALUE], dim=-1)
        return Reading(out[MAIN], key, value, step_size, retention)

    def write(
        self, fast: FastWeights, reading: Reading, start_norm: Float[Tensor, " batch"]
    ) -> tuple[FastWeights, MemoryTrace]:
        """Write one chunk into the memories of `self_modify`; see the equations at the top of the file."""
        w1, w2 = _select(fast.w1, self.written), _select(fast.w2, self.written)
        key, value = reading.key, reading.value
        seen1, seen2 = (w1, w2) if self.config.meta_grad == "so" else (w1.detach(), w2.detach())
        if self.config.meta_grad == "fo":
            key, value = key.detach(), value.detach()

        tokens = key.shape[-2]
        inputs = torch.cat([key, value], dim=-2)
        pre = _product(inputs.expand(len(self.written), *inputs.shape), seen1)
        hidden = F.gelu(pre)
        out = _product(hidden, seen2) + inputs
        predicted, target = out[..., :tokens, :], out[..., tokens:, :]
        pre, hidden = pre[..., :tokens, :], hidden[..., :tokens, :]

        error = reading.step_size * (2 * (predicted - target))
        slope = torch.ops.aten.gelu_backward(error @ seen2.to(error.dtype), pre.to(error.dtype))
        delta1 = (slope + reading.step_size * pre).transpose(-1, -2) @ key
        delta2 = error.transpose(-1, -2) @ hidden.to(error.dtype)
        delta1, delta2 = (
            _limit(delta1.float(), seen1, self.config.write_limit),
            _limit(delta2.float(), seen2, self.config.write_limit),
        )
        new1, new2 = reading.retention * w1 - delta1, reading.retention * w2 - delta2
        fast = FastWeights(_replace(fast.w1, self.written, new1), _replace(fast.w2, self.written, new2))
        with torch.no_grad():
            trace = MemoryTrace(
                surprise=_surprise(predicted[self.watched], target[self.watched]),
                retention=reading.retention.detach().mean(dim=(1, 2, 3)),
                write_ratio=(_norm(delta1) / _norm(seen1)).mean(dim=(0, 2, 3, 4)),
                norm_ratio=_norm(fast.w1[MAIN].detach()).mean(dim=(1, 2, 3)) / start_norm,
            )
        return fast, trace

    def _split(self, x: Float[Tensor, "*lead tokens width"]) -> Float[Tensor, "*lead heads tokens features"]:
        return x.unflatten(-1, (self.config.heads, -1)).transpose(-2, -3)

    def _merge(self, x: Float[Tensor, "*lead heads tokens features"]) -> Float[Tensor, "*lead tokens width"]:
        return x.transpose(-2, -3).flatten(-2)


def _product(z: Tensor, w: Tensor) -> Tensor:
    return z @ w.transpose(-1, -2).to(z.dtype)


def _norm(w: Tensor) -> Tensor:
    return w.square().sum(dim=(-2, -1), keepdim=True).sqrt()


def _limit(delta: Tensor, w: Tensor, share: float) -> Tensor:
    """Shrink a write smoothly so that its norm stays under `share` of the written matrix's norm."""
    bound = share**2 * w.square().sum(dim=(-2, -1), keepdim=True) + torch.finfo(torch.float32).tiny
    return delta * torch.rsqrt(1 + delta.square().sum(dim=(-2, -1), keepdim=True) / bound)


def _surprise(predicted: Tensor, target: Tensor) -> Tensor:
    error, scale = (predicted - target).square().sum(-1), predicted.square().sum(-1) + target.square().sum(-1)
    return (error / scale).mean(dim=(1, 2)).float()


def _select(w: Tensor, which: list[int]) -> Tensor:
    return w if len(which) == w.shape[0] else w[which]


def _replace(w: Tensor, which: list[int], new: Tensor) -> Tensor:
    return new if len(which) == w.shape[0] else w.to(new.dtype).index_copy(0, torch.tensor(which, device=w.device), new)


def _stack(traces: list[MemoryTrace], like: Tensor) -> MemoryTrace:
    if not traces:
        return MemoryTrace(*(like.new_zeros(like.shape[0], 0, dtype=torch.float32) for _ in MemoryTrace._fields))
    return MemoryTrace(*(torch.stack(column, dim=1) for column in zip(*traces, strict=True)))
