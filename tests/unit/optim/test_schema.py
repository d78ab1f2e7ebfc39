from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hopescale.optim.newton_schulz import LONGEST_SEGMENT
from hopescale.optim.schema import GroupsConfig, M3Config, OptimizerConfig, PlanConfig

BF16_WIRE = {"plan": {"gram_wire": "bf16"}}


def levels(*periods: int) -> list[dict[str, Any]]:
    return [{"period": period} for period in periods]


def refusal(fields: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as refused:
        OptimizerConfig.model_validate(fields)
    return str(refused.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"levels": levels(2)}, ["levels.0.period=2", "must be 1", "every step", "fix: put a level of period 1"]),
        ({"levels": levels(8, 1)}, ["levels.0.period=8", "must be 1"]),
        (
            {"buffers": "cascaded", "levels": levels(1, 4, 6)},
            ["buffers=cascaded", "divide each other in order", "[1, 4, 6]"],
        ),
        ({"buffers": "cascaded", "levels": levels(1, 8, 4)}, ["divide each other in order", "[1, 8, 4]"]),
        ({"slow_levels": "offloaded"}, ["slow_levels=offloaded", "needs buffers=cascaded"]),
        (
            {"slow_levels": "offloaded", "buffers": "cascaded", "levels": levels(1, 1)},
            ["slow_levels=offloaded", "a level with a period above 1", "[1, 1]"],
        ),
        ({"paper_form": {"period": 10}}, ["paper_form={'period': 10}", "ignored with form=levels"]),
        (
            {"form": "paper", "levels": levels(1)},
            ["levels=[{'period': 1, ", "is ignored with form=paper", "leave it out"],
        ),
        (
            {"form": "paper", "nesterov": True, "drain": "sum"},
            ["drain=sum is ignored with form=paper", "nesterov=True is ignored with form=paper", "leave it out"],
        ),
        (BF16_WIRE, ["plan.gram_wire=bf16", "newton_schulz.restart of 1 or 2", "blows up"]),
        (BF16_WIRE | {"newton_schulz": {"restart": 3}}, ["plan.gram_wire=bf16", "restart of 1 or 2", "restart=3"]),
        (BF16_WIRE | {"newton_schulz": {"restart": 2, "steps": 2}}, ["restart=2, steps=2"]),
        (
            {"plan": {"gram_wire": "bf16", "strategy": "owner"}, "newton_schulz": {"restart": 2}},
            ["plan.gram_wire=bf16 is ignored with plan.strategy=owner"],
        ),
        (
            {"plan": "gram", "newton_schulz": {"precision": "bf16"}},
            ["precision=bf16 is ignored with plan.strategy=gram"],
        ),
        (
            {"newton_schulz": {"restart": 2, "precision": "bf16"}},
            ["restart=2 is ignored with newton_schulz.precision=bf16"],
        ),
        (
            {"plan": "block_periodic"},
            ["block_period=None is missing", "strategy=block_periodic needs", "block_period=5"],
        ),
        ({"plan": {"block_period": 3}}, ["block_period=3 is of strategy=block_periodic alone", "strategy is auto"]),
        ({"plan": {"strategy": "owner", "block_period": 3}}, ["block_period=3", "strategy is owner"]),
        (
            {"groups": {"cms": {"beta1": 0.8}}},
            ["groups.cms", "beta1=0.8 is adamw's", "algorithm is m3", "optimizer.levels"],
        ),
        ({"groups": {"titan": {"algorithm": "m3", "beta2": 0.8}}}, ["groups.titan", "algorithm is m3"]),
        (
            {"groups": {"vectors": {"algorithm": "m3"}}},
            ["vectors.algorithm=m3 must be adamw", "m3 orthogonalises matrices"],
        ),
        ({"groups": {"embeddings": {"algorithm": "m3"}}}, ["embeddings.algorithm=m3 must be adamw"]),
        ({"schedule": {"warmup": 0.6, "decay": 0.5}}, ["warmup=0.6", "decay=0.5", "at most 1 together"]),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_by_field_value_and_rule(
    fields: dict[str, Any], words: list[str]
) -> None:
    message = refusal(fields)
    for word in words:
        assert word in message


def test_all_broken_rules_are_told_at_once() -> None:
    message = refusal({"levels": levels(2, 3), "buffers": "cascaded", "paper_form": {"period": 10}})
    for word in ("levels.0.period=2", "divide each other in order", "paper_form"):
        assert word in message


