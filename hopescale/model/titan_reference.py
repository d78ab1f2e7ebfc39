"""The memories written for reading: clip by clip, chunk by chunk, memory by memory, head by head, by autograd.

What `titan.py` must equal, outputs and outer gradients, and what its speed is measured against. `memory.scope: clip`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from .schema import MEMORIES, MemoryConfig, MemoryName
from .titan import ALPHA, ETA, KEY, MAIN, VALUE, TitanMemory

Matrices = dict[tuple[int, int], tuple[Tensor, Tensor]]
"""W1 [hidden, features] and W2 [features, hidden] by (memory, head)."""


def titan_reference(
    titan: TitanMemory, x: Float[Tensor, "batch frames tokens width"]
) -> tuple[Float[Tensor, "batch frames tokens width"], list[Matrices]]:
    """Output of all clips, and the memories of each after its last chunk, which is written too."""
    passes = [_clip(titan, clip) for clip in x]
    return torch.stack([output for output, _ in passes]), [fast for _, fast in passes]


def _clip(titan: TitanMemory, x: Float[Tensor, "frames tokens width"]) -> tuple[Tensor, Matrices]:
    config, outputs = titan.config, []
    trained = {(m, h): (titan.w1[m, h], titan.w2[m, h]) for m in range(len(MEMORIES)) for h in range(config.heads)}
    fast, moving = dict(trained), {}
    # Under `scan` only the main memory is ever read after the start of the clip.
    written: tuple[MemoryName, ...] = ("main",) if config.chunk_rule == "scan" else config.self_modify
    for number, chunk in enumerate(x.split(config.chunk_size)):
        tokens = chunk.flatten(0, 1)
        query = torch.cat([_unit(part) for part in titan.query(tokens).chunk(config.heads, dim=-1)], dim=-1)
        outputs.append(_read(titan, fast, MAIN, query).view_as(chunk))
        seen = trained if config.chunk_rule == "scan" else fast
        gates = [_read(titan, seen, m, tokens).chunk(config.heads, dim=-1) for m in (KEY, VALUE, ETA, ALPHA)]
        if config.detach_rule == "keep_start" and _due(number, config.detach_interval):
            fast, moving = _anchor(fast, trained), _detach(moving)
        seen = trained if config.chunk_rule == "scan" else fast
        surprises = [_surprise(seen[MAIN, h], gates[KEY][h], gates[VALUE][h]) for h in range(config.heads)]
        opened = float(torch.stack(surprises).mean()) >= config.surprise_gate
        for at in _places(written, config.heads):
            if opened:
                h = at[1]
                keep, delta = _change(config, seen[at], *(gates[which][h] for which in (KEY, VALUE, ETA, ALPHA)))
                now = fast[at] if config.meta_grad == "so" else _sg(fast[at])
                change = [_limited(d, w, config.write_limit) for d, w in zip(delta, now, strict=True)]
                if config.momentum:
                    last = moving.get(at, (0.0, 0.0))
                    change = [c + config.momentum * s for c, s in zip(change, last, strict=True)]
                    moving[at] = (change[0], change[1])
                fast[at] = (keep * fast[at][0] - change[0], keep * fast[at][1] - change[1])
        if config.meta_grad == "straight_through":
            fast, moving = _anchor(fast, trained), _detach(moving)
        if config.detach_rule == "all" and _due(number + 1, config.detach_interval):
            fast, moving = fast | _detach({at: fast[at] for at in _places(written, config.heads)}), _detach(moving)
    return titan.out(torch.cat(outputs)), fast


def _read(titan: TitanMemory, fast: Matrices, which: int, z: Float[Tensor, "tokens width"]) -> Tensor:
    heads = titan.config.heads
    parts = [_recall(*fast[which, h], part) for h, part in enumerate(z.chunk(heads, dim=-1))]
    out = F.layer_norm(torch.cat(parts, dim=-1), (z.shape[-1],))
    return out * titan.norm_weight[which] + titan.norm_bias[which]


def _change(
    config: MemoryConfig, memory: tuple[Tensor, Tensor], key: Tensor, value: Tensor, eta: Tensor, alpha: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Share that is kept, and what is taken from the kept matrices, before the limit."""
    tokens = len(key)
    key, value = _unit(key), _unit(value)
    step = torch.sigmoid(eta.mean(-1)) * config.eta_max / tokens
    logits = alpha.mean(-1) + config.retention_bias
    seen = memory if config.meta_grad == "so" else _sg(memory)
    if config.meta_grad in ("fo", "straight_through"):
        key, value = key.detach(), value.detach()
    if config.chunk_rule != "token_exact":
        keep = torch.sigmoid(logits.mean()) if config.retention else logits.new_ones(())
        grad1, grad2 = _inner_gradient(seen, key, value, step)
        erased = (step[:, None] * (key @ seen[0].T)).T @ key if config.preconditioner else 0
        return keep, (grad1 + erased, grad2)
    w1, w2, whole = *seen, logits.new_ones(())
    for p in range(tokens):
        keep = torch.sigmoid(logits[p]) ** (1 / tokens) if config.retention else logits.new_ones(())
        grad1, grad2 = _inner_gradient(seen, key[p : p + 1], value[p : p + 1], step[p : p + 1])
        erased = step[p] * torch.outer(w1 @ key[p], key[p]) if config.preconditioner else 0
        w1, w2, whole = keep * w1 - erased - grad1, keep * w2 - grad2, whole * keep
    return whole, (whole * seen[0] - w1, whole * seen[1] - w2)


def _inner_gradient(memory: tuple[Tensor, Tensor], key: Tensor, value: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Of the sum over tokens of step |M(k) - M(v)|^2; M(v) is a constant of this loss, not of the outer one."""
    inner = (memory[0] + 0).requires_grad_(), (memory[1] + 0).requires_grad_()
    target = _recall(*memory, value)
    with torch.enable_grad():
        loss = (step[:, None] * (_recall(*inner, key) - target).square()).sum()
        grad1, grad2 = torch.autograd.grad(loss, inner, create_graph=True)
    return grad1, grad2


def _limited(delta: Tensor, w: Tensor, share: float) -> Tensor:
    return delta / (1 + (delta.norm() / (share * w.norm())).square()).sqrt()


def _surprise(memory: tuple[Tensor, Tensor], key: Tensor, value: Tensor) -> Tensor:
    predicted, target = _recall(*memory, _unit(key)).detach(), _recall(*memory, _unit(value)).detach()
    scale = predicted.square().sum(-1) + target.square().sum(-1)
    return ((predicted - target).square().sum(-1) / scale).mean()


def _recall(w1: Tensor, w2: Tensor, z: Tensor) -> Tensor:
    return z + F.gelu(z @ w1.T) @ w2.T


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def _places(names: tuple[MemoryName, ...], heads: int) -> list[tuple[int, int]]:
    return [(MEMORIES.index(name), h) for name in names for h in range(heads)]


def _due(number: int, interval: int) -> bool:
    return interval > 0 and number > 0 and number % interval == 0


def _sg(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0].detach(), pair[1].detach()


def _detach(fast: Matrices) -> Matrices:
    return {at: _sg(pair) for at, pair in fast.items()}


def _anchor(fast: Matrices, trained: Matrices) -> Matrices:
    return {
        at: (pair[0].detach() + (w1 - w1.detach()), pair[1].detach() + (w2 - w2.detach()))
        for at, pair in fast.items()
        for w1, w2 in (trained[at],)
    }
