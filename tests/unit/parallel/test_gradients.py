from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hopescale.optim.schema import ClipConfig
from hopescale.parallel.gradients import clip_gradients, dead_numbers, group_norms, local_size, parameter_squares


def groups(*gradients: list[list[float] | None]) -> list[dict[str, Any]]:
    """Optimizer groups by the gradients of their parameters."""

    def parameter(gradient: list[float] | None) -> nn.Parameter:
        made = nn.Parameter(torch.zeros(1 if gradient is None else len(gradient)))
        made.grad = None if gradient is None else torch.tensor(gradient)
        return made

    return [{"params": [parameter(gradient) for gradient in group]} for group in gradients]


def gradients(found: list[dict[str, Any]]) -> list[list[Tensor]]:
    return [[p.grad for p in group["params"] if p.grad is not None] for group in found]


def clip(found: list[dict[str, Any]], mode: str, max_norm: float) -> None:
    clip_gradients(found, group_norms(found), ClipConfig.model_validate({"mode": mode, "max_norm": max_norm}))


def test_norms_are_those_of_whole_groups_in_double_precision() -> None:
    norms = group_norms(groups([[3.0], [0.0, 4.0]], [[2.0, 2.0, 1.0]], [None, [6.0]]))
    assert norms.dtype == torch.float64
    assert norms.tolist() == [5.0, 3.0, 6.0]


def test_norms_of_huge_and_tiny_gradients_neither_overflow_nor_vanish() -> None:
    norms = group_norms(groups([[3e30, 4e30]], [[3e-30, 4e-30]]))
    torch.testing.assert_close(norms, torch.tensor([5e30, 5e-30], dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_norm_of_a_group_that_is_not_finite_is_not_finite(bad: float) -> None:
    norms = group_norms(groups([[1.0], [0.0, bad]], [[1.0]]))
    assert torch.isfinite(norms).tolist() == [False, True]


def test_each_group_is_clipped_by_its_own_norm() -> None:
    found = groups([[3.0], [0.0, 4.0]], [[0.1, 0.0]])
    clip(found, "per_group", 1.0)
    (first, second), (small,) = gradients(found)
    torch.testing.assert_close(first, torch.tensor([0.6]))
    torch.testing.assert_close(second, torch.tensor([0.0, 0.8]))
    assert small.tolist() == torch.tensor([0.1, 0.0]).tolist()


def test_all_groups_are_clipped_by_one_norm() -> None:
    found = groups([[2.0, 4.0]], [[4.0]])
    clip(found, "global", 3.0)
    torch.testing.assert_close(gradients(found)[0][0], torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(gradients(found)[1][0], torch.tensor([2.0]))


@pytest.mark.parametrize(("mode", "max_norm"), [("none", 1e-3), ("per_group", 5.0), ("global", 6.0)])
def test_gradients_within_the_bound_are_left_as_they_are(mode: str, max_norm: float) -> None:
    found = groups([[3.0, 4.0]], [[1.0]])
    clip(found, mode, max_norm)
    assert [[g.tolist() for g in group] for group in gradients(found)] == [[[3.0, 4.0]], [[1.0]]]


@pytest.mark.parametrize("mode", ["per_group", "global"])
def test_zero_gradients_stay_zero(mode: str) -> None:
    found = groups([[0.0, 0.0]], [[0.0]])
    clip(found, mode, 1.0)
    assert not any(g.any() for group in gradients(found) for g in group)


@pytest.mark.parametrize("mode", ["per_group", "global", "none"])
def test_a_group_without_gradients_is_left_alone(mode: str) -> None:
    found = groups([None], [[3.0, 4.0]])
    clip(found, mode, 1.0)
    assert found[0]["params"][0].grad is None
    expected = [3.0, 4.0] if mode == "none" else [0.6, 0.8]
    torch.testing.assert_close(gradients(found)[1][0], torch.tensor(expected))


def test_clipping_bounds_the_joint_norm_like_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    rows: list[list[float] | None] = torch.randn(6, 5, generator=generator).tolist()
    found = groups(rows[:3], rows[3:])
    parameters = [nn.Parameter(p.detach().clone()) for group in found for p in group["params"]]
    for parameter, group_gradient in zip(parameters, (g for group in gradients(found) for g in group), strict=True):
        parameter.grad = group_gradient.clone()
    nn.utils.clip_grad_norm_(parameters, 0.5)
    clip(found, "global", 0.5)
    for parameter, clipped in zip(parameters, (g for group in gradients(found) for g in group), strict=True):
        torch.testing.assert_close(clipped, parameter.grad, rtol=1e-5, atol=1e-7)


def test_numbers_without_a_gradient_and_with_one_of_zero_are_dead() -> None:
    found = groups([[1e-38, 0.0, -0.0], None], [[float("nan"), 1.0]], [None])
    assert dead_numbers(found).tolist() == [3, 0, 1]
    assert [local_size(group) for group in found] == [4, 2, 1]


def test_squares_of_parameters_are_summed_up_in_double_precision() -> None:
    found = groups([None, [1.0, 1.0]], [[1.0]])
    for group in found:
        for number, parameter in enumerate(group["params"]):
            nn.init.constant_(parameter, 1e30 * (number + 1))
    squares = parameter_squares(found)
    assert squares.dtype == torch.float64
    torch.testing.assert_close(squares, torch.tensor([9e60, 1e60], dtype=torch.float64), rtol=1e-6, atol=0)
