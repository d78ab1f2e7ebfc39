"""How one chunk is written into the memories: its change of each matrix, limited, added with momentum and retention.

`frame_step` is one gradient step on all tokens of a chunk; `token_exact` is the recurrence of the paper, a step and a
decay at every token, solved as a triangular system instead of a loop (Nested Learning, Eq. 88-91).
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .inner_gradient import InnerGradient, inner_gradient
from .recall import TINY, times


class FastWeights(NamedTuple):
    """The memories of every clip; `copies` is 1 while all clips still share the trained ones."""

    w1: Float[Tensor, "memories heads copies hidden features"]
    w2: Float[Tensor, "memories heads copies features hidden"]
    momentum1: Float[Tensor, "memories heads copies hidden features"] | None = None
    """What the last writes changed, of the memories that are written, where `memory.momentum` > 0."""
    momentum2: Float[Tensor, "memories heads copies features hidden"] | None = None
    num_writes: int = 0
    """Since the start of the clip."""
    longterm: FastWeights | None = None
    """The block's long-term memory, between passes that go on from each other, if it has one."""


class Gates(NamedTuple):
    """Keys, values and gates that one chunk reads from the memories, and writes with.

    The last dim of step sizes and retention is 1, or as long as features where each feature has its own.
    """

    key: Float[Tensor, "heads batch tokens features"]
    value: Float[Tensor, "heads batch tokens features"]
    step_size: Float[Tensor, "heads batch tokens each"]
    retention: Float[Tensor, "heads batch 1 each"]
    """Share of a memory that the chunk as a whole keeps."""
    token_retention: Float[Tensor, "heads batch tokens 1"] | None
    """The same token by token, for `token_exact`; its product over the chunk is `retention`."""


class Write(NamedTuple):
    """What the figures of one write are made of, detached."""

    surprise: Float[Tensor, " batch"]
    """Of the last memory."""
    ratio: Float[Tensor, "memories batch"]
    limited: Float[Tensor, "memories batch"]
    written: Bool[Tensor, " batch"]
    kept: Float[Tensor, "batch heads_each"]
    """Retentions of all heads, 1 for clips that are not written."""


def frame_step(fast: FastWeights, gates: Gates, preconditioner: bool) -> InnerGradient:
    """All tokens of the chunk at once: W1 changes by -(eta (S + A))^T K, W2 by -(eta E)^T Hd, besides one decay."""
    return inner_gradient(fast.w1, fast.w2, gates.key, gates.value, gates.step_size, preconditioner=preconditioner)


def token_exact(fast: FastWeights, gates: Gates, preconditioner: bool) -> InnerGradient:
    """Token by token, M_p = M_(p-1) (a_p I - eta_p k_p k_p^T) - eta_p grad_p, with gradients at the chunk's start.

    With g_p the product of retentions up to p, b = eta / a and c = eta / g, and unit keys, the input matrix after the
    chunk is g_P (W1 - Z^T K), where (I + L) Z = b K W1^T + c S and L_ps = b_p k_p k_s for s < p. The output matrix,
    which has no preconditioner, is g_P (W2 - (c E)^T Hd).
    """
    assert gates.token_retention is not None
    key, tokens = gates.key, gates.key.shape[-2]
    inputs = torch.cat([key, gates.value], dim=-2)
    pre = times(inputs, fast.w1)
    hidden = F.gelu(pre)
    recalled = times(hidden, fast.w2) + inputs
    predicted, target = recalled[..., :tokens, :], recalled[..., tokens:, :]
    pre, hidden = pre[..., :tokens, :], hidden[..., :tokens, :]
    error = 2 * (predicted - target)
    slope = torch.ops.aten.gelu_backward(times(error, fast.w2.mT), pre)

    kept = gates.token_retention.cumprod(dim=-2)
    rate, decayed = gates.step_size / gates.token_retention, gates.step_size / kept
    change = decayed * slope
    if preconditioner:
        overlap = torch.tril(rate * (key @ key.mT), diagonal=-1)
        system = (overlap + torch.eye(tokens, dtype=key.dtype, device=key.device)).expand(*slope.shape[:-1], tokens)
        change = torch.linalg.solve_triangular(system, rate * pre + change, upper=False, unitriangular=True)
    whole = gates.retention
    delta1, delta2 = whole * (change.mT @ key), whole * ((decayed * error).mT @ hidden)
    return InnerGradient(delta1, delta2, predicted.detach(), target.detach())


