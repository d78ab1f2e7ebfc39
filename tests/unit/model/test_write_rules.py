from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hopescale.model.write_rules import (
    FastWeights,
    Gates,
    anchored,
    apply_write,
    frame_step,
    limited_write,
    matrix_norm,
    normalised_surprise,
    token_exact,
)
from tests.unit.model.titan_cases import UNLIMITED, normal


def fast_weights(memories: int = 2, heads: int = 2, copies: int = 2, hidden: int = 4, features: int = 3) -> FastWeights:
    return FastWeights(
        normal(memories, heads, copies, hidden, features), normal(memories, heads, copies, features, hidden, seed=2)
    )


def matrices(fast: FastWeights) -> list[Tensor]:
    """W1, W2 and their momenta, if there are any."""
    return [w for w in (fast.w1, fast.w2, fast.momentum1, fast.momentum2) if w is not None]


def gates(heads: int = 2, batch: int = 2, tokens: int = 3, features: int = 3, eta_max: float = 2.0) -> Gates:
    key, value = (F.normalize(normal(heads, batch, tokens, features, seed=seed), dim=-1) for seed in (3, 4))
    kept = normal(heads, batch, tokens, 1, seed=6).sigmoid()
    step_size = normal(heads, batch, tokens, 1, seed=5).sigmoid() * eta_max / tokens
    return Gates(key, value, step_size, kept.prod(dim=-2, keepdim=True), kept)


def write(fast: FastWeights, chosen: Gates, **options: Any) -> tuple[FastWeights, Tensor, Tensor]:
    """One frame step: the memories after it, write ratios and the share of limited matrices."""
    defaults = {"limit": 0.1, "momentum": 0.0, "gate": 0.0, "live": True}
    after, written = apply_write(fast, frame_step(fast, chosen, True), chosen.retention, **(defaults | options))
    return after, written.ratio, written.limited


@pytest.mark.parametrize("share", [0.1, 0.01])
def test_the_limit_bounds_every_matrix_by_its_own_norm(share: float) -> None:
    fast, chosen = fast_weights(), gates(eta_max=1e4)
    after, ratio, limited = write(fast, chosen, limit=share)
    for old, new in ((fast.w1, after.w1), (fast.w2, after.w2)):
        change = matrix_norm(chosen.retention * old - new) / matrix_norm(old)
        assert (change <= share * (1 + 1e-9)).all()
        assert (change > 0.99 * share).all()
    torch.testing.assert_close(ratio, torch.full_like(ratio, share), rtol=0.01, atol=0)
    assert (limited == 1).all()


def test_the_limit_leaves_small_writes_alone() -> None:
    fast, chosen = fast_weights(), gates(eta_max=1e-5)
    bound, ratio, limited = write(fast, chosen, limit=0.1)
    free = write(fast, chosen, limit=UNLIMITED)[0]
    decayed = chosen.retention * fast.w1
    torch.testing.assert_close(bound.w1 - decayed, free.w1 - decayed, rtol=1e-6, atol=0)
    assert (ratio < 1e-4).all()
    assert (limited == 0).all()