@pytest.mark.parametrize(
    "fields",
    [
        {"buffers": "cascaded", "levels": levels(1, 4, 8, 8, 64)},
        {"buffers": "cascaded", "levels": levels(1, 4), "slow_levels": "offloaded"},
        {"form": "paper", "paper_form": {"period": 10}},
        {"form": "paper"},
        {"levels": levels(1, 5, 3)},
        {"levels": levels(1), "nesterov": True},
        BF16_WIRE | {"newton_schulz": {"restart": 2}},
        {"plan": {"strategy": "block_periodic", "block_period": 2}},
        {"groups": {"titan": {"beta1": 0.8}, "cms": {"algorithm": "adamw", "beta2": 0.9}}},
    ],
)
def test_settings_that_fit_are_taken(fields: dict[str, Any]) -> None:
    OptimizerConfig.model_validate(fields)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("levels.0.period", 0),
        ("levels.0.period", -1),
        ("levels.0.period", 1.5),
        ("levels.0.period", True),
        ("levels.0.eta", 1.0),
        ("levels.0.eta", -0.1),
        ("levels.0.theta", 0.0),
        ("levels.0.weight", float("inf")),
        ("levels", []),
        ("drain", "max"),
        ("form", "seed"),
        ("adjust", "rms"),
        ("buffers", "ring"),
        ("slow_levels", "disk"),
        ("newton_schulz.coefficients", "jordan"),
        ("newton_schulz.steps", 0),
        ("newton_schulz.steps", 21),
        ("newton_schulz.precision", "fp16"),
        ("newton_schulz.restart", -1),
        ("newton_schulz.restart", LONGEST_SEGMENT + 1),
        ("plan.strategy", "ring"),
        ("plan.bucket_mib", 0.0),
        ("plan.gram_wire", "fp16"),
        ("plan.block_period", 1),
        ("plan.latency", -1.0),
        ("plan.bandwidth", 0.0),
        ("plan.across_latency", -1.0),
        ("plan.across_bandwidth", 0.0),
        ("plan.flops", 0.0),
        ("plan.flops_bf16", 0.0),
        ("paper_form.period", 0),
        ("paper_form.alpha", -1.0),
        ("paper_form.momentum", "sgd"),
        ("paper_form.beta1", 0.0),
        ("paper_form.beta2", 1.0),
        ("paper_form.denominator", "rms"),
        ("paper_form.eps", 0.0),
        ("groups.titan.period", 0),
        ("groups.titan.beta1", 1.0),
        ("groups.titan.lr_scale", -1.0),
        ("groups.titan.weight_decay", -1.0),
        ("groups.titan.algorithm", "muon"),
        ("groups.heads", {}),
        ("routes.0.group", "heads"),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("weight_decay", -0.1),
        ("momentum", 0.9),
    ],
)
def test_values_out_of_range_and_unknown_fields_are_refused_by_name(path: str, value: Any) -> None:
    field: Any = value
    keys = path.split(".")
    for key in reversed(keys):
        field = [field] if key.isdigit() else {key: field}
    assert path in refusal(field)


@given(st.sampled_from(["auto", "local", "owner", "replicated", "gram", "gather"]))
def test_a_plan_may_be_given_by_its_strategy_alone(strategy: str) -> None:
    short = OptimizerConfig.model_validate({"plan": strategy})
    assert short == OptimizerConfig.model_validate({"plan": {"strategy": strategy}})
    assert short.plan == PlanConfig.model_validate(strategy)
    assert short.plan.strategy == strategy


def test_an_unknown_strategy_given_alone_is_refused_by_its_field() -> None:
    assert "plan.strategy" in refusal({"plan": "fastest"})


def test_what_a_bare_m3_would_ignore_is_no_field_of_its_configuration() -> None:
    trainers = {"clip": {"max_norm": 1.0}, "schedule": {"warmup": 0.2}, "groups": {}, "routes": []}
    OptimizerConfig.model_validate(trainers)
    for name, value in trainers.items():
        with pytest.raises(ValidationError, match=name):
            M3Config.model_validate({name: value})
    assert set(OptimizerConfig.model_fields) == set(M3Config.model_fields) | set(trainers)


def test_gram_matrices_may_be_used_as_long_as_fp32_allows() -> None:
    assert OptimizerConfig.model_validate({"newton_schulz": {"restart": LONGEST_SEGMENT}})


def test_groups_keep_their_own_defaults_whatever_is_given() -> None:
    assert GroupsConfig() == GroupsConfig.model_validate({})
    given_in_part = GroupsConfig.model_validate({"vectors": {"lr_scale": 2.0}})
    assert (given_in_part.vectors.weight_decay, given_in_part.vectors.lr_scale) == (0.0, 2.0)
    assert given_in_part.projections.algorithm == "m3"


def test_what_is_written_down_is_read_back() -> None:
    config = OptimizerConfig.model_validate(
        {
            "levels": levels(1, 4, 8),
            "buffers": "cascaded",
            "plan": {"strategy": "block_periodic", "block_period": 2},
            "groups": {"titan": {"beta1": 0.5, "period": 3}},
            "routes": [{"pattern": "*.gate", "group": "vectors"}],
        }
    )
    paper = OptimizerConfig.model_validate({"form": "paper", "paper_form": {"alpha": 0.5}})
    for one in (config, paper, OptimizerConfig(), OptimizerConfig(form="paper")):
        assert OptimizerConfig.model_validate(one.model_dump()) == one
        assert OptimizerConfig.model_validate(one.model_dump(mode="json")) == one
        assert OptimizerConfig.model_validate_json(one.model_dump_json(exclude_unset=True)) == one