def apply_write(
    fast: FastWeights,
    gradient: InnerGradient,
    retention: Float[Tensor, "heads batch 1 each"],
    *,
    limit: float,
    momentum: float,
    gate: float,
    live: bool,
) -> tuple[FastWeights, Write]:
    """W <- retention W - S, with S the limited change plus momentum times the last S.

    Args:
        fast: memories to write into.
        gradient: what the chunk writes, by a rule above.
        retention: share of the old memory that is kept.
        limit: a chunk's change stays under this share of its matrix's norm, approached smoothly.
        momentum: share of the last S that is added to it, so that S stays under limit / (1 - momentum).
        gate: clips whose surprise, that of the last memory, is below it keep their memories as they are.
        live: let the outer gradient see the memories' own norms in the limit (`meta_grad: so`).
    """
    surprise = normalised_surprise(gradient.predicted[-1], gradient.target[-1])
    written, opened = surprise >= gate, None
    if gate > 0:
        opened = written.to(retention.dtype)[:, None, None]
        retention = 1 - opened * (1 - retention)
    new, moving, ratios, sizes = [], [], [], []
    for w, delta, last, kept in (
        (fast.w1, gradient.delta1, fast.momentum1, retention),
        (fast.w2, gradient.delta2, fast.momentum2, retention.mT),
    ):
        if momentum:
            size = safe_norm(w if live else w.detach())
            ratio, scale = limit_scale(delta, size, limit)
            changed, sum_ = _with_momentum(w, scale * delta, kept, last, momentum, opened)
            moving.append(sum_)
            sizes.append(matrix_norm(sum_.detach()) / size.detach())
        else:
            changed, ratio, scale = limited_write(w, delta, kept, opened, limit=limit, live=live)
            sizes.append(ratio.detach() * scale.detach())
        new.append(changed)
        ratios.append(ratio.detach())
    with torch.no_grad():
        size = torch.stack(sizes)
        ratio = (size if opened is None else size * opened).mean(dim=(0, 2, 4, 5))
        limited = (torch.stack(ratios) > limit).to(ratio.dtype).mean(dim=(0, 2, 4, 5))
        kept = retention.transpose(0, 1).flatten(1).detach()
    return FastWeights(*new, *moving), Write(surprise, ratio, limited, written, kept)


def detached(fast: FastWeights) -> FastWeights:
    """The same values without their past."""
    momenta = (None if m is None else m.detach() for m in (fast.momentum1, fast.momentum2))
    return FastWeights(fast.w1.detach(), fast.w2.detach(), *momenta, num_writes=fast.num_writes)


def anchored(fast: FastWeights, start: FastWeights) -> FastWeights:
    """W <- sg(W) + (W0 - sg(W0)): the same values, whose gradient goes to the trained memories and no further."""
    cut = detached(fast)
    w1, w2 = (cast(Tensor, _Anchor.apply(w, w0)) for w, w0 in ((cut.w1, start.w1), (cut.w2, start.w2)))
    return cut._replace(w1=w1, w2=w2)


