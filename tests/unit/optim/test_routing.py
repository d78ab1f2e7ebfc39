from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hopescale.config.compose import load_config
from hopescale.errors import ConfigError, Problem
from hopescale.model.predictor import HopePredictor
from hopescale.model.schema import ModelConfig
from hopescale.optim.m3 import M3
from hopescale.optim.routing import SHORTEST_SIDE, parameter_groups, route, routing_table
from hopescale.optim.schema import OptimizerConfig


def predictor(**fields: Any) -> HopePredictor:
    config = {
        "encoder_dim": 16,
        "grid": (3, 3),
        "state_dim": 3,
        "width": 24,
        "block_pattern": ("S", "H", "T"),
        "memory": {"heads": 2, "hidden_multiplier": 1.0},
        "attention": {"heads": 2},
        "spatial_mixing": True,
    }
    with torch.device("meta"):
        return HopePredictor(ModelConfig.model_validate(config | fields))


def groups(config: dict[str, Any] | None = None, **fields: Any) -> list[dict[str, Any]]:
    return parameter_groups(predictor(**fields).named_parameters(), OptimizerConfig.model_validate(config or {}))


def refused(make: Callable[[], object]) -> Problem:
    with pytest.raises(ConfigError) as caught:
        make()
    (problem,) = caught.value.problems
    return problem


def test_every_parameter_goes_where_its_kind_belongs() -> None:
    routes = {r.name: r.group for r in route(predictor().named_parameters(), OptimizerConfig())}
    assert routes.keys() == dict(predictor().named_parameters()).keys()
    by_group: dict[str, set[str]] = {}
    for name, group in routes.items():
        by_group.setdefault(group, set()).add(name)
    attention = {
        f"blocks.{n}.{part}.weight" for n in (0, 2) for part in ("attention.qkv", "attention.project", "fc1", "fc2")
    }
    assert by_group["titan"] == {"blocks.1.memory.w1", "blocks.1.memory.w2"}
    assert by_group["cms"] == {f"blocks.1.cms.levels.{n}.{fc}.weight" for n in range(3) for fc in ("fc1", "fc2")}
    assert by_group["attention"] == attention
    assert by_group["projections"] == {
        "embed.weight",
        "project.weight",
        "blocks.1.memory.query.weight",
        "blocks.1.memory.out.weight",
        "blocks.1.spatial_mixing.first.weight",
        "blocks.1.spatial_mixing.second.weight",
    }
    assert by_group["embeddings"] == {
        "frame_position.weight",
        "target_position.weight",
        "action_encoder.weight",
        "state_encoder.weight",
    }
    parameters = dict(predictor().named_parameters())
    assert by_group["vectors"] == {
        name
        for name, p in parameters.items()
        if p.ndim == 1 or name.endswith(("memory.norm_weight", "memory.norm_bias"))
    }


@pytest.mark.parametrize(
    ("shape", "group"),
    [
        ((SHORTEST_SIDE, 64), "projections"),
        ((SHORTEST_SIDE - 1, 64), "embeddings"),
        ((64, SHORTEST_SIDE - 1), "embeddings"),
        ((3, 64, SHORTEST_SIDE), "projections"),
        ((64, 64, 2), "embeddings"),
        ((1, 4096), "embeddings"),
        ((4096, 1), "embeddings"),
        ((2, 3), "embeddings"),
    ],
)
def test_matrices_with_a_short_side_are_not_orthogonalised(shape: tuple[int, ...], group: str) -> None:
    (found,) = route([("embed.weight", torch.empty(shape))], OptimizerConfig())
    assert (found.group, found.shape) == (group, shape)


def test_the_first_rule_that_matches_wins() -> None:
    parameters = dict.fromkeys(
        ("blocks.0.cms.levels.0.norm.weight", "blocks.0.cms.levels.0.fc1.bias", "blocks.0.attention.qkv.bias"),
        torch.empty(32),
    )
    assert [r.group for r in route(parameters.items(), OptimizerConfig())] == ["vectors"] * 3


def test_a_parameter_that_no_rule_names_is_refused() -> None:
    found = refused(lambda: route([("blocks.0.gate", torch.empty(32, 32))], OptimizerConfig()))
    assert found.field == "optimizer.routes"
    assert "no group for blocks.0.gate" in found.rule
    assert "{pattern: blocks.0.gate, group: projections}" in found.fix


def test_groups_come_in_the_order_of_the_configuration_and_hold_each_parameter_once() -> None:
    found = groups()
    assert [g["name"] for g in found] == ["titan", "cms", "attention", "projections", "embeddings", "vectors"]
    assert [g["algorithm"] for g in found] == ["adamw", "m3", "m3", "m3", "adamw", "adamw"]
    names = [name for g in found for name in g["param_names"]]
    assert sorted(names) == sorted(dict(predictor().named_parameters()))
    model = predictor()
    by_name: dict[str, Tensor] = dict(model.named_parameters())
    for group in parameter_groups(model.named_parameters(), OptimizerConfig()):
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert parameter is by_name[name]


