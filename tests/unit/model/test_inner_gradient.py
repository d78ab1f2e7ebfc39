from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hopescale.model.inner_gradient import gelu_curvature, inner_gradient
from tests.unit.model.titan_cases import normal

NAMES: tuple[str, ...] = ("w1", "w2", "key", "value", "step_size")


def arguments(
    *,
    memories: int,
    heads: int,
    batch: int,
    tokens: int,
    features: int,
    hidden: int,
    shared: bool,
    seed: int = 0,
    by_feature: bool = False,
) -> list[Tensor]:
    """W1, W2, keys, values and step sizes, the memories shared by all clips or each clip's own."""
    copies = 1 if shared else batch
    w1, w2 = (
        normal(memories, heads, copies, hidden, features, seed=seed),
        normal(memories, heads, copies, features, hidden, seed=seed + 1),
    )
    key, value = (F.normalize(normal(heads, batch, tokens, features, seed=seed + n), dim=-1) for n in (2, 3))
    step_size = normal(heads, batch, tokens, features if by_feature else 1, seed=seed + 4).sigmoid()
    return [w1, w2, key, value, step_size]


def by_autograd(arguments: Sequence[Tensor], preconditioner: bool) -> tuple[Tensor, Tensor]:
    """Token by token the gradient of |M(k) - M(v)|^2, M(v) a constant of this loss, and W1 k k^T, times its step size.

    Step sizes of each feature belong to the columns of W1 and the rows of W2.
    """
    w1, w2, keys, values, step_sizes = arguments
    sizes = [*keys.shape[:2]]
    inner = [(w + 0).expand(-1, *sizes, -1, -1).clone() for w in (w1, w2)]
    inner = [w if w.requires_grad else w.requires_grad_() for w in inner]

    def recall(w1: Tensor, w2: Tensor, z: Tensor) -> Tensor:
        return z + F.gelu(z @ w1.mT) @ w2.mT

    delta1, delta2 = torch.zeros_like(inner[0]), torch.zeros_like(inner[1])
    for p in range(keys.shape[2]):
        key, value, step_size = (t[:, :, p : p + 1] for t in (keys, values, step_sizes))
        with torch.enable_grad():
            loss = (recall(inner[0], inner[1], key) - recall(w1, w2, value)).square().sum()
            grad1, grad2 = torch.autograd.grad(loss, inner, create_graph=True)
        erased = (key @ w1.mT).mT @ key if preconditioner else 0
        delta1 = delta1 + (grad1 + erased) * step_size
        delta2 = delta2 + grad2 * step_size.mT
    return delta1, delta2