class _Anchor(torch.autograd.Function):
    """Hands on the first argument as it is, and the gradient to the second: no copy, and no rounding of W0 - W0."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, start: Tensor) -> Tensor:
        ctx.shared = start.shape[2] != w.shape[2]
        return w.view_as(w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        return None, g.sum(2, keepdim=True) if ctx.shared else g


def normalised_surprise(
    predicted: Float[Tensor, "heads batch tokens features"], target: Float[Tensor, "heads batch tokens features"]
) -> Float[Tensor, " batch"]:
    """|v - o|^2 / (|v|^2 + |o|^2) of target v and prediction o, in [0, 2], mean over tokens and heads."""
    with torch.no_grad():
        error = (predicted - target).square().sum(-1)
        scale = predicted.square().sum(-1) + target.square().sum(-1)
        return (error / scale).mean(dim=(0, 2))


def matrix_norm(w: Tensor) -> Float[Tensor, "memories heads copies 1 1"]:
    """Frobenius norm of each matrix."""
    return torch.linalg.vector_norm(w, dim=(-2, -1), keepdim=True)


def safe_norm(w: Tensor) -> Float[Tensor, "memories heads copies 1 1"]:
    """The same, as a divisor."""
    return matrix_norm(w).clamp_min(TINY)


def limit_scale(delta: Tensor, size: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Norm of each change over the norm `size` of its matrix, and the factor that keeps it under `limit` smoothly."""
    ratio = matrix_norm(delta) / size
    return ratio, torch.rsqrt(1 + (ratio / limit).square())


def limited_write(
    w: Float[Tensor, "memories heads copies rows columns"],
    delta: Float[Tensor, "memories heads batch rows columns"],
    retention: Float[Tensor, "heads batch each_row each_column"],
    opened: Float[Tensor, "batch 1 1"] | None,
    *,
    limit: float,
    live: bool,
) -> tuple[Float[Tensor, "memories heads batch rows columns"], Tensor, Tensor]:
    """The matrices retention w - scale delta, the changes' norm ratios, and the scales (see `limit_scale`).

    Fast weights are the widest tensors of a pass, so each is read and written as rarely as can be.
    """
    found = _LimitedWrite.apply(w, delta, retention, opened, limit, live)
    return cast(tuple[Tensor, Tensor, Tensor], found)


class _LimitedWrite(torch.autograd.Function):
    """Keeps the matrices before and after, which are kept anyway to be read; their difference gives the change back."""

    @staticmethod
    def forward(
        ctx: Any, w: Tensor, delta: Tensor, retention: Tensor, opened: Tensor | None, limit: float, live: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        size = safe_norm(w)
        ratio, scale = limit_scale(delta, size, limit)
        used = scale if opened is None else scale * opened
        new = (retention * w).addcmul_(delta, used, value=-1)
        ctx.save_for_backward(w, new, retention, size, ratio, scale, used)
        ctx.limit, ctx.live = limit, live
        ctx.mark_non_differentiable(ratio, scale)
        ctx.set_materialize_grads(False)
        return new, ratio, scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None, None, None, None
        w, new, retention, size, ratio, scale, used = ctx.saved_tensors
        change = (retention * w).sub_(new)
        # scale = (1 + r^2)^(-1/2), r = |delta| / (limit |w|): d scale / d delta = -scale^3 r^2 delta / |delta|^2
        pull = _dot(g, change) * (scale * ratio / ctx.limit).square()
        g_w = g_delta = g_retention = None
        if ctx.needs_input_grad[2]:
            by_head = retention.shape[-2:] == (1, 1)
            g_retention = (_dot(g, w) if by_head else g * w).sum_to_size(retention.shape)
        if ctx.needs_input_grad[0]:
            g_w = g * retention
            if ctx.live:
                g_w.addcmul_(w, -pull / size.square())
            if w.shape[2] != g_w.shape[2]:
                g_w = g_w.sum(2, keepdim=True)
        if ctx.needs_input_grad[1]:
            inverse = (ratio * size).clamp_min(TINY).square().reciprocal() / scale.clamp_min(TINY)
            g_delta = change.mul_(pull * inverse).addcmul_(g, used, value=-1)
        return g_w, g_delta, g_retention, None, None, None


def _dot(a: Tensor, b: Tensor) -> Float[Tensor, "memories heads batch 1 1"]:
    return torch.linalg.vecdot(a.flatten(-2), b.expand(a.shape).flatten(-2))[..., None, None]


def _with_momentum(
    w: Tensor, change: Tensor, retention: Tensor, last: Tensor | None, momentum: float, opened: Tensor | None
) -> tuple[Tensor, Tensor]:
    if last is not None:
        change = change + momentum * last
    if opened is None:
        return retention * w - change, change
    before = torch.zeros_like(change) if last is None else last
    return retention * w - opened * change, torch.where(opened > 0, change, before)
