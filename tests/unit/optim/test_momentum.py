from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hopescale.optim.m3 import M3
from hopescale.optim.m3_reference import orthogonalise_reference
from hopescale.optim.momentum import States, advance_levels, state_names, waits_in_host_memory
from hopescale.optim.newton_schulz import shape_factor
from hopescale.optim.schema import OptimizerConfig

NESTED = [
    {"period": 1, "eta": 0.9, "theta": 0.1},
    {"period": 4, "eta": 0.95, "theta": 0.05, "weight": 0.5},
    {"period": 8, "eta": 0.99, "theta": 0.2},
    {"period": 32, "eta": 0.8, "theta": 0.1, "weight": 2.0},
]


def config(**fields: Any) -> OptimizerConfig:
    return OptimizerConfig.model_validate(fields)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def zeros(settings_: OptimizerConfig, *shapes: tuple[int, ...]) -> States:
    return {name: [torch.zeros(shape, dtype=torch.float64) for shape in shapes] for name in state_names(settings_)}


def scalars(settings_: OptimizerConfig, gradients: Sequence[float]) -> tuple[list[float], States]:
    """The direction of every step and the last state, of a single number."""
    states = zeros(settings_, ())
    directions = [
        advance_levels(settings_, step, [torch.tensor(gradient, dtype=torch.float64)], states)[0].item()
        for step, gradient in enumerate(gradients)
    ]
    return directions, states


def number(states: States, name: str) -> float:
    return states[name][0].item()


def levels(*rows: tuple[int, float, float, float]) -> list[dict[str, Any]]:
    return [{"period": p, "eta": e, "theta": t, "weight": w} for p, e, t, w in rows]


def test_one_level_that_keeps_nothing_is_the_gradient() -> None:
    directions, states = scalars(config(levels=levels((1, 0.0, 1.0, 1.0))), [3.0, -1.0, 0.5])
    assert directions == [3.0, -1.0, 0.5]
    assert set(states) == {"momentum_0"}


def test_one_level_is_an_average_that_forgets() -> None:
    directions, _ = scalars(config(levels=levels((1, 0.9, 0.1, 1.0))), [1.0] * 6)
    assert directions == pytest.approx([1 - 0.9 ** (n + 1) for n in range(6)])


def test_nesterov_looks_one_step_ahead_on_the_fastest_level_alone() -> None:
    rows = levels((1, 0.5, 0.5, 2.0), (1, 0.8, 0.2, 3.0))
    plain, states = scalars(config(levels=rows), [1.0, 5.0])
    ahead, others = scalars(config(levels=rows, nesterov=True), [1.0, 5.0])
    fast, slow = number(states, "momentum_0"), number(states, "momentum_1")
    assert (fast, slow) == pytest.approx((0.25 + 2.5, 0.16 + 1.0))
    assert plain[-1] == pytest.approx(2 * fast + 3 * slow)
    assert ahead[-1] == pytest.approx(2 * (0.5 * 5.0 + 0.5 * fast) + 3 * slow)
    assert all(torch.equal(states[name][0], others[name][0]) for name in states)


def test_all_levels_take_in_the_first_gradient() -> None:
    directions, states = scalars(
        config(levels=levels((1, 0.9, 0.1, 1.0), (4, 0.9, 0.2, 1.0), (9, 0.5, 0.3, 2.0))), [2.0]
    )
    assert [number(states, f"momentum_{n}") for n in range(3)] == pytest.approx([0.2, 0.4, 0.6])
    assert directions == pytest.approx([0.2 + 0.4 + 2 * 0.6])
    assert (number(states, "buffer_1"), number(states, "buffer_2")) == (0.0, 0.0)