@settings(max_examples=30, deadline=None)
@given(
    memories=st.integers(1, 3),
    heads=st.integers(1, 3),
    batch=st.integers(1, 3),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    shared=st.booleans(),
    gated=st.booleans(),
    live=st.booleans(),
    limit=st.sampled_from([0.01, 0.5, 1e3]),
    size=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
    kept_by=st.sampled_from(["matrix", "row", "column"]),
)
def test_a_limited_write_and_its_gradients_equal_the_formula(
    memories: int,
    heads: int,
    batch: int,
    rows: int,
    columns: int,
    shared: bool,
    gated: bool,
    live: bool,
    limit: float,
    size: float,
    kept_by: str,
) -> None:
    w = normal(memories, heads, 1 if shared else batch, rows, columns).requires_grad_()
    delta = (size * normal(memories, heads, batch, rows, columns, seed=2)).requires_grad_()
    each = {"matrix": (1, 1), "row": (rows, 1), "column": (1, columns)}[kept_by]
    retention = normal(heads, batch, *each, seed=3).sigmoid().requires_grad_()
    opened = (torch.arange(batch) % 2).to(w.dtype)[:, None, None] if gated else None
    ours, ratio, _ = limited_write(w, delta, retention, opened, limit=limit, live=live)

    bound = limit * (w if live else w.detach()).square().sum((-2, -1), keepdim=True).sqrt()
    norm = delta.square().sum((-2, -1), keepdim=True)
    theirs = retention * w - delta / (1 + norm / bound.square()).sqrt() * (1 if opened is None else opened)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ratio, (norm.sqrt() / (bound / limit)).detach(), rtol=1e-12, atol=1e-12)
    weights = normal(*theirs.shape, seed=4)
    pairs = (torch.autograd.grad((new * weights).sum(), (w, delta, retention)) for new in (ours, theirs))
    for mine, other in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_a_second_derivative_of_a_limited_write_is_refused_instead_of_wrong() -> None:
    w, delta = (normal(1, 1, 1, 2, 2, seed=seed).requires_grad_() for seed in (1, 2))
    new, _, _ = limited_write(w, delta, torch.full((1, 1, 1, 1), 0.9), None, limit=0.1, live=True)
    (first,) = torch.autograd.grad(new.square().sum(), delta, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.square().sum().backward()


def test_a_limited_write_of_nothing_into_nothing_has_finite_gradients() -> None:
    w, delta = torch.zeros(1, 1, 1, 2, 2, requires_grad=True), torch.zeros(1, 1, 1, 2, 2, requires_grad=True)
    retention = torch.full((1, 1, 1, 1), 0.9, requires_grad=True)
    new, _, _ = limited_write(w, delta, retention, None, limit=0.1, live=True)
    assert (new == 0).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(new.sum(), (w, delta, retention)))


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 24),
    eta_max=st.floats(0.01, 20),
    memories=st.integers(1, 2),
    shared=st.booleans(),
    preconditioner=st.booleans(),
)
def test_token_exact_is_the_loop_over_tokens(
    tokens: int, eta_max: float, memories: int, shared: bool, preconditioner: bool
) -> None:
    fast, chosen = fast_weights(memories, copies=1 if shared else 2), gates(tokens=tokens, eta_max=eta_max)
    found = token_exact(fast, chosen, preconditioner)
    assert chosen.token_retention is not None
    w1, w2 = (w.expand(-1, -1, 2, -1, -1) for w in fast[:2])
    for p in range(tokens):
        now = slice(p, p + 1)
        key, value, step_size = (g[..., now, :] for g in (chosen.key, chosen.value, chosen.step_size))
        token = Gates(key, value, step_size, chosen.token_retention[..., now, :], None)
        alone = frame_step(fast, token, preconditioner=False)
        keep = token.retention
        erased = token.step_size * (w1 @ key.mT) @ key if preconditioner else 0
        w1, w2 = keep * w1 - erased - alone.delta1, keep * w2 - alone.delta2
    for old, delta, new in ((fast.w1, found.delta1, w1), (fast.w2, found.delta2, w2)):
        torch.testing.assert_close(chosen.retention * old - delta, new, rtol=1e-9, atol=1e-10)


def test_a_closed_gate_leaves_memory_and_momentum_bit_for_bit() -> None:
    fast = fast_weights()._replace(momentum1=normal(2, 2, 2, 4, 3, seed=8), momentum2=normal(2, 2, 2, 3, 4, seed=9))
    chosen = gates()
    # The last memory decides.
    surprise = normalised_surprise(*(part[-1] for part in frame_step(fast, chosen, True)[2:]))
    assert surprise[0] != surprise[1]
    after, ratio, _ = write(fast, chosen, gate=float(surprise.max()), momentum=0.5)
    open_, closed = int(surprise.argmax()), int(surprise.argmin())
    for old, new in zip(matrices(fast), matrices(after), strict=True):
        assert torch.equal(old[:, :, closed], new[:, :, closed])
        assert not torch.equal(old[:, :, open_], new[:, :, open_])
    assert (ratio[:, closed] == 0).all()
    assert (ratio[:, open_] > 0).all()


def test_surprise_is_0_for_a_hit_1_for_a_right_angle_and_2_for_the_opposite() -> None:
    target = normal(1, 1, 1, 2)
    aside = torch.stack([-target[..., 1], target[..., 0]], dim=-1)
    for predicted, expected in ((target, 0.0), (aside, 1.0), (-target, 2.0)):
        assert normalised_surprise(predicted, target).item() == pytest.approx(expected)
    # Mean over heads and tokens, one number a clip.
    assert normalised_surprise(normal(3, 4, 5, 6), normal(3, 4, 5, 6, seed=2)).shape == (4,)


def test_an_anchor_keeps_the_bits_and_leads_the_gradient_to_the_start_alone() -> None:
    start, now = fast_weights(copies=1), fast_weights(copies=3)._replace(num_writes=4)
    for weights in (*matrices(start), *matrices(now)):
        weights.requires_grad_()
    after = anchored(now, start)
    assert torch.equal(after.w1, now.w1)
    assert torch.equal(after.w2, now.w2)
    assert after.num_writes == 4
    weights = normal(*now.w1.shape, seed=3)
    to_start, to_now = torch.autograd.grad((after.w1 * weights).sum(), (start.w1, now.w1), allow_unused=True)
    assert to_now is None
    torch.testing.assert_close(to_start, weights.sum(2, keepdim=True))
