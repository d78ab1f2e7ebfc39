"""The reference itself against arithmetic by hand and against the published equations, none of which it shares."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hopescale.model.schema import MEMORIES
from hopescale.model.titan import ALPHA, ETA, KEY, MAIN, VALUE, TitanMemory
from hopescale.model.titan_reference import titan_reference
from tests.unit.model.titan_cases import UNLIMITED, memory, normal


def gelu(a: float) -> float:
    return a * 0.5 * (1 + math.erf(a / math.sqrt(2)))


def gelu_slope(a: float) -> float:
    return 0.5 * (1 + math.erf(a / math.sqrt(2))) + a * math.exp(-a * a / 2) / math.sqrt(2 * math.pi)


def sigmoid(a: float) -> float:
    return 1 / (1 + math.exp(-a))


def written_by_hand(w1: float, w2: float, key: float, value: float, eta: float, alpha: float) -> tuple[float, float]:
    """One write of a memory of one feature and one hidden unit, in plain numbers."""
    a = w1 * key
    hidden = gelu(a)
    error = 2 * ((key + w2 * hidden) - (value + w2 * gelu(w1 * value)))
    slope1, slope2 = error * w2 * gelu_slope(a) * key, error * hidden
    return alpha * w1 - eta * key * w1 * key - eta * slope1, alpha * w2 - eta * slope2


@pytest.mark.parametrize("rule", ["frame_step", "token_exact"])
def test_two_writes_of_one_feature_are_those_made_by_hand(rule: str) -> None:
    titan = memory(
        1, hidden_multiplier=1.0, eta_max=3.0, retention_bias=2.0, write_limit=UNLIMITED, chunk_rule=rule, seed=3
    )
    # A layer norm of one feature leaves its bias alone, so every reading of a memory is its bias.
    with torch.no_grad():
        titan.norm_bias.copy_(torch.tensor([[-0.7], [0.4], [0.3], [-0.5], [1.0]], dtype=torch.float64))
    _, ((clip,)) = titan_reference(titan, normal(1, 2, 1, 1))
    eta, alpha = 3.0 * sigmoid(0.3), sigmoid(-0.5 + 2.0)
    for m, name in enumerate(MEMORIES):
        w1, w2 = titan.w1[m].item(), titan.w2[m].item()
        for _ in range(2):
            w1, w2 = written_by_hand(w1, w2, -1.0, 1.0, eta, alpha)
        assert clip[m, 0][0].item() == pytest.approx(w1, rel=1e-12), name
        assert clip[m, 0][1].item() == pytest.approx(w2, rel=1e-12), name


def reading(titan: TitanMemory, which: int, z: Tensor) -> Tensor:
    """A fresh memory's normalised output at tokens [tokens, width], one head."""
    recalled = z + F.gelu(z @ titan.w1[which, 0].T) @ titan.w2[which, 0].T
    return F.layer_norm(recalled, z.shape[-1:]) * titan.norm_weight[which] + titan.norm_bias[which]


def test_the_first_chunk_is_what_the_trained_main_memory_says_of_its_queries() -> None:
    titan, x = memory(4, hidden_multiplier=1.5), normal(1, 1, 3, 4)
    query = F.normalize(x[0, 0] @ titan.query.weight.T, dim=-1)
    torch.testing.assert_close(titan_reference(titan, x)[0][0, 0], titan.out(reading(titan, MAIN, query)))