@pytest.mark.parametrize("buffers", ["plain", "cascaded"])
@pytest.mark.parametrize("drain", ["sum", "mean"])
def test_a_slow_level_rests_while_gradients_wait_and_drains_them_when_due(drain: str, buffers: str) -> None:
    rows = levels((1, 0.0, 1.0, 0.0), (3, 0.5, 2.0, 1.0))
    gradients = [1.0, 10.0, 100.0, 1000.0, 5.0, 5.0, 5.0]
    settings_ = config(levels=rows, drain=drain, buffers=buffers)
    waited = 3 if drain == "mean" else 1
    first = 2.0 * 1.0
    second = 0.5 * first + 2.0 * (10.0 + 100.0 + 1000.0) / waited
    third = 0.5 * second + 2.0 * 15.0 / waited
    directions, _ = scalars(settings_, gradients)
    assert directions == pytest.approx([first] * 3 + [second] * 3 + [third])
    waiting = [number(scalars(settings_, gradients[:n])[1], "buffer_1") for n in range(1, 8)]
    assert waiting == [0.0, 10.0, 110.0, 0.0, 5.0, 10.0, 0.0]


def test_of_a_sum_slow_levels_outgrow_the_fast_one_and_of_a_mean_they_do_not() -> None:
    rows = levels((1, 0.5, 0.5, 1.0), (8, 0.5, 0.5, 1.0), (64, 0.5, 0.5, 1.0))
    for drain, expected in (("sum", [1.0, 8.0, 64.0]), ("mean", [1.0, 1.0, 1.0])):
        _, states = scalars(config(levels=rows, drain=drain), [1.0] * 2000)
        assert [number(states, f"momentum_{n}") for n in range(3)] == pytest.approx(expected)


def test_a_drained_mean_is_the_drained_sum_over_the_period() -> None:
    gradients = [float(g) for g in normal(25)]
    # From the second drain on; the first is of one gradient in both.
    rows = levels((1, 0.9, 0.1, 0.0), (8, 0.0, 0.3, 1.0))
    means, _ = scalars(config(levels=rows, drain="mean"), gradients)
    sums, _ = scalars(config(levels=rows, drain="sum"), gradients)
    assert means[:8] == pytest.approx(sums[:8])
    assert [8 * mean for mean in means[8:]] == pytest.approx(sums[8:])


def test_gradients_are_read_only_and_directions_are_tensors_of_their_own() -> None:
    for fields in ({"levels": levels((1, 0.0, 1.0, 1.0))}, {"levels": NESTED, "nesterov": True}):
        settings_, gradient = config(**fields), normal(3, 2)
        states = zeros(settings_, (3, 2))
        (direction,) = advance_levels(settings_, 0, [gradient], states)
        before = copy.deepcopy(states)
        direction.zero_()
        assert torch.equal(gradient, normal(3, 2))
        assert all(torch.equal(states[name][0], before[name][0]) for name in states)


def directions_of(settings_: OptimizerConfig, num_steps: int, dtype: torch.dtype) -> tuple[list[list[Tensor]], States]:
    shapes = [(5, 4), (2, 3, 3)]
    states = {name: [t.to(dtype) for t in tensors] for name, tensors in zeros(settings_, *shapes).items()}
    found = []
    for step in range(num_steps):
        gradients = [(1 + step % 3) * normal(*shape, seed=step).to(dtype) for shape in shapes]
        found.append(advance_levels(settings_, step, gradients, states))
    return found, states


