"""The gradient of the inner loss in closed form, and the gradient of that gradient in closed form too.

A memory M(z) = z + W2 gelu(W1 z) is written with the gradient of |M(k) - M(v)|^2, summed over tokens with a step size
each (Nested Learning, Eq. 83-90). Tokens are rows; every product with H in it is a matrix product over all tokens:

    A = K W1^T     Hd = gelu(A)     E = 2 (K + Hd W2^T - V^)     S = (E W2) * gelu'(A)
    G1 = (S + A)^T (eta * K)        G2 = (eta * E)^T Hd

The A in G1 is the rank-1 preconditioner of the delta rule, W1 k k^T, which so costs no product of its own. Left to
autograd, this would keep about three times as many wide tensors and differentiate gelu' term by term.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .precision import product_dtype
from .recall import outer, times


class InnerGradient(NamedTuple):
    """What one chunk writes, before limit and retention. `copies` is batch, or 1 where clips share one memory."""

    delta1: Float[Tensor, "memories heads batch hidden features"]
    delta2: Float[Tensor, "memories heads batch features hidden"]
    predicted: Float[Tensor, "memories heads batch tokens features"]
    """M(k), detached."""
    target: Float[Tensor, "memories heads batch tokens features"]
    """M(v), detached."""


def inner_gradient(
    w1: Float[Tensor, "memories heads copies hidden features"],
    w2: Float[Tensor, "memories heads copies features hidden"],
    key: Float[Tensor, "heads batch tokens features"],
    value: Float[Tensor, "heads batch tokens features"],
    step_size: Float[Tensor, "heads batch tokens each"],
    *,
    preconditioner: bool,
) -> InnerGradient:
    """Gradients of the inner loss with respect to both matrices of every memory, summed over tokens.

    Differentiable once in all arguments; a detached argument costs nothing in backward. Products run in autocast's
    type, everything else in that of the weights.
    """
    found = _InnerGradient.apply(w1, w2, key, value, step_size, preconditioner, product_dtype(w1))
    return InnerGradient(*cast(tuple[Tensor, Tensor, Tensor, Tensor], found))


class _InnerGradient(torch.autograd.Function):
    """Keeps A (of keys and values), E W2 and E; computes gelu and its derivatives again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        w1: Tensor,
        w2: Tensor,
        key: Tensor,
        value: Tensor,
        step_size: Tensor,
        preconditioner: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        v1, v2 = w1.to(dtype), w2.to(dtype)
        tokens = key.shape[-2]
        inputs = torch.cat([key, value], dim=-2)
        pre = times(inputs.to(dtype), v1)
        hidden = F.gelu(pre)
        recalled = times(hidden, v2).to(key.dtype) + inputs
        predicted, target = recalled[..., :tokens, :], recalled[..., tokens:, :]
        error = 2 * (predicted - target)
        pull = times(error.to(dtype), v2.mT)
        slope = torch.ops.aten.gelu_backward(pull, pre[..., :tokens, :])
        if preconditioner:
            slope += pre[..., :tokens, :]
        # The step size goes to the narrow side of each product.
        delta1 = (slope.mT @ (step_size * key).to(dtype)).to(w1.dtype)
        delta2 = ((step_size * error).to(dtype).mT @ hidden[..., :tokens, :]).to(w2.dtype)
        ctx.save_for_backward(w1, w2, key, value, step_size, pre, pull, error)
        ctx.preconditioner, ctx.dtype = preconditioner, dtype
        ctx.mark_non_differentiable(predicted, target)
        ctx.set_materialize_grads(False)
        return delta1, delta2, predicted, target

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g1: Tensor | None, g2: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        w1, w2, key, value, step_size, pre, pull, error = ctx.saved_tensors
        needs, dtype = ctx.needs_input_grad, ctx.dtype
        needs_w, needs_z = needs[0] or needs[1], needs[2] or needs[3]
        tokens = key.shape[-2]
        pre_key = pre[..., :tokens, :]
        used = pre if needs_w or needs_z else pre_key
        hidden, steep = F.gelu(used), gelu_slope(used)
        steep_key = steep[..., :tokens, :]
        # G1 = Q^T (eta K), Q = S + A; G2 = (eta E)^T Hd: `moved` are the gradients of eta K and eta E.
        slope = torch.addcmul(pre_key, pull, steep_key) if ctx.preconditioner else pull * steep_key
        g1, g2 = _given(g1, w1).to(dtype), _given(g2, w2).to(dtype)
        moved_key = (slope @ g1).to(key.dtype).sum(0)
        moved_error = times(hidden[..., :tokens, :], g2).to(key.dtype)
        g_step = (moved_key * key + (moved_error * error).sum(0)).sum_to_size(step_size.shape)
        if not (needs_w or needs_z):
            return None, None, None, None, g_step, None, None

        v1, v2 = w1.to(dtype), w2.to(dtype)
        g_slope = times((step_size * key).to(dtype), g1)
        g_hidden = (step_size * error).to(dtype) @ g2
        # S = pull * gelu'(A), pull = E W2
        g_pull = g_slope * steep_key
        g_error = step_size * moved_error + times(g_pull, v2).to(key.dtype)
        pulled = 2 * g_error
        # Prediction and target are the same function of key and value: one product serves both.
        shared = times(pulled.to(dtype), v2.mT)
        g_pre = torch.empty_like(pre)
        g_pre_key = torch.mul(g_hidden.add_(shared), steep_key, out=g_pre[..., :tokens, :])
        g_pre_key.addcmul_(g_slope, gelu_curvature(pre_key).mul_(pull).add_(int(ctx.preconditioner)))
        torch.mul(shared, steep[..., tokens:, :], out=g_pre[..., tokens:, :]).neg_()

        g_w1 = g_w2 = g_key = g_value = None
        if needs_z:
            narrow = (times(g_pre, v1.mT).to(key.dtype)).sum(0)
            straight = pulled.sum(0)
            g_key = narrow[..., :tokens, :] + straight + step_size * moved_key
            g_value = narrow[..., tokens:, :] - straight
        if needs_w:
            inputs = torch.cat([key, value], dim=-2).to(dtype)
            both = torch.cat([pulled, -pulled], dim=-2).to(dtype)
            g_w1 = outer(g_pre, inputs, w1)
            g_w2 = outer(error.to(dtype), g_pull, w2) + outer(both, hidden, w2)
        return g_w1, g_w2, g_key, g_value, g_step, None, None


def gelu_slope(x: Tensor) -> Tensor:
    """First derivative of the exact gelu."""
    return torch.ops.aten.gelu_backward(torch.ones((), dtype=x.dtype, device=x.device).expand_as(x), x)


def gelu_curvature(x: Tensor) -> Tensor:
    """Second derivative of the exact gelu: phi(x) (2 - x^2), phi the normal density."""
    square = x * x
    density = torch.mul(square, -0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
    return density.mul_(square.neg_().add_(2))


def _given(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient
