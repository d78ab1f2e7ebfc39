from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hopescale.optim.m3 import M3
from hopescale.optim.schema import OptimizerConfig

LEVELS = [
    {"period": 1, "eta": 0.8, "theta": 0.2},
    {"period": 2, "eta": 0.95, "theta": 0.05, "weight": 0.5},
    {"period": 3, "eta": 0.9, "theta": 0.3},
]
SHAPES = {"m3": [(9, 6), (2, 3, 8, 4)], "adamw": [(7,), (4, 3), ()]}


def config(**fields: Any) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"levels": LEVELS, "adam": {"beta1": 0.8, "beta2": 0.9}} | fields)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Trained:
    """Parameters of one group and their optimizer."""

    def __init__(self, settings: OptimizerConfig, algorithm: str, period: int = 1, decay: float = 0.1) -> None:
        self.parameters = [nn.Parameter(normal(*shape, seed=50)) for shape in SHAPES[algorithm]]
        group = {"params": self.parameters, "algorithm": algorithm, "weight_decay": decay, "period": period}
        self.optimizer = M3([group], settings)

    def step(self, gradients: list[Tensor], lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]

    def sums(self) -> list[Tensor]:
        return [self.optimizer.state[p]["period_sum"] for p in self.parameters]


def gradients(step: int, algorithm: str) -> list[Tensor]:
    """Gradients that change size from step to step."""
    return [(1 + step % 3) * normal(*shape, seed=100 + step) for shape in SHAPES[algorithm]]


def rate(step: int) -> float:
    return 0.01 * (1 + step)


def summed(steps: range, algorithm: str) -> list[Tensor]:
    total = [torch.zeros(shape) for shape in SHAPES[algorithm]]
    for step in steps:
        total = [t + g for t, g in zip(total, gradients(step, algorithm), strict=True)]
    return total


def equal(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@settings(max_examples=25, deadline=None)
@given(
    algorithm=st.sampled_from(["m3", "adamw"]),
    period=st.integers(1, 5),
    num_steps=st.integers(0, 14),
    drain=st.sampled_from(["sum", "mean"]),
    nesterov=st.booleans(),
)
def test_a_slow_group_is_a_plain_one_on_the_summed_gradients(
    algorithm: str, period: int, num_steps: int, drain: str, nesterov: bool
) -> None:
    constants = config(drain=drain, nesterov=nesterov)
    slow, plain = Trained(constants, algorithm, period), Trained(constants, algorithm)
    for step in range(num_steps):
        slow.step(gradients(step, algorithm), rate(step))
    fired = num_steps // period
    for firing in range(fired):
        steps = range(firing * period, (firing + 1) * period)
        plain.step(summed(steps, algorithm), rate(steps[-1]))
    assert equal(slow.weights(), plain.weights())
    for one, two in zip(slow.parameters, plain.parameters, strict=True):
        state = slow.optimizer.state[one]
        assert all(torch.equal(state[name], tensor) for name, tensor in plain.optimizer.state[two].items())
    assert slow.optimizer.param_groups[0]["num_steps"] == num_steps
    if period > 1:
        assert equal(slow.sums(), summed(range(fired * period, num_steps), algorithm))


@pytest.mark.parametrize("algorithm", SHAPES)
def test_a_slow_group_stands_still_between_firings(algorithm: str) -> None:
    slow = Trained(config(), algorithm, 3)
    seen = [slow.weights()]
    for step in range(7):
        slow.step(gradients(step, algorithm), 0.01)
        seen.append(slow.weights())
    assert [not equal(*pair) for pair in pairwise(seen)] == [False, False, True, False, False, True, False]


@pytest.mark.parametrize("algorithm", SHAPES)
def test_decay_comes_once_a_firing_at_the_rate_of_that_step(algorithm: str) -> None:
    slow = Trained(config(), algorithm, 4, decay=0.5)
    start = slow.weights()
    for step in range(10):
        slow.step([torch.zeros(shape) for shape in SHAPES[algorithm]], rate(step))
    expected = [w * (1 - 0.5 * rate(3)) * (1 - 0.5 * rate(7)) for w in start]
    torch.testing.assert_close(slow.weights(), expected)


@pytest.mark.parametrize("algorithm", SHAPES)
def test_only_slow_groups_have_a_sum_and_it_is_fp32_from_the_start(algorithm: str) -> None:
    parameters = [nn.Parameter(normal(8, 8).bfloat16()) for _ in range(2)]
    groups = [{"params": [p], "algorithm": algorithm, "period": n} for n, p in enumerate(parameters, start=1)]
    optimizer = M3(groups, config())
    plain, slow = (optimizer.state[p] for p in parameters)
    assert set(slow) == set(plain) | {"period_sum"}
    kept = slow["period_sum"]
    assert kept.dtype == torch.float32
    for parameter in parameters:
        parameter.grad = normal(8, 8).bfloat16()
    optimizer.step()
    assert optimizer.state[parameters[1]]["period_sum"] is kept
    assert torch.equal(kept, normal(8, 8).bfloat16().float())


def test_sums_of_bf16_gradients_keep_what_bf16_would_lose() -> None:
    parameter = nn.Parameter(torch.zeros(8, 8, dtype=torch.bfloat16))
    optimizer = M3([{"params": [parameter], "algorithm": "adamw", "period": 3}], config())
    for value in (256.0, 0.5):
        parameter.grad = torch.full((8, 8), value, dtype=torch.bfloat16)
        optimizer.step()
    assert torch.equal(optimizer.state[parameter]["period_sum"], torch.full((8, 8), 256.5))


@pytest.mark.parametrize("algorithm", SHAPES)
@pytest.mark.parametrize("form", ["levels", "paper"])
def test_a_parameter_without_gradient_counts_as_one_of_zeros(algorithm: str, form: str) -> None:
    """Whether the gradient is missing at a firing, before it, or always: what waits fires, and decay comes."""
    settings_ = config() if form == "levels" else OptimizerConfig(form="paper")
    given = [(1, None), (None, 2), (None, None), (3, 4), (None, 5)]
    missing, zero = (nn.Parameter(normal(8, 8)) for _ in range(2))
    optimizers = [
        M3([{"params": [p], "algorithm": algorithm, "period": 2, "lr": 0.1}], settings_) for p in (missing, zero)
    ]
    for seeds in given:
        before = missing.detach().clone()
        for seed in seeds:
            missing.grad = None if seed is None else normal(8, 8, seed=seed)
            zero.grad = torch.zeros(8, 8) if seed is None else normal(8, 8, seed=seed)
            for optimizer in optimizers:
                optimizer.step()
        assert not torch.equal(missing, before)
        assert torch.equal(missing, zero)
        states = [optimizer.state[p] for optimizer, p in zip(optimizers, (missing, zero), strict=True)]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert not states[0]["period_sum"].any()


def test_what_waits_fires_though_the_gradient_of_the_firing_step_is_missing() -> None:
    parameter = nn.Parameter(normal(8, 8))
    optimizer = M3([{"params": [parameter], "algorithm": "m3", "period": 3, "lr": 0.1, "weight_decay": 0.0}], config())
    for gradient in (normal(8, 8, seed=1), None, None):
        assert torch.equal(parameter, normal(8, 8))
        parameter.grad = gradient
        optimizer.step()
    plain = nn.Parameter(normal(8, 8))
    plain.grad = normal(8, 8, seed=1)
    M3([{"params": [plain], "algorithm": "m3", "lr": 0.1, "weight_decay": 0.0}], config()).step()
    assert torch.equal(parameter, plain)


def test_gradients_are_left_as_they_are_by_a_firing() -> None:
    parameter = nn.Parameter(normal(8, 8))
    optimizer = M3([{"params": [parameter], "algorithm": "m3", "period": 2}], config(nesterov=True))
    for seed in range(4):
        parameter.grad = normal(8, 8, seed=seed)
        optimizer.step()
        assert torch.equal(parameter.grad, normal(8, 8, seed=seed))


def test_groups_of_several_periods_fire_each_in_its_own_time() -> None:
    parameters = [nn.Parameter(normal(8, 8)) for _ in range(4)]
    groups = [{"params": [p], "algorithm": "m3", "period": n + 1, "lr": 0.1} for n, p in enumerate(parameters)]
    optimizer = M3(groups, config())
    fired: list[list[int]] = [[] for _ in parameters]
    for step in range(1, 13):
        before = [p.detach().clone() for p in parameters]
        for parameter in parameters:
            parameter.grad = normal(8, 8, seed=step)
        optimizer.step()
        for number, (old, parameter) in enumerate(zip(before, parameters, strict=True)):
            if not torch.equal(old, parameter):
                fired[number].append(step)
    assert fired == [list(range(period, 13, period)) for period in (1, 2, 3, 4)]


def test_a_step_that_is_not_taken_does_not_bring_a_firing_nearer() -> None:
    slow = Trained(config(), "m3", 3)
    start = slow.weights()
    for step in range(2):
        slow.step(gradients(step, "m3"), 0.01)
    waiting = [tensor.clone() for tensor in slow.sums()]
    slow.step([gradient * float("nan") for gradient in gradients(2, "m3")], 0.01)
    assert slow.optimizer.skipped
    assert equal(slow.weights(), start)
    assert equal(slow.sums(), waiting)
    slow.step(gradients(3, "m3"), 0.01)
    assert not equal(slow.weights(), start)