def test_groups_carry_their_own_rate_and_decay() -> None:
    settings = {
        "lr": 0.1,
        "weight_decay": 0.04,
        "groups": {"titan": {"lr_scale": 0.3, "weight_decay": 0.2}, "cms": {"algorithm": "adamw"}},
    }
    by_name = {g["name"]: g for g in groups(settings)}
    assert (by_name["titan"]["lr"], by_name["titan"]["weight_decay"]) == (pytest.approx(0.03), 0.2)
    assert (by_name["cms"]["lr"], by_name["cms"]["weight_decay"]) == (0.1, 0.04)
    assert by_name["vectors"]["weight_decay"] == 0.0
    assert by_name["cms"]["algorithm"] == "adamw"


def test_groups_carry_their_own_betas_or_those_of_adam() -> None:
    settings = {
        "adam": {"beta1": 0.8, "beta2": 0.9},
        "groups": {"titan": {"beta1": 0.5}, "vectors": {"beta2": 0.6}, "embeddings": {"beta1": 0.0, "beta2": 0.1}},
    }
    by_name = {g["name"]: g["betas"] for g in groups(settings) if g["algorithm"] == "adamw"}
    assert by_name == {"titan": (0.5, 0.9), "vectors": (0.8, 0.6), "embeddings": (0.0, 0.1)}
    assert not any("betas" in g for g in groups(settings) if g["algorithm"] == "m3")
    config = OptimizerConfig.model_validate(settings)
    optimizer = M3(parameter_groups(predictor().named_parameters(), config), config)
    assert {g["name"]: g["betas"] for g in optimizer.param_groups if g["algorithm"] == "adamw"} == by_name


def test_short_matrices_of_a_group_by_adamw_stay_in_it() -> None:
    config = OptimizerConfig.model_validate({"groups": {"projections": {"algorithm": "adamw"}}})
    (found,) = route([("embed.weight", torch.empty(2, 64))], config)
    assert found.group == "projections"


def routes_of(*rules: tuple[str, str]) -> dict[str, Any]:
    return {"routes": [{"pattern": pattern, "group": group} for pattern, group in rules]}


def test_rules_of_the_configuration_come_before_the_built_in_ones_first_match_first() -> None:
    config = OptimizerConfig.model_validate(
        routes_of(("embed.weight", "embeddings"), ("*.fc1.weight", "titan"), ("blocks.1.*", "vectors"))
    )
    usual = {r.name: r.group for r in route(predictor().named_parameters(), OptimizerConfig())}
    found = {r.name: r.group for r in route(predictor().named_parameters(), config)}
    assert found["embed.weight"] == "embeddings"
    for name, group in found.items():
        if name.endswith(".fc1.weight"):
            assert group == "titan"
        elif name.startswith("blocks.1."):
            assert group == "vectors"
        elif name != "embed.weight":
            assert group == usual[name]


def test_a_short_matrix_is_not_orthogonalised_whatever_the_configuration_says() -> None:
    config = OptimizerConfig.model_validate(routes_of(("*", "cms")))
    (found,) = route([("blocks.0.gate", torch.empty(2, 64))], config)
    assert found.group == "embeddings"


def test_rules_of_the_configuration_that_no_parameter_is_left_for_are_refused() -> None:
    for rules, unused in (
        ([("blocks.9.*", "titan")], "blocks.9.*"),
        ([("blocks.1.*", "titan"), ("blocks.1.cms.*", "cms")], "blocks.1.cms.*"),
    ):
        config = OptimizerConfig.model_validate(routes_of(*rules))
        found = refused(lambda config=config: route(predictor().named_parameters(), config))
        assert (found.field, found.value) == ("optimizer.routes", unused)
        assert "drop their routes" in found.fix


def test_the_split_of_phase_4_is_the_published_one() -> None:
    config = load_config(["experiment=phase4"])
    with torch.device("meta"):
        model = HopePredictor(config.model)
    numbers: dict[str, int] = {}
    for group in parameter_groups(model.named_parameters(), config.optimizer, config.model.cms.parameter_periods):
        numbers[group["algorithm"]] = numbers.get(group["algorithm"], 0) + sum(p.numel() for p in group["params"])
    assert {algorithm: round(number / 1e6, 1) for algorithm, number in numbers.items()} == {"m3": 12.9, "adamw": 30.0}
    assert sum(numbers.values()) == sum(p.numel() for p in model.parameters())


