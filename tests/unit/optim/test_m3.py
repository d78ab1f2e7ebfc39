from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.optim._muon as torch_muon
from torch import Tensor, nn

from hopescale.optim.m3 import M3
from hopescale.optim.m3_reference import m3_reference
from hopescale.optim.newton_schulz import COEFFICIENTS, orthogonalise, steps_of
from hopescale.optim.schema import OptimizerConfig

LEVELS = {
    1: [{"period": 1, "eta": 0.9, "theta": 0.1}],
    2: [{"period": 1, "eta": 0.9, "theta": 0.1}, {"period": 4, "eta": 0.99, "theta": 0.01, "weight": 2.0}],
    3: [
        {"period": 1, "eta": 0.8, "theta": 0.2},
        {"period": 2, "eta": 0.95, "theta": 0.05, "weight": 0.5},
        {"period": 5, "eta": 0.99, "theta": 0.3},
    ],
}
STEPS = 20
FP32 = {"precision": "fp32"}


def config(**fields: Any) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"levels": LEVELS[2], "newton_schulz": FP32} | fields)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(*shape: int) -> list[Tensor]:
    """Gradients that differ in size and have something in common, so that slow levels matter."""
    common = normal(*shape, seed=50)
    return [(1 + step % 3) * (common + normal(*shape, seed=100 + step)) for step in range(STEPS)]


def train(
    weight: Tensor,
    grads: list[Tensor],
    settings: OptimizerConfig,
    algorithm: str = "m3",
    lr: float = 0.05,
    decay: float = 0.1,
) -> tuple[Tensor, M3]:
    parameter = nn.Parameter(weight.clone())
    optimizer = M3([{"params": [parameter], "algorithm": algorithm, "lr": lr, "weight_decay": decay}], settings)
    for gradient in grads:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach(), optimizer


@pytest.mark.parametrize("num_levels", LEVELS)
@pytest.mark.parametrize("drain", ["sum", "mean"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_equals_the_reference(num_levels: int, drain: str, nesterov: bool) -> None:
    settings = config(levels=LEVELS[num_levels], drain=drain, nesterov=nesterov)
    weight, grads = normal(9, 6), gradients(9, 6)
    found, _ = train(weight, grads, settings)
    torch.testing.assert_close(found, m3_reference(weight, grads, settings, 0.05, 0.1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw", "spectral_unclamped"])
@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (8, 8)])
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_equals_the_reference_for_every_shape_and_adjustment(
    adjust: str, shape: tuple[int, int], coefficients: str
) -> None:
    settings = config(adjust=adjust, newton_schulz=FP32 | {"coefficients": coefficients, "steps": 6})
    weight, grads = normal(*shape), gradients(*shape)[:4]
    found, _ = train(weight, grads, settings)
    torch.testing.assert_close(found, m3_reference(weight, grads, settings, 0.05, 0.1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 8, 5), (2, 3, 4, 9)])
def test_leading_dims_are_a_batch_of_matrices(shape: tuple[int, ...]) -> None:
    settings = config()
    weight, grads = normal(*shape), gradients(*shape)
    # One of the matrices has gradients of another size altogether.
    for gradient in grads:
        gradient.view(-1, *shape[-2:])[1] *= 1e-8
    found, _ = train(weight, grads, settings)
    for number, matrix in enumerate(found.reshape(-1, *shape[-2:])):
        own = [gradient.reshape(-1, *shape[-2:])[number] for gradient in grads]
        expected = m3_reference(weight.reshape(-1, *shape[-2:])[number], own, settings, 0.05, 0.1)
        torch.testing.assert_close(matrix, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_one_level_is_muon(
    monkeypatch: pytest.MonkeyPatch, nesterov: bool, adjust: str, shape: tuple[int, int]
) -> None:
    # PyTorch iterates in bf16; with one and the same iteration the two must agree to rounding.
    def exact(gradient: Tensor, *_: Any) -> Tensor:
        return orthogonalise(gradient, steps_of("simple", 5))

    monkeypatch.setattr(torch_muon, "_zeropower_via_newtonschulz", exact)
    settings = config(
        levels=LEVELS[1], nesterov=nesterov, adjust=adjust, newton_schulz=FP32 | {"coefficients": "simple"}
    )
    weight, grads = normal(*shape), gradients(*shape)
    expected = muon(weight, grads, nesterov, adjust)
    torch.testing.assert_close(train(weight, grads, settings)[0], expected, rtol=1e-5, atol=1e-6)


def test_one_level_is_muon_up_to_its_bf16_iteration() -> None:
    settings = config(levels=LEVELS[1], adjust="original", newton_schulz=FP32 | {"coefficients": "simple"})
    weight, grads = normal(12, 5), gradients(12, 5)[:1]
    expected = muon(weight, grads, nesterov=False, adjust="original", decay=0.0)
    found = train(weight, grads, settings, decay=0.0)[0]
    assert (found - expected).norm() < 0.03 * (expected - weight).norm()


def muon(weight: Tensor, grads: list[Tensor], nesterov: bool, adjust: str, decay: float = 0.1) -> Tensor:
    parameter = nn.Parameter(weight.clone())
    optimizer = torch.optim.Muon(
        [parameter], lr=0.05, weight_decay=decay, momentum=0.9, nesterov=nesterov, adjust_lr_fn=adjust
    )
    for gradient in grads:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(7,), (4, 3), (2, 3, 4)])
