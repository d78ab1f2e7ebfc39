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
@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (8, 8), (9, 7)])
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
    torch.testing.assert_close(train(weight, grads, settings)[0], expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (9, 8)])
def test_one_level_is_muon_as_it_is_up_to_its_bf16_iteration(
    precision: str, nesterov: bool, shape: tuple[int, int]
) -> None:
    iteration = {"coefficients": "simple", "precision": precision}
    settings = config(levels=LEVELS[1], adjust="original", nesterov=nesterov, newton_schulz=iteration)
    weight, grads = normal(*shape), gradients(*shape)[:1]
    expected = muon(weight, grads, nesterov, adjust="original", decay=0.0)
    found = train(weight, grads, settings, decay=0.0)[0]
    assert (found - expected).norm() < 0.05 * (expected - weight).norm()


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


def adamw(weight: Tensor, grads: list[Tensor | None], betas: tuple[float, float]) -> Tensor:
    parameter = nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([parameter], lr=0.05, betas=betas, weight_decay=0.1)
    for gradient in grads:
        parameter.grad = gradient
        optimizer.step()
    return parameter.detach()


def test_parameters_whose_gradients_come_late_or_at_times_are_adamw_bit_for_bit() -> None:
    grads = gradients(4, 3)
    given: list[list[Tensor | None]] = [
        list(grads),
        [None] * 7 + grads[7:],
        [gradient if step % 3 else None for step, gradient in enumerate(grads)],
        [None] * STEPS,
    ]
    parameters = [nn.Parameter(normal(4, 3)) for _ in given]
    optimizer = M3([{"params": parameters, "algorithm": "adamw", "lr": 0.05, "weight_decay": 0.1}], config())
    for step in range(STEPS):
        for parameter, own in zip(parameters, given, strict=True):
            parameter.grad = own[step]
        optimizer.step()
    for parameter, own in zip(parameters, given, strict=True):
        assert torch.equal(parameter, adamw(normal(4, 3), own, (0.9, 0.999)))
        assert optimizer.state[parameter]["step"] == sum(gradient is not None for gradient in own)


def test_groups_have_betas_of_their_own_or_those_of_the_configuration() -> None:
    usual, own = nn.Parameter(normal(4, 3)), nn.Parameter(normal(4, 3))
    groups: list[dict[str, Any]] = [
        {"params": [usual], "algorithm": "adamw"},
        {"params": [own], "algorithm": "adamw", "betas": (0.5, 0.7)},
    ]
    optimizer = M3(groups, config(lr=0.05, weight_decay=0.1, adam={"beta1": 0.8, "beta2": 0.95}))
    for gradient in gradients(4, 3):
        usual.grad = own.grad = gradient
        optimizer.step()
    assert torch.equal(usual, adamw(normal(4, 3), list(gradients(4, 3)), (0.8, 0.95)))
    assert torch.equal(own, adamw(normal(4, 3), list(gradients(4, 3)), (0.5, 0.7)))


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


def test_parameters_without_gradient_do_not_move() -> None:
    moved, still = nn.Parameter(normal(6, 4)), nn.Parameter(normal(6, 4))
    for algorithm in ("m3", "adamw"):
        optimizer = M3([{"params": [moved, still], "algorithm": algorithm}], config())
        moved.grad = normal(6, 4, seed=2)
        optimizer.step()
        assert torch.equal(still, normal(6, 4))
    assert not torch.equal(moved, normal(6, 4))


def test_a_parameter_without_gradient_does_not_change_what_the_others_do() -> None:
    matrices, alone = [nn.Parameter(normal(6, 4)) for _ in range(3)], nn.Parameter(normal(6, 4))
    among = M3([{"params": matrices, "algorithm": "m3", "lr": 0.1}], config())
    single = M3([{"params": [alone], "algorithm": "m3", "lr": 0.1}], config())
    for gradient in gradients(6, 4):
        matrices[1].grad = alone.grad = gradient
        among.step()
        single.step()
    torch.testing.assert_close(matrices[1], alone, rtol=0, atol=1e-6)
    assert torch.equal(matrices[0], normal(6, 4))
    assert not any(tensor.any() for tensor in among.state[matrices[2]].values())


@pytest.mark.parametrize("algorithm", ["m3", "adamw"])
def test_a_group_in_which_nothing_has_a_gradient_fires_without_moving(algorithm: str) -> None:
    parameter, other = nn.Parameter(normal(6, 4)), nn.Parameter(normal(6, 4))
    groups: list[dict[str, Any]] = [
        {"params": [parameter], "algorithm": algorithm, "weight_decay": 0.5},
        {"params": [other], "algorithm": "adamw"},
    ]
    optimizer = M3(groups, config(levels=LEVELS[2]))
    other.grad = normal(6, 4, seed=1)
    optimizer.step()
    assert torch.equal(parameter, normal(6, 4))
    assert not any(tensor.any() for tensor in optimizer.state[parameter].values())
    assert [group["num_steps"] for group in optimizer.param_groups] == [1, 1]
    assert not optimizer.skipped
    parameter.grad = normal(6, 4, seed=2)
    optimizer.step()
    assert not torch.equal(parameter, normal(6, 4))
    if algorithm == "m3":
        # The firing in which all levels take part is over.
        assert torch.equal(optimizer.state[parameter]["buffer_1"], parameter.grad)
        assert not optimizer.state[parameter]["momentum_1"].any()


