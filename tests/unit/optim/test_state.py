"""What M3 keeps, saves and loads, and the groups and states that it refuses."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hopescale.optim.m3 import M3
from hopescale.optim.schema import M3Config, OptimizerConfig
from hopescale.optim.state import OPTIONS, SCHEDULERS

LEVELS = [
    {"period": 1, "eta": 0.8, "theta": 0.2},
    {"period": 2, "eta": 0.95, "theta": 0.05, "weight": 0.5},
    {"period": 6, "eta": 0.99, "theta": 0.3},
]
OFFLOADED = {"buffers": "cascaded", "slow_levels": "offloaded"}
KINDS: dict[str, dict[str, Any]] = {
    "levels": {"levels": LEVELS},
    "cascaded": {"levels": LEVELS, "buffers": "cascaded"},
    "offloaded": {"levels": LEVELS, **OFFLOADED},
    "one level": {"levels": LEVELS[:1]},
    "paper": {"form": "paper", "paper_form": {"period": 3}},
    "paper without denominator": {"form": "paper", "paper_form": {"period": 3, "denominator": "none"}},
}
SHAPES = [(9, 6), (2, 5, 8), (7,)]


def config(kind: str = "levels") -> OptimizerConfig:
    return OptimizerConfig.model_validate(KINDS[kind] | {"newton_schulz": {"precision": "fp32"}})


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Trained:
    """Matrices in an m3 group `cms` and a vector in an adamw group `vectors`, and their optimizer."""

    def __init__(self, kind: str = "levels", dtype: torch.dtype = torch.float32, **group: Any) -> None:
        self.parameters = [nn.Parameter(normal(*shape).to(dtype)) for shape in SHAPES]
        matrices, vectors = self.parameters[:2], self.parameters[2:]
        groups: list[dict[str, Any]] = [
            {"name": "cms", "params": matrices, "param_names": ["a", "b"], "algorithm": "m3", "lr": 0.05},
            {"name": "vectors", "params": vectors, "param_names": ["c"], "algorithm": "adamw", "lr": 0.05},
        ]
        self.optimizer = M3([one | group for one in groups], config(kind))

    def train(self, steps: range) -> Trained:
        for step in steps:
            for number, parameter in enumerate(self.parameters):
                gradient = (1 + step % 3) * normal(*parameter.shape, seed=10 * step + number)
                parameter.grad = gradient.to(parameter.dtype)
            self.optimizer.step()
        return self

    def everything(self) -> list[Tensor]:
        """Copies of parameters, states and counters."""
        states = [tensor for p in self.parameters for _, tensor in sorted(self.optimizer.state[p].items())]
        counters = [torch.tensor(group["num_steps"]) for group in self.optimizer.param_groups]
        return [tensor.detach().clone() for tensor in (*self.parameters, *states, *counters)]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, two, strict=True))


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("period", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_state_is_made_with_the_optimizer_in_fp32_and_stays_the_same_objects(
    kind: str, period: int, dtype: torch.dtype
) -> None:
    trained = Trained(kind, dtype, period=period)
    own = {"period_sum"} if period > 1 else set()
    matrix = {
        "levels": {"momentum_0", "momentum_1", "momentum_2", "buffer_1", "buffer_2"},
        "cascaded": {"momentum_0", "momentum_1", "momentum_2", "buffer_1", "buffer_2"},
        "offloaded": {"momentum_0", "momentum_1", "momentum_2", "buffer_1", "buffer_2", "slow_sum"},
        "one level": {"momentum_0"},
        "paper": {"momentum_0", "momentum_1", "buffer_1", "slow_update", "second_moment"},
        "paper without denominator": {"momentum_0", "momentum_1", "buffer_1", "slow_update"},
    }[kind]
    for parameter, names in zip(trained.parameters, [matrix, matrix, {"exp_avg", "exp_avg_sq", "step"}], strict=True):
        state = trained.optimizer.state[parameter]
        assert set(state) == names | own
        for name, tensor in state.items():
            assert tensor.dtype == torch.float32
            assert not tensor.any()
            assert tensor.shape == (() if name == "step" else parameter.shape)
            assert not tensor.requires_grad
    before = [id(tensor) for state in trained.optimizer.state.values() for tensor in state.values()]
    trained.train(range(7))
    assert [id(tensor) for state in trained.optimizer.state.values() for tensor in state.values()] == before
    assert all(tensor.dtype == torch.float32 for s in trained.optimizer.state.values() for tensor in s.values())


def test_parameters_that_never_train_have_state_too() -> None:
    frozen = nn.Parameter(normal(6, 4), requires_grad=False)
    optimizer = M3([{"params": [frozen], "algorithm": "m3"}], config())
    assert len(optimizer.state_dict()["state"][0]) == 5


@pytest.mark.parametrize("way", [copy.deepcopy, through_a_file])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("period", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_and_loaded_goes_on_bit_for_bit(kind: str, period: int, dtype: torch.dtype, way: Any) -> None:
    # Saved in the middle of everything: sums and buffers that wait, levels that rest.
    one = Trained(kind, dtype, period=period).train(range(9))
    weights = [parameter.detach().clone() for parameter in one.parameters]
    saved = way(one.optimizer.state_dict())
    one.train(range(9, 22))

    two = Trained(kind, dtype, period=period)
    with torch.no_grad():
        for parameter, weight in zip(two.parameters, weights, strict=True):
            parameter.copy_(weight)
    two.optimizer.load_state_dict(state_dict=saved)
    assert [group["num_steps"] for group in two.optimizer.param_groups] == [9, 9]
    two.train(range(9, 22))
    assert same(two.everything(), one.everything())


def test_states_of_bf16_parameters_keep_what_bf16_would_lose() -> None:
    one, two = (Trained(dtype=torch.bfloat16) for _ in range(2))
    one.train(range(5))
    two.optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))
    for mine, theirs in zip(two.parameters, one.parameters, strict=True):
        for name, tensor in one.optimizer.state[theirs].items():
            loaded = two.optimizer.state[mine][name]
            assert loaded.dtype == torch.float32
            assert torch.equal(loaded, tensor)
            assert name == "step" or not torch.equal(tensor, tensor.bfloat16().float()) or not tensor.any()


def test_loaded_counters_go_on_past_what_bf16_can_count() -> None:
    one, two = (Trained("one level", torch.bfloat16) for _ in range(2))
    saved = copy.deepcopy(one.optimizer.state_dict())
    for group in saved["param_groups"]:
        group["num_steps"] = 300
    saved["state"][2]["step"].fill_(300)
    two.optimizer.load_state_dict(saved)
    two.train(range(1))
    assert two.optimizer.state[two.parameters[2]]["step"] == 301
    assert [group["num_steps"] for group in two.optimizer.param_groups] == [301, 301]


def test_options_come_back_with_the_state() -> None:
    one, two = Trained(), Trained()
    for group in one.optimizer.param_groups:
        group["lr"], group["betas"] = 0.7, (0.1, 0.2)
    two.optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))
    assert [(group["lr"], group["betas"]) for group in two.optimizer.param_groups] == [(0.7, (0.1, 0.2))] * 2


@pytest.mark.parametrize(
    ("saved_by", "loaded_by", "words"),
    [
        (
            {"kind": "one level"},
            {},
            r"cms was saved with time_scales .levels of periods 1, plain.* 1, 2, 6, plain",
        ),
        ({}, {"kind": "one level"}, r"group cms was saved with time_scales .levels of periods 1, 2, 6"),
        ({}, {"kind": "paper"}, r"time_scales .levels.* and has .paper, period"),
        ({"kind": "paper"}, {}, r"time_scales .paper.* and has .levels"),
        ({"kind": "paper without denominator"}, {"kind": "paper"}, r"parameter a .* lacks second_moment"),
        ({"kind": "cascaded"}, {"kind": "offloaded"}, r"time_scales .*resident.* and has .*offloaded"),
        ({"period": 2}, {}, r"group cms was saved with period 2 and has 1"),
        ({}, {"period": 2}, r"group cms was saved with period 1 and has 2"),
        ({"algorithm": "adamw"}, {}, r"group cms was saved with algorithm 'adamw' and has 'm3'"),
    ],
)
def test_state_of_another_optimizer_is_refused_and_nothing_is_taken_over(
    saved_by: dict[str, Any], loaded_by: dict[str, Any], words: str
) -> None:
    saved = copy.deepcopy(Trained(**saved_by).train(range(3)).optimizer.state_dict())
    for group in saved["param_groups"]:
        group["lr"] = 0.9
    loader = Trained(**loaded_by)
    before = loader.everything()
    with pytest.raises(ValueError, match=words):
        loader.optimizer.load_state_dict(saved)
    assert same(loader.everything(), before)
    assert [group["lr"] for group in loader.optimizer.param_groups] == [0.05, 0.05]


def test_state_that_lacks_a_parameter_is_refused() -> None:
    one, two = Trained(), Trained()
    saved = copy.deepcopy(one.optimizer.state_dict())
    del saved["state"][1]
    with pytest.raises(ValueError, match="parameter b in optimizer group cms lacks"):
        two.optimizer.load_state_dict(saved)
    saved = copy.deepcopy(one.optimizer.state_dict())
    saved["param_groups"].pop()
    with pytest.raises(ValueError, match="state of 1 optimizer groups does not fit an optimizer of 2"):
        two.optimizer.load_state_dict(saved)


def test_state_of_other_parameters_is_refused_by_their_number_and_names() -> None:
    one, two = Trained(), Trained()
    saved = copy.deepcopy(one.optimizer.state_dict())
    saved["param_groups"][0].update(params=[0], param_names=["a"])
    with pytest.raises(
        ValueError, match="group cms was saved with 1 parameters and has 2; not in both are b: it is of"
    ):
        two.optimizer.load_state_dict(saved)
    del saved["param_groups"][0]["param_names"]
    with pytest.raises(ValueError, match="group cms was saved with 1 parameters and has 2: it is of another model"):
        two.optimizer.load_state_dict(saved)
    del saved["param_groups"][0]["num_steps"]
    with pytest.raises(ValueError, match="group cms was saved without num_steps"):
        two.optimizer.load_state_dict(saved)


def test_what_is_no_state_dict_is_refused() -> None:
    with pytest.raises(ValueError, match="state dict lacks state and param_groups: it is not that of an optimizer"):
        Trained().optimizer.load_state_dict({})


def test_how_a_level_decays_may_change_between_saving_and_loading() -> None:
    other = [level | {"eta": 0.5, "theta": 0.5, "weight": 2.0} for level in LEVELS]
    one, two = (
        M3([{"params": [matrix()], "algorithm": "m3"}], M3Config.model_validate(fields))
        for fields in ({"levels": LEVELS}, {"levels": other, "drain": "sum"})
    )
    one.param_groups[0]["params"][0].grad = normal(6, 4, seed=1)
    one.step()
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    (mine,), (theirs,) = two.state.values(), one.state.values()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert mine["momentum_0"].any()


def test_state_of_other_shapes_is_refused() -> None:
    one = M3([{"name": "cms", "params": [nn.Parameter(normal(6, 4))], "algorithm": "m3"}], config())
    two = M3([{"name": "cms", "params": [nn.Parameter(normal(6, 5))], "algorithm": "m3"}], config())
    with pytest.raises(ValueError, match="shape"):
        two.load_state_dict(copy.deepcopy(one.state_dict()))


def matrix() -> nn.Parameter:
    return nn.Parameter(normal(6, 4))


TWICE = matrix()


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([{"name": "cms", "params": [], "algorithm": "m3"}], r"group cms has no parameters; leave the group out"),
        ([{"params": [matrix()]}], r"group 0 has algorithm None; it must be one of m3, adamw"),
        ([{"name": "cms", "params": [matrix()], "algorithm": "muon"}], r"group cms has algorithm 'muon'"),
        (
            [{"name": "cms", "params": [matrix()], "algorithm": "m3", "momentum": 0.9, "beta": 1}],
            r"group cms has unknown options beta, momentum; M3 knows params, ",
        ),
        ([{"params": [nn.Parameter(torch.ones(3, 3).long(), requires_grad=False)], "algorithm": "adamw"}], r"int64"),
        ([{"params": [nn.Parameter(torch.ones(3, 3, dtype=torch.complex64))], "algorithm": "m3"}], r"complex64"),
        ([{"params": [nn.Parameter(torch.ones(3, 3, dtype=torch.complex128))], "algorithm": "adamw"}], r"complex128"),
        (
            [{"name": "cms", "params": [nn.Parameter(normal(3))], "algorithm": "m3"}],
            r"group cms holds parameter 0 of shape \(3,\); m3 takes matrices: give it to adamw",
        ),
        (
            [
                {"params": [("w", matrix())], "algorithm": "m3"},
                {"params": [("b", nn.Parameter(normal(3)))], "algorithm": "m3"},
            ],
            r"group 1 holds parameter b of shape \(3,\)",
        ),
        (
            [{"params": [nn.Parameter(normal(3, 3).to(torch.float8_e4m3fn))], "algorithm": "adamw"}],
            r"parameter 0 of shape \(3, 3\) in torch.float8_e4m3fn; M3 trains torch.float64, .*torch.float16 alone",
        ),
        ([{"params": [nn.Parameter(torch.empty(0, 4))], "algorithm": "m3"}], r"shape \(0, 4\); m3 takes matrices"),
        (
            [{"name": "cms", "params": [TWICE, TWICE], "algorithm": "m3"}],
            r"cms holds a parameter twice: .* 1 is its parameter 0",
        ),
        (
            [{"params": [TWICE], "algorithm": "m3"}, {"params": [TWICE], "algorithm": "adamw"}],
            r"group 1 holds a parameter twice: its parameter 0 is parameter 0 of optimizer group 0 too; name it once",
        ),
        ([{"params": [matrix() * 2], "algorithm": "m3"}], r"non-leaf"),
        *[
            (
                [{"name": "cms", "params": [matrix()], "algorithm": "m3", "period": period}],
                rf"group cms has period {period!r}",
            )
            for period in (0, -3, 1.5, "2", True, False)
        ],
    ],
)
def test_bad_groups_are_refused(groups: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        M3(groups, config())


def test_a_bad_group_is_refused_later_too_and_leaves_the_optimizer_as_it_was() -> None:
    trained = Trained()
    for group in ({"params": [matrix()], "algorithm": "muon"}, {"params": trained.parameters[:1], "algorithm": "m3"}):
        with pytest.raises(ValueError):
            trained.optimizer.add_param_group(group)
    assert len(trained.optimizer.param_groups) == 2
    assert len(trained.optimizer.state) == 3
    trained.train(range(2))


def test_one_tensor_and_an_iterator_of_tensors_make_a_group() -> None:
    optimizer = M3(
        [{"params": matrix(), "algorithm": "m3"}, {"params": iter([matrix(), matrix()]), "algorithm": "adamw"}],
        config(),
    )
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2]
    assert len(optimizer.state) == 3


def test_all_options_are_taken() -> None:
    values: dict[str, Any] = {
        "params": [matrix()],
        "param_names": ["w"],
        "name": "cms",
        "algorithm": "adamw",
        "lr": 0.1,
        "lr_scale": 0.5,
        "weight_decay": 0.2,
        "betas": (0.3, 0.4),
        "period": 2,
        "num_steps": 0,
    }
    # The rest is what M3 itself and torch's schedulers leave in a group.
    assert set(OPTIONS) - set(values) == {"time_scales", *SCHEDULERS}
    (group,) = M3([values], config()).param_groups
    assert {name: group[name] for name in values} == values


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lr": -1.0}, "lr -1.0; it must be a number of at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay nan"),
        ({"lr": "x"}, "lr 'x'; it must be a number"),
        ({"lr_scale": -2.0}, "lr_scale -2.0; it must be a number"),
        ({"betas": 0.9, "algorithm": "adamw"}, "betas 0.9; they must be two numbers"),
        ({"betas": (1.5, 0.9), "algorithm": "adamw"}, r"betas \(1.5, 0.9\)"),
        ({"betas": (0.5, 0.9)}, "which are adamw's"),
        ({"period": True}, "period True; it must be a whole number"),
        ({"num_steps": -3}, "num_steps -3"),
        ({"param_names": ["a", "b"]}, "2 param_names for 1 parameters"),
    ],
)
def test_options_out_of_range_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        M3([{"params": [matrix()], "algorithm": "m3"} | fields], config())


def test_what_is_no_configuration_is_refused_by_its_kind() -> None:
    settings: Any = {"lr": 1e-3}
    with pytest.raises(TypeError, match=r"got a dict for its config, which must be an M3Config; write M3Config\(lr"):
        M3([{"params": [matrix()], "algorithm": "m3"}], settings)


def test_a_group_may_scale_the_rate_of_the_configuration() -> None:
    groups: list[dict[str, Any]] = [
        {"params": [matrix()], "algorithm": "m3"},
        {"params": [matrix()], "algorithm": "m3", "lr_scale": 3.0},
        {"params": [matrix()], "algorithm": "adamw", "lr_scale": 3.0, "lr": 0.5},
    ]
    assert [group["lr"] for group in M3(groups, M3Config(lr=0.1)).param_groups] == pytest.approx([0.1, 0.3, 0.5])


def test_a_set_of_parameters_has_no_order_and_named_ones_keep_their_names() -> None:
    with pytest.raises(ValueError, match="holds a set, whose order may differ between ranks"):
        M3([{"params": {matrix()}, "algorithm": "m3"}], config())
    optimizer = M3([{"params": [("w", matrix()), ("v", matrix())], "algorithm": "m3"}], config())
    assert optimizer.param_groups[0]["param_names"] == ["w", "v"]


def test_a_copied_optimizer_goes_on_like_the_first() -> None:
    one = Trained().train(range(3))
    other = copy.deepcopy(one)
    for trained in (one, other):
        trained.train(range(3, 6))
    for mine, theirs in zip(one.optimizer.param_groups, other.optimizer.param_groups, strict=True):
        for p, q in zip(mine["params"], theirs["params"], strict=True):
            assert torch.equal(p, q)
            assert p is not q


def test_groups_are_added_later_to_an_optimizer_of_vectors_alone() -> None:
    vector = nn.Parameter(normal(5))
    optimizer = M3([{"params": [vector], "algorithm": "adamw"}], config())
    optimizer.add_param_group({"params": [matrix()], "algorithm": "m3"})
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
    assert optimizer.moved == [None, None]
    with pytest.raises(ValueError, match="has no parameters"):
        optimizer.add_param_group({"params": [], "algorithm": "m3"})
    assert len(optimizer.param_groups) == 2
    for parameter in (vector, optimizer.param_groups[1]["params"][0]):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert [group["num_steps"] for group in optimizer.param_groups] == [1, 1]