def pulled(deltas: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a random combination of both deltas."""
    loss = sum(((d * normal(*d.shape, seed=77)).sum() for d in deltas), start=deltas[0].new_zeros(()))
    return list(torch.autograd.grad(loss, list(leaves), materialize_grads=True))


@pytest.mark.parametrize("preconditioner", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_gradient_of_the_gradient_is_that_of_finite_differences(shared: bool, preconditioner: bool) -> None:
    leaves = arguments(memories=2, heads=2, batch=2, tokens=3, features=2, hidden=3, shared=shared)
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def deltas(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        found = inner_gradient(*leaves, preconditioner=preconditioner)
        return found.delta1, found.delta2

    assert torch.autograd.gradcheck(deltas, leaves, eps=1e-6, atol=1e-7, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    memories=st.integers(1, 5),
    heads=st.integers(1, 3),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 5),
    features=st.integers(1, 5),
    hidden=st.integers(1, 6),
    shared=st.booleans(),
    by_feature=st.booleans(),
    preconditioner=st.booleans(),
    seed=st.integers(0, 100),
)
def test_equals_autograd_of_the_inner_loss(preconditioner: bool, **sizes: int) -> None:
    leaves = [leaf.requires_grad_() for leaf in arguments(**sizes)]  # type: ignore[arg-type]
    found = inner_gradient(*leaves, preconditioner=preconditioner)
    ours, theirs = (found.delta1, found.delta2), by_autograd(leaves, preconditioner)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    for name, mine, other in zip(NAMES, pulled(ours, leaves), pulled(theirs, leaves), strict=True):
        assert (mine - other).abs().max() <= 1e-11 * other.abs().max().clamp_min(1e-3), name


@pytest.mark.parametrize("needed", [*NAMES, "w1 w2", "key value", "w2 value"])
def test_what_is_detached_changes_no_other_gradient(needed: str) -> None:
    leaves = arguments(memories=2, heads=1, batch=2, tokens=3, features=3, hidden=4, shared=True)
    everything = [leaf.requires_grad_() for leaf in leaves]
    some = [leaf.detach().requires_grad_(name in needed.split()) for name, leaf in zip(NAMES, everything, strict=True)]
    full = dict(zip(NAMES, pulled(inner_gradient(*everything, preconditioner=True)[:2], everything), strict=True))
    wanted = [leaf for leaf in some if leaf.requires_grad]
    part = pulled(inner_gradient(*some, preconditioner=True)[:2], wanted)
    for name, gradient in zip([n for n in NAMES if n in needed.split()], part, strict=True):
        torch.testing.assert_close(gradient, full[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("used", ["delta1", "delta2"])
def test_one_of_the_two_gradients_may_go_unused(used: str) -> None:
    leaves = arguments(memories=2, heads=1, batch=2, tokens=3, features=3, hidden=4, shared=False)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    mine = getattr(inner_gradient(*leaves, preconditioner=True), used)
    other = by_autograd(leaves, True)[("delta1", "delta2").index(used)]
    for ours, theirs in zip(pulled([mine], leaves), pulled([other], leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_prediction_and_target_are_readings_of_key_and_value_and_carry_no_gradient() -> None:
    leaves = arguments(memories=2, heads=2, batch=2, tokens=3, features=3, hidden=4, shared=True)
    w1, w2, key, value, _ = leaves
    found = inner_gradient(*(leaf.requires_grad_() for leaf in leaves), preconditioner=True)
    for recalled, z in ((found.predicted, key), (found.target, value)):
        assert not recalled.requires_grad
        torch.testing.assert_close(recalled, (z + F.gelu(z @ w1.mT) @ w2.mT).detach())


def test_a_third_derivative_is_refused_instead_of_wrong() -> None:
    leaves = arguments(memories=1, heads=1, batch=1, tokens=2, features=2, hidden=2, shared=True)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    deltas = inner_gradient(*leaves, preconditioner=True)[:2]
    first = torch.autograd.grad(deltas[0].square().sum() + deltas[1].square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first[0].square().sum().backward()


@pytest.mark.parametrize("shared", [True, False])
def test_bf16_products_leave_results_and_gradients_in_fp32_and_near(shared: bool) -> None:
    exact = arguments(memories=3, heads=2, batch=2, tokens=16, features=8, hidden=16, shared=shared)
    narrow = [leaf.float().requires_grad_() for leaf in exact]
    exact = [leaf.requires_grad_() for leaf in exact]
    with torch.autocast("cpu", torch.bfloat16):
        found = inner_gradient(*narrow, preconditioner=True)
    ours, theirs = found[:2], inner_gradient(*exact, preconditioner=True)[:2]
    pairs = [*zip(ours, theirs, strict=True), *zip(pulled(ours, narrow), pulled(theirs, exact), strict=True)]
    for mine, other in pairs:
        assert mine.dtype == torch.float32
        assert 0 < (mine - other).norm() < 0.02 * other.norm()


@given(st.floats(-8, 8))
@settings(deadline=None)
def test_curvature_is_the_second_derivative_of_gelu(at: float) -> None:
    x = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F.gelu(x), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, x)
    torch.testing.assert_close(gelu_curvature(x.detach()), curvature, rtol=1e-10, atol=1e-14)
