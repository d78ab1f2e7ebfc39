from __future__ import annotations

import pytest
import yaml

from hopescale.config.compose import load_config, to_yaml, validate
from hopescale.errors import ConfigError, Problem


def problems(*overrides: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    return list(caught.value.problems)


def test_the_earlier_predictor_is_one_pick() -> None:
    model = load_config(["model=ac_hope"]).model
    assert (model.compat, len(model.block_pattern), model.num_tokens) == ("ac_hope", 5, 258)
    assert model.shares_memory_over_batch


@pytest.mark.parametrize(
    ("override", "field", "words"),
    [
        ("model.block_pattern=[H,S]", "model.block_pattern", "H blocks alone"),
        ("model.cms.levels=[]", "model.cms.levels", "at least one level"),
        ("model.output=residual", "model.output", "whole frames"),
        ("model.memory.scope=clip", "model.memory.scope", "among the clips of a batch"),
        ("model.memory.detach_rule=keep_start", "model.memory.detach_rule", "whole path"),
        ("model.state_dim=3", "model.state_dim", "action_dim=2"),
        ("model.ac_hope.rope_heads=7", "model.ac_hope.rope_heads", "must divide width=384"),
        ("model.ac_hope.rope_heads=128", "model.ac_hope.rope_heads", "6 features a head"),
        ("model.ac_hope.clip_inner=-1", "model.ac_hope.clip_inner", "greater than or equal to 0"),
    ],
)
def test_what_the_earlier_predictor_cannot_be_is_named(override: str, field: str, words: str) -> None:
    (found,) = problems("model=ac_hope", override)
    assert found.field == field
    assert words in found.rule


@pytest.mark.parametrize(
    "override",
    [
        "model.memory.heads=2",
        "model.memory.eta_max=60.0",
        "model.memory.retention_bias=0.0",
        "model.memory.write_limit=0.3",
        "model.memory.meta_grad=so",
        "model.memory.self_modify=[main]",
        "model.memory.chunk_rule=scan",
        "model.memory.surprise_gate=0.5",
        "model.cms.mode=param_period",
        "model.attention.heads=8",
        "model.patch_position=sincos",
        "model.extrinsics_dim=1",
    ],
)
def test_a_field_the_earlier_predictor_ignores_is_an_error(override: str) -> None:
    (found,) = problems("model=ac_hope", override)
    assert override.startswith(found.field)
    assert found.rule == "is ignored with compat=ac_hope"


def test_its_own_section_is_an_error_elsewhere() -> None:
    (found,) = problems("model.ac_hope.rope_heads=16")
    assert (found.field, found.rule) == ("model.ac_hope.rope_heads", "is ignored with compat=none")


def test_everything_that_does_not_fit_is_named_at_once() -> None:
    found = {p.field for p in problems("model=base", "model.compat=ac_hope", "model.memory.heads=2")}
    assert found == {"model.block_pattern", "model.output", "model.memory.scope", "model.memory.heads"}


def test_a_jump_needs_embeddings_or_rotary_positions() -> None:
    blind = ["model=ac_hope", "model.temporal_embeddings=false"]
    (found,) = problems(*blind)
    assert found.field == "objective.jump_weight"
    assert load_config([*blind, "model.ac_hope.rope_heads=16"]).model.can_jump
    assert not load_config([*blind, "objective.jump_weight=0"]).model.can_jump


def test_the_configuration_survives_yaml() -> None:
    config = load_config(["model=ac_hope", "model.ac_hope.clip_backward=0.5"])
    assert validate(yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize("pick", [["model=ac_hope"], ["model.memory.scope=batch"]])
def test_a_batch_that_shares_memories_is_not_accumulated(pick: list[str]) -> None:
    (found,) = problems(*pick, "train.micro_batch=4")
    assert found.field == "train.micro_batch"
    assert "share memories" in found.rule
    assert load_config([*pick, "train.micro_batch=16"]).train.micro_batch == 16
    assert load_config(["train.micro_batch=4"]).train.micro_batch == 4
