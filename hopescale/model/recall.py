"""Reading a memory, and products of tokens with matrices that each clip has of its own or shares with the others."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .precision import product_dtype


def recall(
    z: Float[Tensor, "memories heads batch tokens features"],
    w1: Float[Tensor, "memories heads copies hidden features"],
    w2: Float[Tensor, "memories heads copies features hidden"],
) -> Float[Tensor, "memories heads batch tokens features"]:
    """M(z) = z + W2 gelu(W1 z) (Nested Learning, Eq. 89), differentiable once."""
    return cast(Tensor, _Recall.apply(z, w1, w2, product_dtype(z)))


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
    def forward(ctx: Any, z: Tensor, w1: Tensor, w2: Tensor, dtype: torch.dtype) -> Tensor:
        pre = times(z.to(dtype), w1.to(dtype))
        ctx.save_for_backward(z, w1, w2, pre)
        return z + times(F.gelu(pre), w2.to(dtype)).to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, w1, w2, pre = ctx.saved_tensors
        dtype = pre.dtype
        g_out = g.to(dtype)
        g_pre = torch.ops.aten.gelu_backward(times(g_out, w2.to(dtype).mT), pre)
        g_z = g_w1 = g_w2 = None
        if ctx.needs_input_grad[0]:
            g_z = g + times(g_pre, w1.to(dtype).mT).to(g.dtype)
        if ctx.needs_input_grad[1]:
            g_w1 = outer(g_pre, z.to(dtype), w1)
        if ctx.needs_input_grad[2]:
            g_w2 = outer(g_out, F.gelu(pre), w2)
        return g_z, g_w1, g_w2, None
