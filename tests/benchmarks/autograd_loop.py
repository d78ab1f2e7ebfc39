"""The memories of an H block the obvious way: `torch.autograd.grad` for each memory and chunk.

Same outputs and outer gradients as `TitanMemory` with its default rules and chunks of one frame, and like it without
work whose result nothing reads. Clips and heads are batched, so that only the way of writing differs. What `model.py`
measures the closed form against.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hopescale.model.schema import MEMORIES
from hopescale.model.titan import ALPHA, ETA, KEY, MAIN, VALUE, TitanMemory


def autograd_loop(titan: TitanMemory, x: Tensor) -> Tensor:
    """Output [batch, frames, tokens, width] of a pass over x whose memories are dropped after its last read."""
    config, (batch, frames, tokens) = titan.config, x.shape[:3]
    heads, everything = config.heads, range(len(MEMORIES))
    w1, w2 = (w.unsqueeze(1).expand(-1, batch, -1, -1, -1) for w in (titan.w1, titan.w2))
    fast = [(w1[m], w2[m]) for m in everything]
    outputs: list[Tensor] = []
    for frame in range(frames):
        query = F.normalize(split(titan.query(x[:, frame]), heads), dim=-1)
        outputs.append(normed(titan, MAIN, recall(*fast[MAIN], query)))
        if frame == frames - 1:
            break
        inputs = split(x[:, frame], heads)
        read = [split(normed(titan, m, recall(*fast[m], inputs)), heads) for m in (KEY, VALUE, ETA, ALPHA)]
        key, value = (F.normalize(read[m], dim=-1) for m in (KEY, VALUE))
        step = torch.sigmoid(read[ETA].mean(-1, keepdim=True)) * config.eta_max / tokens
        keep = torch.sigmoid(read[ALPHA].mean((-2, -1), keepdim=True) + config.retention_bias)
        # The last frame reads the main memory alone.
        for m in everything if frame < frames - 2 else [MAIN]:
            fast[m] = written(fast[m], key, value, step, keep, config.write_limit)
    return titan.out(torch.stack(outputs, dim=1))


def written(
    memory: tuple[Tensor, Tensor], key: Tensor, value: Tensor, step: Tensor, keep: Tensor, limit: float
) -> tuple[Tensor, Tensor]:
    """One memory after one write."""
    target = recall(memory[0].detach(), memory[1].detach(), value)
    w1, w2 = memory[0].detach().requires_grad_(), memory[1].detach().requires_grad_()
    predicted = recall(w1, w2, key)
    loss = (step * (predicted - target).square()).sum()
    gradients = torch.autograd.grad(loss, (w1, w2), create_graph=True)
    erased = (step * (key @ memory[0].detach().mT)).mT @ key
    change1 = limited(gradients[0] + erased, memory[0].detach(), limit)
    change2 = limited(gradients[1], memory[1].detach(), limit)
    return keep * memory[0] - change1, keep * memory[1] - change2


def limited(delta: Tensor, w: Tensor, limit: float) -> Tensor:
    """A change shrunk smoothly under `limit` times the norm of w."""
    ratio = torch.linalg.vector_norm(delta, dim=(-2, -1), keepdim=True) / torch.linalg.vector_norm(
        w, dim=(-2, -1), keepdim=True
    )
    return delta * torch.rsqrt(1 + (ratio / limit).square())


def recall(w1: Tensor, w2: Tensor, z: Tensor) -> Tensor:
    """One memory of all clips and heads."""
    return z + F.gelu(z @ w1.mT) @ w2.mT


def split(x: Tensor, heads: int) -> Tensor:
    """[batch, tokens, width] as [batch, heads, tokens, features]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def normed(titan: TitanMemory, which: int, out: Tensor) -> Tensor:
    """A memory's output after its LayerNorm, [batch, tokens, width]."""
    merged = F.layer_norm(out.transpose(1, 2).flatten(2), (titan.out.in_features,))
    return merged * titan.norm_weight[which] + titan.norm_bias[which]