def mixed(
    settings: OptimizerConfig, dtype: torch.dtype = torch.float32, period: int = 1
) -> tuple[list[nn.Parameter], M3]:
    """Matrices and a vector, an m3 group and an adamw one."""
    parameters = [nn.Parameter(normal(*shape).to(dtype)) for shape in ((9, 6), (2, 5, 8), (7,))]
    groups: list[dict[str, Any]] = [
        {"params": parameters[:2], "algorithm": "m3", "lr": 0.05, "period": period},
        {"params": parameters[2:], "algorithm": "adamw", "lr": 0.05, "period": period},
    ]
    return parameters, M3(groups, settings)


def step_by(parameters: list[nn.Parameter], optimizer: M3, seed: int, **arguments: Any) -> None:
    for number, parameter in enumerate(parameters):
        parameter.grad = normal(*parameter.shape, seed=100 * seed + number).to(parameter.dtype)
    optimizer.step(**arguments)


def everything(parameters: list[nn.Parameter], optimizer: M3) -> list[Tensor]:
    """Copies of all that a step may change."""
    states = [tensor for parameter in parameters for tensor in optimizer.state[parameter].values()]
    counters = [torch.tensor(group["num_steps"]) for group in optimizer.param_groups]
    return [tensor.detach().clone() for tensor in (*parameters, *states, *counters)]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("form", ["levels", "paper"])