@pytest.mark.parametrize("drain", ["sum", "mean"])
def test_cascaded_buffers_give_the_same_as_plain_ones(drain: str) -> None:
    plain, _ = directions_of(config(levels=NESTED, drain=drain), 200, torch.float32)
    cascaded, _ = directions_of(config(levels=NESTED, drain=drain, buffers="cascaded"), 200, torch.float32)
    # In other order: rounding of sums of up to 32 gradients of size 3.
    for one, two in zip(plain, cascaded, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    plain, _ = directions_of(config(levels=NESTED, drain=drain), 200, torch.float64)
    cascaded, _ = directions_of(config(levels=NESTED, drain=drain, buffers="cascaded"), 200, torch.float64)
    for one, two in zip(plain, cascaded, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


PERIODS = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(
    lambda factors: [1, *(int(torch.tensor(factors[: n + 1]).prod()) for n in range(len(factors)))]
)


@settings(max_examples=30, deadline=None)
@given(periods=PERIODS, drain=st.sampled_from(["sum", "mean"]), nesterov=st.booleans())
def test_nested_periods_of_any_kind_may_cascade_and_be_offloaded(
    periods: list[int], drain: str, nesterov: bool
) -> None:
    rows = [{"period": p, "eta": 0.5 + 0.1 * n, "theta": 0.3, "weight": 1.0 - 0.2 * n} for n, p in enumerate(periods)]
    fields: dict[str, Any] = {"levels": rows, "drain": drain, "nesterov": nesterov}
    plain, _ = directions_of(config(**fields), 40, torch.float64)
    ways = [{"buffers": "cascaded"}]
    if max(periods) > 1:
        ways.append({"buffers": "cascaded", "slow_levels": "offloaded"})
    for way in ways:
        found, _ = directions_of(config(**fields, **way), 40, torch.float64)
        for one, two in zip(plain, found, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


@pytest.mark.parametrize("drain", ["sum", "mean"])
def test_offloaded_levels_give_the_same_with_three_tensors_on_the_device(drain: str) -> None:
    fields: dict[str, Any] = {"levels": NESTED, "drain": drain, "buffers": "cascaded"}
    resident, kept = directions_of(config(**fields), 200, torch.float64)
    offloaded, states = directions_of(config(**fields, slow_levels="offloaded"), 200, torch.float64)
    for one, two in zip(resident, offloaded, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    assert set(states) == set(kept) | {"slow_sum"}
    for name, tensors in kept.items():
        torch.testing.assert_close(states[name], tensors, rtol=0, atol=1e-12)
    settings_ = config(**fields, slow_levels="offloaded")
    on_device = {name for name in states if not waits_in_host_memory(name, settings_)}
    assert on_device == {"momentum_0", "buffer_1", "slow_sum"}
    assert not any(waits_in_host_memory(name, config(**fields)) for name in kept)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"levels": levels((1, 0.9, 0.1, 1.0))}, {"momentum_0"}),
        ({"levels": levels((1, 0.9, 0.1, 1.0), (1, 0.5, 0.1, 1.0))}, {"momentum_0", "momentum_1"}),
        (
            {"levels": levels((1, 0.9, 0.1, 1.0), (1, 0.5, 0.1, 1.0), (2, 0.5, 0.1, 1.0))},
            {"momentum_0", "momentum_1", "momentum_2", "buffer_2"},
        ),
        ({"form": "paper"}, {"momentum_0", "momentum_1", "buffer_1", "slow_update", "second_moment"}),
        (
            {"form": "paper", "paper_form": {"denominator": "none"}},
            {"momentum_0", "momentum_1", "buffer_1", "slow_update"},
        ),
    ],
)
def test_states_are_a_momentum_a_level_and_a_buffer_a_slow_one(fields: dict[str, Any], names: set[str]) -> None:
    found = state_names(config(**fields))
    assert set(found) == names
    assert len(found) == len(names)


PERIOD, ALPHA, LR, DECAY = 3, 0.7, 0.05, 0.1


def paper_weights(weight: Tensor, gradients: list[Tensor], settings_: OptimizerConfig) -> list[Tensor]:
    """Algorithm 1 of arXiv 2512.24695 on one matrix, read literally; ema scales what comes in by 1 - beta."""
    paper, seen = settings_.paper_form, []
    fast, slow, second, chunk, slow_update = (torch.zeros_like(weight) for _ in range(5))
    for step, gradient in enumerate(gradients):
        if paper.momentum == "accumulate":
            fast = fast + paper.beta1 * gradient
            second = second + paper.beta2 * gradient**2
        else:
            fast = paper.beta1 * fast + (1 - paper.beta1) * gradient
            second = paper.beta2 * second + (1 - paper.beta2) * gradient**2
        chunk = chunk + gradient
        update = orthogonalise_reference(fast, settings_) + paper.alpha * slow_update
        if paper.denominator == "elementwise":
            update = update / (second.sqrt() + paper.eps)
        weight = weight * (1 - LR * DECAY) - LR * shape_factor(*weight.shape, settings_.adjust) * update
        seen.append(weight)
        if (step + 1) % paper.period == 0:
            if paper.momentum == "accumulate":
                slow = slow + paper.beta3 * chunk
            else:
                slow = paper.beta3 * slow + (1 - paper.beta3) * chunk
            slow_update = orthogonalise_reference(slow, settings_)
            chunk = torch.zeros_like(weight)
    return seen