def test_adamw_groups_are_adamw(shape: tuple[int, ...]) -> None:
    settings = config(adam={"beta1": 0.8, "beta2": 0.95, "eps": 1e-6})
    weight, grads = normal(*shape), gradients(*shape)
    parameter = nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([parameter], lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for gradient in grads:
        parameter.grad = gradient.clone()
        optimizer.step()
    found, _ = train(weight, grads, settings, "adamw")
    torch.testing.assert_close(found, parameter.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("drain", "expected"), [("sum", 19.0), ("mean", 7.0)])
def test_a_slow_level_waits_then_drains(drain: str, expected: float) -> None:
    levels = [{"period": 1, "eta": 0.0, "theta": 1.0}, {"period": 3, "eta": 0.5, "theta": 2.0}]
    settings = config(levels=levels, drain=drain)
    seen = []
    for steps in range(1, 6):
        grads = [torch.full((2, 2), float(step + 1)) for step in range(steps)]
        _, optimizer = train(torch.zeros(2, 2), grads, settings)
        (state,) = optimizer.state.values()
        seen.append((state["momentum_1"][0, 0].item(), state["buffer_1"][0, 0].item()))
    # Step 0 drains its one gradient, step 3 those of steps 1 to 3.
    assert seen == [(2.0, 0.0), (2.0, 2.0), (2.0, 5.0), (expected, 0.0), (expected, 5.0)]


def test_a_mean_drain_balances_levels_under_a_constant_gradient() -> None:
    levels = [{"period": 1, "eta": 0.5, "theta": 0.5}, {"period": 4, "eta": 0.5, "theta": 0.5}]
    _, optimizer = train(torch.zeros(2, 2), [torch.ones(2, 2)] * 200, config(levels=levels, drain="mean"))
    (state,) = optimizer.state.values()
    torch.testing.assert_close(state["momentum_0"], torch.ones(2, 2))
    torch.testing.assert_close(state["momentum_1"], torch.ones(2, 2))


def test_gradients_are_left_as_they_are() -> None:
    matrix, vector = nn.Parameter(normal(6, 4)), nn.Parameter(normal(5))
    optimizer = M3(
        [{"params": [matrix], "algorithm": "m3"}, {"params": [vector], "algorithm": "adamw"}], config(nesterov=True)
    )
    for step in range(3):
        matrix.grad, vector.grad = normal(6, 4, seed=step), normal(5, seed=step)
        optimizer.step()
        assert torch.equal(matrix.grad, normal(6, 4, seed=step))
        assert torch.equal(vector.grad, normal(5, seed=step))


def test_state_exists_before_the_first_step_and_stays_the_same_objects() -> None:
    matrix, vector = nn.Parameter(normal(6, 4).bfloat16()), nn.Parameter(normal(5))
    optimizer = M3(
        [{"params": [matrix], "algorithm": "m3"}, {"params": [vector], "algorithm": "adamw"}],
        config(levels=LEVELS[3]),
    )
    assert set(optimizer.state[matrix]) == {f"momentum_{n}" for n in range(3)} | {"buffer_1", "buffer_2"}
    assert set(optimizer.state[vector]) == {"exp_avg", "exp_avg_sq", "step"}
    assert all(t.dtype == torch.float32 and not t.any() for s in optimizer.state.values() for t in s.values())
    assert all(optimizer.state[matrix][name].shape == (6, 4) for name in optimizer.state[matrix])
    before = [id(t) for s in optimizer.state.values() for t in s.values()]
    matrix.grad, vector.grad = normal(6, 4).bfloat16(), normal(5)
    optimizer.step()
    assert [id(t) for s in optimizer.state.values() for t in s.values()] == before
    assert [group["num_steps"] for group in optimizer.param_groups] == [1, 1]


def test_parameters_without_gradient_do_not_move() -> None:
    moved, still = nn.Parameter(normal(6, 4)), nn.Parameter(normal(6, 4))
    for algorithm in ("m3", "adamw"):
        optimizer = M3([{"params": [moved, still], "algorithm": algorithm}], config())
        moved.grad = normal(6, 4, seed=2)
        optimizer.step()
        assert torch.equal(still, normal(6, 4))
    assert not torch.equal(moved, normal(6, 4))


def test_a_zero_gradient_only_decays() -> None:
    found, _ = train(normal(6, 4), [torch.zeros(6, 4)], config(), lr=0.5, decay=0.1)
    torch.testing.assert_close(found, normal(6, 4) * 0.95)


def test_the_first_step_goes_downhill() -> None:
    for nesterov in (False, True):
        found, _ = train(torch.zeros(6, 4), [normal(6, 4, seed=4)], config(nesterov=nesterov))
        assert (found * normal(6, 4, seed=4)).sum() < 0


def test_closure_runs_with_gradients_and_its_loss_comes_back() -> None:
    parameter = nn.Parameter(normal(6, 4))
    optimizer = M3([{"params": [parameter], "algorithm": "m3"}], config())

    def closure() -> float:
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx(normal(6, 4).square().sum().item())


def test_settings_of_the_configuration_are_the_default_of_a_group() -> None:
    optimizer = M3([{"params": [nn.Parameter(normal(3, 3))], "algorithm": "m3"}], config(lr=0.3, weight_decay=0.7))
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.3, 0.7)


def test_bad_groups_are_refused() -> None:
    matrix = nn.Parameter(normal(3, 3))
    integers = nn.Parameter(torch.ones(3, 3, dtype=torch.int64), requires_grad=False)
    complexes = nn.Parameter(torch.ones(3, 3, dtype=torch.complex64))
    for groups, words in (
        ([{"name": "cms", "params": [], "algorithm": "m3"}], "group cms has no parameters"),
        ([{"params": [integers], "algorithm": "adamw"}], "int64"),
        ([{"params": [complexes], "algorithm": "m3"}], "complex64"),
        ([{"name": "cms", "params": [nn.Parameter(normal(3))], "algorithm": "m3"}], "1-D parameter; m3 takes matrices"),
        ([{"params": [matrix], "algorithm": "m3"}, {"params": [matrix], "algorithm": "adamw"}], "more than one"),
    ):
        with pytest.raises(ValueError, match=words):
            M3(groups, config())


def test_a_parameter_twice_in_one_group_is_refused() -> None:
    matrix = nn.Parameter(normal(3, 3))
    with pytest.raises(ValueError, match=r"twice|duplicate"):
        M3([{"params": [matrix, matrix], "algorithm": "m3"}], config())