def test_a_group_given_in_part_keeps_its_own_defaults_for_the_rest() -> None:
    config = OptimizerConfig.model_validate({"groups": {"titan": {"period": 4}, "cms": {"lr_scale": 0.5}}})
    assert (config.groups.titan.weight_decay, config.groups.titan.period) == (0.0, 4)
    assert (config.groups.cms.algorithm, config.groups.cms.weight_decay) == ("m3", None)
    with_decay = OptimizerConfig.model_validate({"groups": {"titan": {"weight_decay": None}}})
    assert with_decay.groups.titan.weight_decay is None


def test_groups_that_own_nothing_are_left_out() -> None:
    assert "cms" not in [g["name"] for g in groups(cms={"levels": []})]
    assert "titan" not in [g["name"] for g in groups(block_pattern=("S",))]


def test_parameters_with_a_period_of_their_own_make_groups_of_their_own() -> None:
    levels = [{"period": p, "hidden_multiplier": 1.0} for p in (8, 1, 64, 8)]
    model = predictor(cms={"mode": "param_period", "levels": levels})
    settings = {"groups": {"cms": {"algorithm": "m3", "lr_scale": 0.5, "weight_decay": 0.2}, "vectors": {"period": 2}}}
    config = OptimizerConfig.model_validate(settings)
    found = {
        g["name"]: g for g in parameter_groups(model.named_parameters(), config, model.config.cms.parameter_periods)
    }
    assert {name: g["period"] for name, g in found.items()} == {
        **dict.fromkeys(["titan", "cms", "attention", "projections", "embeddings"], 1),
        "cms_8": 8,
        "cms_64": 64,
        "vectors": 2,
        "vectors_1": 1,
        "vectors_8": 8,
        "vectors_64": 64,
    }
    for name in ("cms", "cms_8", "cms_64"):
        assert (found[name]["algorithm"], found[name]["lr_scale"], found[name]["weight_decay"]) == ("m3", 0.5, 0.2)
    by_name = {name: g["period"] for g in found.values() for name in g["param_names"]}
    assert by_name.keys() == dict(model.named_parameters()).keys()
    for number, period in enumerate((8, 1, 64, 8)):
        level = [p for name, p in by_name.items() if name.startswith(f"blocks.1.cms.levels.{number}.")]
        assert level == [period] * 6


def test_frames_of_a_level_are_no_period_of_its_parameters() -> None:
    model = predictor()
    assert model.config.cms.parameter_periods == {}
    assert {g["period"] for g in groups()} == {1}


def test_a_group_gets_the_period_of_its_settings() -> None:
    found = groups({"groups": {"titan": {"period": 5}}})
    assert {g["name"]: g["period"] for g in found if g["period"] > 1} == {"titan": 5}


def test_asking_for_m3_where_it_would_own_nothing_is_refused() -> None:
    adamw = {"algorithm": "adamw"}
    settings = {"groups": {"titan": {"algorithm": "m3"}, "cms": adamw, "attention": adamw, "projections": adamw}}
    found = refused(lambda: groups(settings, block_pattern=("S",)))
    assert (found.field, found.value, found.fix) == ("optimizer.groups", "m3 for titan", "set optimizer=adamw")


def test_routes_that_leave_m3_nothing_are_refused() -> None:
    found = refused(lambda: groups(routes_of(("*", "vectors"))))
    assert (found.field, found.value) == ("optimizer.routes", "* -> vectors")
    assert "cms, attention, projections own no parameter" in found.rule


def test_the_table_has_a_line_for_each_group() -> None:
    found = groups({"lr": 2e-4})
    header, *lines = routing_table(found).splitlines()
    assert header.split() == ["group", "algorithm", "tensors", "parameters", "lr", "decay"]
    assert lines[1].split() == ["cms", "m3", "6", f"{2 * 24 * 24 * 7.5:,.0f}", "2.00e-04", "0.04"]
    assert sum(int(line.split()[3].replace(",", "")) for line in lines) == sum(
        p.numel() for p in predictor().parameters()
    )


def test_the_table_tells_periods_where_there_are_any() -> None:
    model = predictor(cms={"mode": "param_period", "levels": [{"period": 123456, "hidden_multiplier": 1.0}]})
    found = parameter_groups(model.named_parameters(), OptimizerConfig(), model.config.cms.parameter_periods)
    header, *lines = routing_table(found).splitlines()
    assert header.split()[-1] == "period"
    assert {line.split()[0]: line.split()[-1] for line in lines} == {g["name"]: str(g["period"]) for g in found}
    assert len({len(line) for line in (header, *lines)}) == 1


def test_the_groups_make_an_optimizer() -> None:
    config = OptimizerConfig()
    model = predictor()
    optimizer = M3(parameter_groups(model.named_parameters(), config), config)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
