"""Reading a memory, and products of tokens with matrices that each clip has of its own or shares with the others."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .precision import product_dtype

TINY = 1e-12
"""Below this a norm counts as 0."""


def recall(
    z: Float[Tensor, "memories heads batch tokens features"],
    w1: Float[Tensor, "memories heads copies hidden features"],
    w2: Float[Tensor, "memories heads copies features hidden"],
) -> Float[Tensor, "memories heads batch tokens features"]:
    """M(z) = z + W2 gelu(W1 z) (Nested Learning, Eq. 89), differentiable once."""
    return cast(Tensor, _Recall.apply(z, None, w1, w2, product_dtype(z)))


def recall_at_both(
    x: Float[Tensor, "heads batch tokens features"],
    query: Float[Tensor, "heads batch tokens features"],
    w1: Float[Tensor, "memories heads copies hidden features"],
    w2: Float[Tensor, "memories heads copies features hidden"],
) -> Float[Tensor, "memories heads batch tokens features"]:
    """The last memory read at the query, the others at x, in one product; keeps no copy of either for a memory."""
    return cast(Tensor, _Recall.apply(x, query, w1, w2, product_dtype(x)))


def unit(x: Float[Tensor, "*lead features"]) -> Float[Tensor, "*lead features"]:
    """Vectors at length 1, differentiable once; keeps the result, which is read anyway, instead of x."""
    return cast(Tensor, _Unit.apply(x))


def times(
    z: Float[Tensor, "*memories heads batch tokens i"], w: Float[Tensor, "memories heads copies o i"]
) -> Float[Tensor, "memories heads batch tokens o"]:
    """The product z w^T for every clip's own w, or for all clips at once where they share it."""
    batch = z.shape[-3]
    if w.shape[2] == batch:
        return z @ w.mT
    return (z.flatten(-3, -2) @ w.squeeze(2).mT).unflatten(-2, (batch, -1))


def outer(
    a: Float[Tensor, "memories heads batch tokens o"], b: Float[Tensor, "*memories heads batch tokens i"], like: Tensor
) -> Float[Tensor, "memories heads copies o i"]:
    """The gradient a^T b of a matrix, summed over tokens, and over clips where they share the matrix `like`."""
    if like.shape[2] == a.shape[-3]:
        return (a.mT @ b).to(like.dtype)
    return (a.flatten(-3, -2).mT @ b.flatten(-3, -2)).unsqueeze(2).to(like.dtype)


class _Recall(torch.autograd.Function):
    """Keeps W1 z alone of the wide tensors, and computes its gelu again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, query: Tensor | None, w1: Tensor, w2: Tensor, dtype: torch.dtype) -> Tensor:
        z = _read_at(x, query, len(w1))
        pre = times(z.to(dtype), w1.to(dtype))
        ctx.save_for_backward(x, query, w1, w2, pre)
        return z + times(F.gelu(pre), w2.to(dtype)).to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, query, w1, w2, pre = ctx.saved_tensors
        dtype = pre.dtype
        g_out = g.to(dtype)
        g_pre = torch.ops.aten.gelu_backward(times(g_out, w2.to(dtype).mT), pre)
        g_x = g_query = g_w1 = g_w2 = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            g_z = g + times(g_pre, w1.to(dtype).mT).to(g.dtype)
            g_x, g_query = (g_z, None) if query is None else (g_z[:-1].sum(0), g_z[-1])
        if ctx.needs_input_grad[2]:
            g_w1 = outer(g_pre, _read_at(x, query, len(w1)).to(dtype), w1)
        if ctx.needs_input_grad[3]:
            g_w2 = outer(g_out, F.gelu(pre), w2)
        return g_x, g_query, g_w1, g_w2, None


def _read_at(x: Tensor, query: Tensor | None, memories: int) -> Tensor:
    return x if query is None else torch.cat([x.expand(memories - 1, *x.shape), query.unsqueeze(0)])


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(TINY)
        result = x / size
        ctx.save_for_backward(result, size)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        result, size = ctx.saved_tensors
        # What is too short to be brought to length 1 is only divided.
        along = torch.linalg.vecdot(g, result).unsqueeze(-1) * (size > TINY)
        return torch.addcmul(g, result, along, value=-1).div_(size)
