from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hopescale.model.recall import outer, recall, recall_at_both, times, unit
from tests.unit.model.titan_cases import normal


def leaves(
    memories: int, heads: int, batch: int, tokens: int, features: int, hidden: int, shared: bool
) -> list[Tensor]:
    """Tokens and both matrices, the memories shared by all clips or each clip's own."""
    copies = 1 if shared else batch
    shapes = (
        (memories, heads, batch, tokens, features),
        (memories, heads, copies, hidden, features),
        (memories, heads, copies, features, hidden),
    )
    return [normal(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


@settings(max_examples=40, deadline=None)
@given(
    memories=st.integers(1, 5),
    heads=st.integers(1, 3),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 4),
    features=st.integers(1, 4),
    hidden=st.integers(1, 5),
    shared=st.booleans(),
)
def test_a_reading_and_its_gradients_equal_autograd(**sizes: int) -> None:
    z, w1, w2 = leaves(**sizes)  # type: ignore[arg-type]
    ours, theirs = recall(z, w1, w2), z + F.gelu(z @ w1.mT) @ w2.mT
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weights = normal(*theirs.shape, seed=9)
    pairs = (torch.autograd.grad((out * weights).sum(), (z, w1, w2)) for out in (ours, theirs))
    for mine, other in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_what_is_detached_changes_no_other_gradient(needed: int) -> None:
    everything = leaves(2, 2, 2, 3, 3, 4, shared=True)
    some = [leaf.detach().requires_grad_(number == needed) for number, leaf in enumerate(everything)]
    (alone,) = torch.autograd.grad(recall(*some).square().sum(), some[needed])
    torch.testing.assert_close(alone, torch.autograd.grad(recall(*everything).square().sum(), everything)[needed])


def test_a_second_derivative_is_refused_instead_of_wrong() -> None:
    z, w1, w2 = leaves(1, 1, 1, 2, 2, 2, shared=True)
    (first,) = torch.autograd.grad(recall(z, w1, w2).square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.square().sum().backward()


@pytest.mark.parametrize("shared", [True, False])
def test_bf16_products_leave_results_and_gradients_in_fp32_and_near(shared: bool) -> None:
    exact = leaves(2, 2, 2, 8, 8, 16, shared)
    narrow = [leaf.detach().float().requires_grad_() for leaf in exact]
    with torch.autocast("cpu", torch.bfloat16):
        ours = recall(*narrow)
    theirs = recall(*exact)
    pairs = [(ours, theirs)]
    pairs += zip(*(torch.autograd.grad(r.square().sum(), a) for r, a in ((ours, narrow), (theirs, exact))), strict=True)
    for mine, other in pairs:
        assert mine.dtype == torch.float32
        assert 0 < (mine - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("copies", [1, 3])
def test_products_take_each_clips_own_matrix_or_the_shared_one(copies: int) -> None:
    z, w, other = normal(2, 1, 3, 4, 5), normal(2, 1, copies, 6, 5), normal(2, 1, 3, 4, 6)
    torch.testing.assert_close(times(z, w), z @ w.mT)
    torch.testing.assert_close(times(z[0], w), z[0] @ w.mT)
    expected = other.mT @ z
    torch.testing.assert_close(outer(other, z, w), expected if copies == 3 else expected.sum(2, keepdim=True))


@pytest.mark.parametrize("shared", [True, False])
def test_reading_at_tokens_and_queries_at_once_equals_reading_them_one_after_the_other(shared: bool) -> None:
    _, w1, w2 = leaves(3, 2, 2, 4, 3, 5, shared)
    x, query = (normal(2, 2, 4, 3, seed=seed).requires_grad_() for seed in (4, 5))
    both = recall_at_both(x, query, w1, w2)
    apart = torch.cat([recall(x.expand(2, *x.shape), w1[:2], w2[:2]), recall(query.unsqueeze(0), w1[2:], w2[2:])])
    assert torch.equal(both, apart)
    weights = normal(*both.shape, seed=9)
    pairs = (torch.autograd.grad((out * weights).sum(), (x, query, w1, w2)) for out in (both, apart))
    for mine, other in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_readings_keep_no_copies_of_what_they_read() -> None:
    _, w1, w2 = leaves(5, 1, 2, 7, 3, 4, shared=True)
    x, query = (normal(1, 2, 7, 3, seed=seed).requires_grad_() for seed in (4, 5))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        recall_at_both(x, query, w1, w2)
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, query, w1, w2)}
    assert [list(t.shape) for t in saved if t.untyped_storage().data_ptr() not in own] == [[5, 1, 2, 7, 4]]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.lists(st.sampled_from([0.0, 1e-300, 1e-13, -0.5, 2.0, 1e100]), min_size=3, max_size=3), min_size=1)
)
def test_unit_length_and_its_gradient_equal_those_of_torch(rows: list[list[float]]) -> None:
    x = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    ours, theirs = unit(x), F.normalize(x, dim=-1)
    assert torch.equal(ours, theirs)
    weights = normal(*x.shape)
    mine, other = (torch.autograd.grad((out * weights).sum(), x)[0] for out in (ours, theirs))
    torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12 * float(other.abs().max()))