def paper_config(**fields: Any) -> OptimizerConfig:
    return config(
        form="paper",
        paper_form={"period": PERIOD, "alpha": ALPHA, "eps": 1e-3} | fields,
        newton_schulz={"precision": "fp32"},
    )


def trained(
    weight: Tensor, gradients: list[Tensor], settings_: OptimizerConfig
) -> tuple[list[Tensor], dict[str, Tensor]]:
    parameter = nn.Parameter(weight.float())
    optimizer = M3([{"params": [parameter], "algorithm": "m3", "lr": LR, "weight_decay": DECAY}], settings_)
    seen = []
    for gradient in gradients:
        parameter.grad = gradient.float()
        optimizer.step()
        seen.append(parameter.detach().clone())
    return seen, optimizer.state[parameter]


@pytest.mark.parametrize("momentum", ["accumulate", "ema"])
@pytest.mark.parametrize("denominator", ["none", "elementwise"])
@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
def test_the_paper_form_is_the_printed_algorithm(momentum: str, denominator: str, shape: tuple[int, int]) -> None:
    settings_ = paper_config(momentum=momentum, denominator=denominator, beta1=0.8, beta2=0.95, beta3=0.7)
    weight, gradients = normal(*shape), [(1 + n % 2) * normal(*shape, seed=n + 1) for n in range(11)]
    seen, _ = trained(weight, gradients, settings_)
    for one, two in zip(seen, paper_weights(weight, gradients, settings_), strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=1e-4)


def test_the_slow_momentum_acts_from_the_step_after_the_one_that_ends_its_period() -> None:
    weight, gradients = normal(6, 4), [normal(6, 4, seed=n + 1) for n in range(4)]
    without, _ = trained(weight, gradients, paper_config(alpha=0.0))
    with_slow, _ = trained(weight, gradients, paper_config())
    assert [torch.equal(one, two) for one, two in zip(without, with_slow, strict=True)] == [True, True, True, False]
    _, state = trained(weight, gradients[:2], paper_config())
    assert torch.equal(state["buffer_1"], (gradients[0].float() + gradients[1].float()))
    assert not state["momentum_1"].any()
    assert not state["slow_update"].any()
    _, state = trained(weight, gradients[:3], paper_config())
    assert not state["buffer_1"].any()
    torch.testing.assert_close(state["momentum_1"].double(), 0.9 * sum(gradients[:3], torch.zeros(6, 4)))
    expected = orthogonalise_reference(state["momentum_1"].double(), paper_config())
    torch.testing.assert_close(state["slow_update"].double(), expected, rtol=0, atol=1e-5)


def test_the_printed_momentum_never_forgets_and_an_ema_does() -> None:
    gradients = [torch.ones(4, 3, dtype=torch.float64)] * 30
    _, printed = trained(normal(4, 3), gradients, paper_config(momentum="accumulate"))
    _, averaged = trained(normal(4, 3), gradients, paper_config(momentum="ema"))
    torch.testing.assert_close(printed["momentum_0"], torch.full((4, 3), 27.0))
    torch.testing.assert_close(averaged["momentum_0"], torch.full((4, 3), 1 - 0.9**30))


def test_a_paper_group_in_which_nothing_has_a_gradient_rests() -> None:
    matrix, vector = nn.Parameter(normal(6, 4).float()), nn.Parameter(normal(5).float())
    groups = [{"params": [matrix], "algorithm": "m3"}, {"params": [vector], "algorithm": "adamw"}]
    optimizer = M3(groups, paper_config(period=1))
    vector.grad = normal(5).float()
    optimizer.step()
    assert torch.equal(matrix, normal(6, 4).float())
    assert not any(tensor.any() for tensor in optimizer.state[matrix].values())
    matrix.grad = normal(6, 4, seed=1).float()
    optimizer.step()
    assert not torch.equal(matrix, normal(6, 4).float())
    assert optimizer.state[matrix]["slow_update"].any()
