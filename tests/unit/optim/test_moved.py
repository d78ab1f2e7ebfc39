"""How far a step moved each group: the same step, measured where asked for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hopescale.optim.m3 import M3
from hopescale.optim.schema import OptimizerConfig


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def groups(period: int = 1) -> list[dict[str, Any]]:
    settings: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1}
    matrices = [nn.Parameter(normal(9, 12, seed=1)), nn.Parameter(normal(2, 8, 10, seed=2))]
    vectors = [nn.Parameter(normal(7, seed=3)), nn.Parameter(normal(5, 3, seed=4)), nn.Parameter(normal(4, seed=5))]
    return [
        {"name": "matrices", "algorithm": "m3", "params": matrices, **settings},
        {"name": "vectors", "algorithm": "adamw", "params": vectors, "period": period, **settings},
    ]


def give_gradients(optimizer: M3, seed: int) -> None:
    for group in optimizer.param_groups:
        for number, parameter in enumerate(group["params"]):
            parameter.grad = normal(*parameter.shape, seed=100 * seed + number)


@pytest.mark.parametrize("period", [1, 2])
def test_a_measured_step_is_bit_for_bit_the_same(period: int) -> None:
    plain, measured = M3(groups(period), OptimizerConfig()), M3(groups(period), OptimizerConfig())
    for step in range(6):
        for optimizer, report_in in ((plain, None), (measured, step % 2)):
            give_gradients(optimizer, step)
            optimizer.step(report_in=report_in)
    for one, other in zip(plain.param_groups, measured.param_groups, strict=True):
        for mine, theirs in zip(one["params"], other["params"], strict=True):
            assert torch.equal(mine, theirs)
            assert all(torch.equal(plain.state[mine][key], measured.state[theirs][key]) for key in plain.state[mine])


def test_moves_are_the_squares_of_what_changed_and_of_what_it_was() -> None:
    optimizer = M3(groups(), OptimizerConfig())
    give_gradients(optimizer, 0)
    optimizer.param_groups[1]["params"][1].grad = None
    before = copy.deepcopy([[p.detach().double() for p in group["params"]] for group in optimizer.param_groups])
    optimizer.step(report_in=0)
    for group, old, move in zip(optimizer.param_groups, before, optimizer.moved, strict=True):
        assert move is not None
        assert move.change.dtype == move.before.dtype == torch.float64
        pairs = [(w, p.detach().double()) for w, p in zip(old, group["params"], strict=True) if p.grad is not None]
        torch.testing.assert_close(move.before, torch.stack([w.square().sum() for w, _ in pairs]).sum())
        changes = torch.stack([(p - w).square().sum() for w, p in pairs]).sum()
        torch.testing.assert_close(move.change, changes, rtol=1e-6, atol=0)


def test_only_the_step_after_which_a_group_rests_until_the_report_is_measured() -> None:
    optimizer = M3(groups(period=3), OptimizerConfig())
    every, measured = 4, []
    for step in range(1, 13):
        give_gradients(optimizer, step)
        optimizer.step(report_in=-step % every)
        measured += [(group["name"], step) for group, move in zip(groups(), optimizer.moved, strict=True) if move]
    # Reports come after steps 4, 8 and 12; the slow group moves on steps 3, 6, 9 and 12.
    assert [step for name, step in measured if name == "matrices"] == [4, 8, 12]
    assert [step for name, step in measured if name == "vectors"] == [3, 6, 12]


def test_nothing_is_measured_unasked_or_without_gradients() -> None:
    optimizer = M3(groups(), OptimizerConfig())
    assert optimizer.moved == [None, None]
    give_gradients(optimizer, 0)
    optimizer.step(report_in=0)
    assert all(move is not None for move in optimizer.moved)
    optimizer.step()
    assert optimizer.moved == [None, None]
    optimizer.zero_grad()
    optimizer.step(report_in=0)
    assert optimizer.moved == [None, None]


def test_a_step_that_is_not_taken_is_not_measured() -> None:
    optimizer = M3(groups(), OptimizerConfig())
    give_gradients(optimizer, 0)
    optimizer.step(report_in=0)
    optimizer.step(finite=False, report_in=0)
    assert optimizer.moved == [None, None]


def test_a_group_without_any_gradient_is_not_measured_and_the_others_are() -> None:
    optimizer = M3(groups(), OptimizerConfig())
    give_gradients(optimizer, 0)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = None
    optimizer.step(report_in=0)
    assert [move is None for move in optimizer.moved] == [True, False]


def test_a_slow_group_that_fires_without_gradients_is_measured() -> None:
    optimizer = M3(groups(period=2), OptimizerConfig())
    give_gradients(optimizer, 0)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step(report_in=0)
    move = optimizer.moved[1]
    assert move is not None
    assert move.change > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_that_moves_nothing_measures_nothing(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(normal(8, 8).to(dtype))
    optimizer = M3([{"params": [parameter], "algorithm": "m3", "lr": 1e-3, "weight_decay": 0.0}], OptimizerConfig())
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step(report_in=0)
    (move,) = optimizer.moved
    assert move is not None
    assert move.change == 0
    torch.testing.assert_close(move.before, parameter.detach().double().square().sum())
