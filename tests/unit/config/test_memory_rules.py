"""Settings of memories that contradict each other, change nothing, or do not fit the rest are refused by name."""

from __future__ import annotations

import pytest

from hopescale.config.compose import load_config
from hopescale.errors import ConfigError

REFUSED = [
    (["retention=false", "retention_bias=3.0"], ["retention_bias", "retention=false"]),
    (["detach_rule=all"], ["detach_rule", "detach_interval=0"]),
    (["meta_grad=straight_through", "detach_interval=2"], ["detach_interval", "straight_through"]),
    (["self_modify=[]", "chunk_rule=token_exact"], ["chunk_rule", "self_modify=[]"]),
    (["self_modify=[]", "meta_grad=so"], ["meta_grad", "self_modify=[]"]),
    (["self_modify=[]", "momentum=0.5", "surprise_gate=0.1"], ["momentum, surprise_gate", "self_modify=[]"]),
    (["self_modify=[]", "preconditioner=false"], ["preconditioner", "self_modify=[]"]),
    (["self_modify=[key]"], ["self_modify", "main"]),
    (["self_modify=[main,main]"], ["self_modify", "at most once"]),
    (["self_modify=[main,query]"], ["self_modify.1=query", "'key', 'value', 'eta', 'alpha' or 'main'"]),
    (["chunk_rule=scan", "self_modify=[key,main]"], ["chunk_rule=scan", "self_modify=[main]"]),
    (["chunk_rule=loop"], ["chunk_rule=loop", "'frame_step', 'token_exact' or 'scan'"]),
    (["meta_grad=none"], ["meta_grad=none", "'fo', 'fo_kv', 'so' or 'straight_through'"]),
    (["detach_rule=some", "detach_interval=1"], ["detach_rule=some", "'keep_start' or 'all'"]),
    (["scope=rank"], ["scope=rank", "'clip' or 'batch'"]),
    (["surprise_gate=2.0"], ["surprise_gate=2.0", "less than 2"]),
    (["momentum=1.0"], ["momentum=1.0", "less than 1"]),
    (["momentum=-0.1"], ["momentum=-0.1", "greater than or equal to 0"]),
    (["write_limit=0.0"], ["write_limit=0.0", "greater than 0"]),
    (["eta_max=0.0"], ["eta_max=0.0", "greater than 0"]),
    (["eta_max=nan"], ["eta_max=nan", "finite"]),
    (["retention_bias=inf"], ["retention_bias=inf", "finite"]),
    (["chunk_size=0"], ["chunk_size=0", "greater than 0"]),
    (["chunk_size=8"], ["chunk_size=8", "7 frames"]),
    (["detach_interval=-1"], ["detach_interval=-1", "greater than or equal to 0"]),
    (["detach_interval=1.5"], ["detach_interval=1.5", "integer"]),
    (["heads=0"], ["heads=0", "greater than 0"]),
    (["heads=5"], ["heads=5", "must divide width=384"]),
    (["heads=3", "hidden_multiplier=0.001"], ["hidden_multiplier=0.001", "whole"]),
]


def told(overrides: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    (problem,) = caught.value.problems
    return str(problem)


@pytest.mark.parametrize(("fields", "words"), REFUSED, ids=lambda value: " ".join(value))
def test_memory_settings_that_cannot_be_are_refused(fields: list[str], words: list[str]) -> None:
    text = told([f"model.memory.{field}" for field in fields])
    assert text.startswith("model.memory")
    assert "Fix: " in text
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize(
    "fields",
    [
        ["retention=false"],
        ["detach_interval=2", "detach_rule=all"],
        ["self_modify=[]"],
        ["self_modify=[value,main]", "momentum=0.5"],
        ["chunk_rule=scan", "self_modify=[main]"],
        ["chunk_rule=scan", "detach_interval=1", "surprise_gate=0.1"],
        ["scope=batch"],
    ],
    ids=" ".join,
)
def test_settings_that_go_together_are_accepted(fields: list[str]) -> None:
    load_config([f"model.memory.{field}" for field in fields])


ROLLOUT = ["objective.rollout.weight=1", "objective.rollout.context=1", "objective.rollout.steps=7"]


@pytest.mark.parametrize(
    ("overrides", "longest"),
    [
        ([], 5),
        (["model.memory.detach_rule=all"], 6),
        (["model.memory.chunk_size=2", "model.memory.detach_rule=all"], 3),
        # What is fed back is read and written frame by frame, whatever the chunks of true frames are.
        (["model.memory.chunk_size=4", *ROLLOUT], 5),
        (["model.memory.chunk_size=4", "model.memory.detach_rule=all", *ROLLOUT], 6),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_cut_that_no_pass_is_long_enough_for_is_refused(overrides: list[str], longest: int) -> None:
    load_config(["model.frames=8", *overrides, f"model.memory.detach_interval={longest}"])
    text = told(["model.frames=8", *overrides, f"model.memory.detach_interval={longest + 1}"])
    assert text.startswith(f"model.memory.detach_interval={longest + 1}: never cuts anything")
    assert "over 8 frames of model.frames" in text


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["model.block_pattern=[S,T]"], "model.block_pattern=S-T has no block with a memory"),
        (["model.memory.chunk_rule=scan"], "model.memory.chunk_rule=scan computes all chunks at once"),
        (["model.memory.self_modify=[]"], "model.memory.self_modify=[] writes no chunk"),
    ],
    ids=["no memory", "scan", "no writes"],
)
def test_chunks_that_do_not_run_again_are_not_asked_to(overrides: list[str], reason: str) -> None:
    text = told([*overrides, "parallel.recompute=chunk"])
    assert text.startswith("parallel.recompute=chunk: would recompute nothing")
    assert reason in text
    for other in ("none", "block"):
        load_config([*overrides, f"parallel.recompute={other}"])


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["model.block_pattern=[S,T]"], "model.block_pattern=S-T"),
        (["model.memory.self_modify=[]"], "model.memory.self_modify=[]"),
        (["model.memory.chunk_size=7", "model.frames=8"], "model.memory.chunk_size=7 and the 7 transitions of"),
    ],
    ids=["no memory", "no writes", "one chunk"],
)
def test_keys_and_values_that_nothing_writes_are_not_taught(overrides: list[str], reason: str) -> None:
    text = told([*overrides, "objective.auxiliary_weight=0.1"])
    assert text.startswith(f"objective.auxiliary_weight=0.1: is ignored with {reason}")
    load_config([*overrides, "objective.auxiliary_weight=0.0"])


@pytest.mark.parametrize("model", ["model.block_pattern=[H]", "model.block_pattern=[S,U,S]", "model=ac_hope"])
def test_chunks_of_any_memory_can_run_again(model: str) -> None:
    assert load_config([model, "parallel.recompute=chunk"]).parallel.recompute == "chunk"


def test_a_batch_that_shares_memories_stays_in_one_piece() -> None:
    text = told(["model.memory.scope=batch", "train.global_batch=8", "train.micro_batch=4"])
    assert text.startswith("train.micro_batch=4")
    assert "model.memory.scope=batch" in text
    assert load_config(["model.memory.scope=batch", "train.global_batch=8", "train.micro_batch=8"])