def test_gradients_that_are_not_finite_change_no_bit_of_anything(
    bad: float, where: int, period: int, form: str
) -> None:
    settings = config(levels=LEVELS[3]) if form == "levels" else OptimizerConfig(form="paper")
    parameters, optimizer = mixed(settings, period=period)
    untouched, undisturbed = mixed(settings, period=period)
    for seed in range(4):
        step_by(parameters, optimizer, seed, report_in=0)
        step_by(untouched, undisturbed, seed)
    before = everything(parameters, optimizer)
    for number, parameter in enumerate(parameters):
        parameter.grad = normal(*parameter.shape, seed=number)
    gradient = parameters[where].grad
    assert gradient is not None
    gradient.view(-1)[3] = bad
    for _ in range(2):
        optimizer.step(report_in=0)
        assert optimizer.skipped
        assert optimizer.moved == [None, None]
        assert same(everything(parameters, optimizer), before)
    # It goes on as if those steps had never been.
    for seed in range(4, 8):
        step_by(parameters, optimizer, seed)
        step_by(untouched, undisturbed, seed)
        assert not optimizer.skipped
    assert same(everything(parameters, optimizer), everything(untouched, undisturbed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_gradients_that_are_finite_are_not_skipped(dtype: torch.dtype) -> None:
    parameters, optimizer = mixed(config(), dtype)
    largest = torch.finfo(dtype).max
    for parameter in parameters:
        # Their sum is infinite, none of them is.
        parameter.grad = torch.full_like(parameter, largest) * normal(*parameter.shape).sign().to(dtype)
    optimizer.step()
    assert not optimizer.skipped
    for number, parameter in enumerate(parameters[:2]):
        assert parameter.isfinite().all()
        assert not torch.equal(parameter, normal(*parameter.shape).to(dtype)), number


def test_whoever_knows_whether_gradients_are_finite_is_trusted() -> None:
    parameters, optimizer = mixed(config())
    before = everything(parameters, optimizer)
    step_by(parameters, optimizer, 0, finite=False)
    assert optimizer.skipped
    assert same(everything(parameters, optimizer), before)
    other, checked = mixed(config())
    step_by(parameters, optimizer, 1, finite=True)
    step_by(other, checked, 1)
    assert not optimizer.skipped
    assert same(everything(parameters, optimizer), everything(other, checked))
    assert parameters[2].grad is not None
    parameters[2].grad[0] = float("nan")
    optimizer.step(finite=True)
    assert not optimizer.skipped
    assert parameters[2].isnan().any()


def test_a_step_without_any_gradient_is_taken() -> None:
    parameters, optimizer = mixed(config())
    optimizer.step()
    assert not optimizer.skipped
    assert [group["num_steps"] for group in optimizer.param_groups] == [1, 1]
    assert all(torch.equal(parameter, normal(*parameter.shape)) for parameter in parameters)


def test_a_zero_gradient_only_decays() -> None:
    found, _ = train(normal(6, 4), [torch.zeros(6, 4)], config(), lr=0.5, decay=0.1)
    torch.testing.assert_close(found, normal(6, 4) * 0.95)


@pytest.mark.parametrize("finite", [None, True])
def test_a_sparse_gradient_is_refused_by_parameter_before_anything_moves(finite: bool | None) -> None:
    table, matrix = nn.Embedding(8, 6, sparse=True), nn.Parameter(normal(6, 4))
    groups: list[dict[str, Any]] = [
        {"params": [("matrix", matrix)], "algorithm": "m3"},
        {"params": [("table", table.weight)], "algorithm": "adamw", "name": "embeddings"},
    ]
    optimizer = M3(groups, config())
    matrix.grad = normal(6, 4)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(
        TypeError, match=r"parameter table of optimizer group embeddings has a gradient of layout .*coo"
    ):
        optimizer.step(finite=finite)
    assert torch.equal(matrix, normal(6, 4))
    assert [group["num_steps"] for group in optimizer.param_groups] == [0, 0]


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


def test_a_closure_whose_gradients_are_not_finite_gives_its_loss_and_moves_nothing() -> None:
    parameter = nn.Parameter(normal(6, 4))
    optimizer = M3([{"params": [parameter], "algorithm": "m3"}], config())

    def closure() -> float:
        parameter.grad = torch.full((6, 4), float("nan"))
        return 3.0

    assert optimizer.step(closure) == 3.0
    assert optimizer.skipped
    assert torch.equal(parameter, normal(6, 4))


@pytest.mark.parametrize("plan", ["auto", "owner", "gather", "gram", "local", "replicated"])
@pytest.mark.parametrize("shape", [(12, 5), (2, 5, 9)])
def test_on_one_rank_every_plan_is_the_same_optimizer(plan: str, shape: tuple[int, ...]) -> None:
    weight, grads = normal(*shape), gradients(*shape)
    expected, _ = train(weight, grads, config())
    found, optimizer = train(weight, grads, config(plan=plan))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    (schedule,) = optimizer.schedules()
    assert {bucket.plan for bucket in schedule.buckets} == {"local" if plan == "auto" else plan}


def test_block_periodic_on_one_rank_is_exact_and_warns_that_it_is_not_on_more(caplog: pytest.LogCaptureFixture) -> None:
    weight, grads = normal(9, 6), gradients(9, 6)
    expected, _ = train(weight, grads, config())
    found, _ = train(weight, grads, config(plan={"strategy": "block_periodic", "block_period": 3}))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert "block_periodic is not exact: 2 of 3 steps" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_other_dtypes_move_by_the_fp32_update(dtype: torch.dtype) -> None:
    grads = [gradient.bfloat16() for gradient in gradients(9, 6)]
    weight = normal(9, 6).bfloat16()
    parameter = nn.Parameter(weight.to(dtype))
    optimizer = M3([{"params": [parameter], "algorithm": "m3", "lr": 0.05, "weight_decay": 0.0}], config())
    before = parameter.detach().clone()
    parameter.grad = grads[0].to(dtype)
    optimizer.step()
    expected, _ = train(weight.float(), [grads[0].float()], config(), decay=0.0)
    update = (expected - weight.float()).to(dtype)
    torch.testing.assert_close(
        parameter.detach(), before + update, rtol=0, atol=1e-2 if dtype == torch.bfloat16 else 1e-6
    )


def test_parameters_that_do_not_lie_row_by_row_move_as_if_they_did() -> None:
    weight, grads = normal(9, 6), gradients(9, 6)
    parameter = nn.Parameter(weight.mT.contiguous().mT)
    assert not parameter.is_contiguous()
    optimizer = M3([{"params": [parameter], "algorithm": "m3", "lr": 0.05, "weight_decay": 0.1}], config())
    for gradient in grads:
        parameter.grad = gradient
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), train(weight, grads, config())[0], rtol=0, atol=1e-6)


def test_groups_added_later_train_like_the_others() -> None:
    first, second = nn.Parameter(normal(6, 4)), nn.Parameter(normal(6, 4))
    optimizer = M3([{"params": [first], "algorithm": "m3", "lr": 0.1}], config())
    first.grad = normal(6, 4, seed=1)
    optimizer.step()
    optimizer.add_param_group({"params": [second], "algorithm": "m3", "lr": 0.1, "name": "late"})
    assert set(optimizer.state[second]) == set(optimizer.state[first])
    second.grad, first.grad = normal(6, 4, seed=1), None
    optimizer.step()
    # Its own first firing, in which all levels take part.
    assert [group["num_steps"] for group in optimizer.param_groups] == [2, 1]
    assert torch.equal(first, second)
    assert len(optimizer.moved) == 2


def test_settings_of_the_configuration_are_the_default_of_a_group() -> None:
    optimizer = M3([{"params": [nn.Parameter(normal(3, 3))], "algorithm": "m3"}], config(lr=0.3, weight_decay=0.7))
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.3, 0.7)