@pytest.mark.parametrize(("rule", "number"), [("frame_step", 1), ("token_exact", 1), ("token_exact", 4)])
def test_a_chunk_of_single_steps_is_the_delta_rule_with_its_retention_per_token(rule: str, number: int) -> None:
    """M_t = M_(t-1) (a_t I - eta_t k_t k_t^T) - eta_t grad_t with gradients at the chunk's start (Eq. 88, 90, 91)."""
    titan = memory(4, hidden_multiplier=1.5, chunk_rule=rule, eta_max=2.0, write_limit=UNLIMITED)
    x = normal(1, 1, number, 4)
    (clip,) = titan_reference(titan, x)[1]
    keys, values = (F.normalize(reading(titan, m, x[0, 0]), dim=-1) for m in (KEY, VALUE))
    etas = torch.sigmoid(reading(titan, ETA, x[0, 0]).mean(-1)) * 2.0 / number
    # A chunk keeps a share that does not depend on how many tokens it has.
    alphas = torch.sigmoid(reading(titan, ALPHA, x[0, 0]).mean(-1) + 4.0) ** (1 / number)
    for m in range(len(MEMORIES)):
        start = [titan.w1[m, 0].detach().requires_grad_(), titan.w2[m, 0].detach().requires_grad_()]
        w1, w2 = (w.detach() for w in start)
        for key, value, eta, alpha in zip(keys.detach(), values.detach(), etas, alphas, strict=True):
            recalled = key + start[1] @ F.gelu(start[0] @ key)
            target = value + start[1].detach() @ F.gelu(start[0].detach() @ value)
            grad1, grad2 = torch.autograd.grad((recalled - target).square().sum(), start)
            w1 = w1 @ (alpha * torch.eye(4, dtype=w1.dtype) - eta * torch.outer(key, key)) - eta * grad1
            w2 = alpha * w2 - eta * grad2
        torch.testing.assert_close(clip[m, 0], (w1, w2), rtol=1e-12, atol=1e-12)


def test_a_frame_step_adds_up_the_steps_of_its_tokens_and_decays_once() -> None:
    fields: dict[str, Any] = {"hidden_multiplier": 1.5, "eta_max": 2.0, "write_limit": UNLIMITED}
    titan, x = memory(4, **fields), normal(1, 1, 3, 4)
    (whole,) = titan_reference(titan, x)[1]
    keep = torch.sigmoid(reading(titan, ALPHA, x[0, 0]).mean() + 4.0)
    alone = memory(4, **(fields | {"eta_max": 2.0 / 3, "retention": False}))
    for m in range(len(MEMORIES)):
        for side, start in enumerate((titan.w1[m, 0], titan.w2[m, 0])):
            steps = [start - titan_reference(alone, x[:, :, n : n + 1])[1][0][m, 0][side] for n in range(3)]
            torch.testing.assert_close(whole[m, 0][side], keep * start - sum(steps), rtol=1e-12, atol=1e-12)


def test_a_scan_sees_the_trained_memories_in_every_frame() -> None:
    titan, x = memory(4, chunk_rule="scan", retention=False, write_limit=UNLIMITED, eta_max=1.0), normal(1, 3, 2, 4)
    (together,) = titan_reference(titan, x)[1]
    for m in range(len(MEMORIES)):
        start = titan.w1[m, 0]
        changes = [titan_reference(titan, x[:, t : t + 1])[1][0][m, 0][0] - start for t in range(3)]
        torch.testing.assert_close(together[m, 0][0], start + sum(changes), rtol=1e-12, atol=1e-12)


def test_momentum_adds_a_share_of_the_change_before() -> None:
    fields: dict[str, Any] = {"chunk_rule": "scan", "retention": False, "write_limit": UNLIMITED, "eta_max": 1.0}
    plain, moving, x = memory(4, **fields), memory(4, momentum=0.5, **fields), normal(1, 2, 2, 4)
    first, second = (titan_reference(plain, x[:, t : t + 1])[1][0][MAIN, 0][0] - plain.w1[MAIN, 0] for t in (0, 1))
    after = titan_reference(moving, x)[1][0][MAIN, 0][0]
    torch.testing.assert_close(after, plain.w1[MAIN, 0] + first + (second + 0.5 * first), rtol=1e-12, atol=1e-12)


def test_the_limit_is_a_smooth_bound_on_the_size_of_a_change() -> None:
    fields: dict[str, Any] = {"retention": False, "eta_max": 20.0}
    free, bound, x = (
        memory(4, write_limit=UNLIMITED, **fields),
        memory(4, write_limit=0.1, **fields),
        normal(1, 1, 3, 4),
    )
    for at, (w1, w2) in titan_reference(free, x)[1][0].items():
        for side, after in enumerate((w1, w2)):
            start = (free.w1, free.w2)[side][at]
            size = (after - start).norm() / start.norm()
            limited = (titan_reference(bound, x)[1][0][at][side] - start).norm() / start.norm()
            # 1 / limited^2 = 1 / size^2 + 1 / share^2
            assert limited.item() == pytest.approx((size**-2 + 0.1**-2).item() ** -0.5, rel=1e-9)
