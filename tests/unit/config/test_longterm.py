"""Long-term memories and U blocks are refused where they cannot work, and where a setting would be ignored."""

from __future__ import annotations

import pytest

from hopescale.config.compose import load_config
from hopescale.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "field", "words"),
    [
        (["model.block_pattern=[S,T]"], "model.block_pattern", "no block with memories"),
        (["model.memory.scope=batch"], "model.memory.scope", "no clip a memory of its own"),
        (["model.memory.self_modify=[]"], "model.memory.self_modify", "leaves out main"),
        (["model.longterm.hidden_multiplier=0.001"], "model.longterm.hidden_multiplier", "must be whole"),
        (
            ["model.longterm.retention_floor=0.9", "model.memory.retention=false"],
            "model.longterm.retention_floor",
            "is ignored",
        ),
        (["model.longterm.ema=0.0"], "model.longterm.ema", "greater than 0"),
        (["model.longterm.sync_every=0"], "model.longterm.sync_every", "greater than 0"),
        (["model.longterm.gate=both"], "model.longterm.gate", "'input' or 'retrieval'"),
        (["model.longterm.emma=0.1"], "model.longterm.emma", "ema"),
        (["objective.teacher_weight=0.0"], "model.longterm", "the teacher branch"),
        (["model.compat=ac_hope"], "model.longterm", "is ignored with compat=ac_hope"),
    ],
)
def test_long_term_memories_are_refused_where_they_cannot_work(overrides: list[str], field: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(["model.longterm={hidden_multiplier: 2.0}", *overrides])
    problems = [problem for problem in refused.value.problems if problem.field == field]
    assert problems
    assert words in str(problems[0])


def test_a_resolved_configuration_can_be_read_again() -> None:
    config = load_config(["model.longterm={}", "model.memory.retention=false"])
    assert type(config).model_validate(config.model_dump()) == config


def test_a_teacher_branch_that_begins_later_is_enough() -> None:
    phases = "objective.curriculum=[{start: 5, teacher_weight: 1.0}]"
    config = load_config(["model.longterm={}", "objective.teacher_weight=0.0", phases])
    assert config.model.longterm is not None


@pytest.mark.parametrize(
    ("overrides", "field", "words"),
    [
        (["model.memory.chunk_rule=token_exact"], "model.memory.chunk_rule", "one a feature"),
        (["model.memory.self_modify=[key,main]"], "model.memory.self_modify", "whose only one is main"),
        (["model.attention.heads=7"], "model.attention.heads", "must divide"),
    ],
)
def test_u_blocks_are_refused_what_they_do_not_have(overrides: list[str], field: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(["model.block_pattern=[U]", *overrides])
    assert [p.field for p in refused.value.problems] == [field]
    assert words in str(refused.value.problems[0])


def test_beside_h_blocks_the_memories_that_u_blocks_lack_can_be_named() -> None:
    config = load_config(["model.block_pattern=[U,H]", "model.memory.self_modify=[key,main]"])
    assert config.model.memory.self_modify == ("key", "main")
    assert load_config(["model.block_pattern=[U]", "model.memory.self_modify=[main]"]).model.longterm is None
