from __future__ import annotations

import shutil
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from hopescale.config import compose
from hopescale.config.compose import (
    configs_folder,
    load_config,
    to_tree,
    to_yaml,
    validate,
    with_overrides,
)
from hopescale.config.schema import Config
from hopescale.errors import ConfigError, Problem

GROUPS = {p.name: sorted(f.stem for f in p.glob("*.yaml")) for p in configs_folder().iterdir() if p.is_dir()}
FILES = [(group, option) for group, options in GROUPS.items() if group != "experiment" for option in options]


def problems(*overrides: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    assert caught.value.exit_code == 2
    assert all(len(str(problem).splitlines()) == 1 for problem in caught.value.problems)
    return list(caught.value.problems)


def problem(*overrides: str) -> Problem:
    (found,) = problems(*overrides)
    return found


@pytest.mark.parametrize("experiment", GROUPS["experiment"])
def test_every_experiment_composes_alone(experiment: str) -> None:
    assert isinstance(load_config([f"experiment={experiment}"]), Config)


@pytest.mark.parametrize(("group", "option"), FILES)
def test_every_file_of_every_group_composes(group: str, option: str) -> None:
    # Without jumps, which not every model can make.
    config = load_config(["experiment=demo", "objective.jump_weight=0", f"{group}={option}"])
    written = yaml.safe_load((configs_folder() / group / f"{option}.yaml").read_text())
    written.pop("defaults", None)
    # What the file sets and the experiment does not set again is what the configuration holds.
    again = yaml.safe_load((configs_folder() / "experiment" / "demo.yaml").read_text())
    section = to_tree(config)
    if group != "cluster":  # whose files set other sections too
        again, section = again.get(group, {}), section[group]
    assert {k: v for k, v in deep(written) if k not in dict(deep(again))}.items() <= dict(deep(section)).items()


def deep(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Leaves by dotted name; lists compare by their text, filled up with defaults where they hold sections."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from deep(value, f"{prefix}{key}.")
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from deep(value, f"{prefix}{number}.")
    else:
        yield prefix, str(tree)


def test_no_choice_at_all_is_a_valid_configuration() -> None:
    assert load_config([]).model.encoder_dim == 1024


def test_later_values_win_over_files() -> None:
    config = load_config(["model.width=64", "experiment=demo", "optimizer.lr=1e-4", "optimizer=adamw"])
    assert (config.model.width, config.optimizer.lr) == (64, 1e-4)
    assert config.optimizer.groups.cms.algorithm == "adamw"
    assert load_config(["optimizer.lr=1", "optimizer.lr=0.5"]).optimizer.lr == 0.5


def test_lists_and_sections_can_be_set_whole() -> None:
    config = load_config(
        ["model.cms.levels=[{period: 2, hidden_multiplier: 1.0}]", "model.grid=[4,6]", "train={steps: 7, seed: 3}"]
    )
    assert [level.period for level in config.model.cms.levels] == [2]
    assert config.model.num_patches == 24
    assert (config.train.steps, config.train.seed, config.train.global_batch) == (7, 3, 16)


@pytest.mark.parametrize(
    ("override", "field", "fix"),
    [
        ("model.widht=3", "model.widht", "did you mean model.width?"),
        ("model.memory.head=3", "model.memory.head", "did you mean model.memory.heads?"),
        ("modle.width=3", "modle", "did you mean model?"),
        ("optimiser.lr=1", "optimiser", "did you mean optimizer?"),
        ("steps=5", "steps", "did you mean train.steps?"),
        ("+model.widht=3", "model.widht", "did you mean model.width?"),
        ("model.cms.levels=[{perido: 3}]", "model.cms.levels.0.perido", "did you mean model.cms.levels.0.period?"),
        ("optimizer.levels=[{},{et: 0.5}]", "optimizer.levels.1.et", "did you mean optimizer.levels.1.eta?"),
        (
            "objective.curriculum=[{plateau: {patience: 10, earlyest: 3}, jump_weight: 0}]",
            "objective.curriculum.0.plateau.earlyest",
            "did you mean objective.curriculum.0.plateau.earliest?",
        ),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_name(override: str, field: str, fix: str) -> None:
    found = problem(override)
    assert (found.field, found.fix) == (field, fix)
    assert "not a field" in found.rule


@pytest.mark.parametrize(("override", "known"), [("model.memory.zzz=1", "heads"), ("zzz=1", "optimizer")])
def test_an_unknown_key_like_no_other_is_answered_with_all_names(override: str, known: str) -> None:
    assert "use one of" in problem(override).fix
    assert known in problem(override).fix


@pytest.mark.parametrize(
    ("override", "field", "words"),
    [
        ("model.width=abc", "model.width", "integer"),
        ("model.width=384.0", "model.width", "integer"),
        ("model.width='384'", "model.width", "integer"),
        ("model.width=[1,2]", "model.width", "integer"),
        ("model.width=null", "model.width", "integer"),
        ("train.eval_every=true", "train.eval_every", "integer"),
        ("model.spatial_mixing=1", "model.spatial_mixing", "boolean"),
        ("optimizer.lr=fast", "optimizer.lr", "number"),
        ("run.name=5", "run.name", "string"),
        ("model.block_pattern=SHS", "model.block_pattern", "tuple"),
        ("model.grid=[8]", "model.grid.1", "required"),
        ("train=5", "train", "dictionary"),
        ("model.memory=null", "model.memory", "dictionary"),
        ("train.steps.first=3", "train.steps", "integer"),
        ("model.block_pattern=[S,Q]", "model.block_pattern.1", "'S', 'T'"),
        ("parallel.precision=fp8", "parallel.precision", "'fp32' or 'bf16'"),
        ("model.memory.meta_grad=second", "model.memory.meta_grad", "'fo', 'fo_kv'"),
        ("model.width=-4", "model.width", "greater than 0"),
        ("train.steps=0", "train.steps", "greater than 0"),
        ("train.global_batch=-1", "train.global_batch", "greater than 0"),
        ("train.seed=-1", "train.seed", "greater than or equal to 0"),
        ("train.seed=9223372036854775808", "train.seed", "less than"),
        ("model.frames=1", "model.frames", "greater than or equal to 2"),
        ("model.drop_path=1.0", "model.drop_path", "less than 1"),
        ("model.block_pattern=[]", "model.block_pattern", "at least 1"),
        ("optimizer.lr=-1.0", "optimizer.lr", "greater than 0"),
        ("optimizer.lr=nan", "optimizer.lr", "finite|greater than 0"),
        ("optimizer.lr=inf", "optimizer.lr", "finite"),
        ("optimizer.clip.max_norm=0.0", "optimizer.clip.max_norm", "greater than 0"),
        ("checkpoint.keep=1", "checkpoint.keep", "greater than or equal to 2"),
        ("run.name=a/b", "run.name", "pattern"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(override: str, field: str, words: str) -> None:
    found = problem(override)
    assert found.field == field
    assert any(word in found.rule for word in words.split("|"))
    assert field in found.fix


@pytest.mark.parametrize(
    ("overrides", "field", "words"),
    [
        (["model.memory.heads=5"], "model.memory.heads", "must divide width=384"),
        (["model.memory.hidden_multiplier=0.0001"], "model.memory.hidden_multiplier", "must be whole"),
        (["model.attention.heads=7"], "model.attention.heads", "must divide width=384"),
        (["model.attention.heads=128"], "model.attention.heads", "even number"),
        (["model.attention.mlp_multiplier=0.001"], "model.attention.mlp_multiplier", "must be whole"),
        (
            ["model.width=100", "model.attention.heads=2", "model.cms.levels=[{hidden_multiplier: 0.333}]"],
            "model.cms.levels.0.hidden_multiplier",
            "must be whole",
        ),
        (["model.memory.self_modify=[main,main]"], "model.memory.self_modify", "at most once"),
        (["model.frames=4", "model.memory.chunk_size=4"], "model.memory.chunk_size", "3 frames a clip of frames=4"),
        (["model.width=2", "model.block_pattern=[H]", "model.patch_position=sincos"], "model.patch_position", "width"),
        (["model.temporal_embeddings=false"], "objective.jump_weight", "needs model.temporal_embeddings"),
        (
            [
                "model.temporal_embeddings=false",
                "objective.teacher_weight=0",
                "objective.jump_weight=0",
                "objective.rollout.weight=1",
                "objective.curriculum=[{start: 5, jump_weight: 0.5}]",
            ],
            "objective.jump_weight",
            "needs model.temporal_embeddings",
        ),
        (
            [
                "model.temporal_embeddings=false",
                "objective.jump_weight=0",
                "run.early_stop={metric: skill_jump, patience: 2}",
                "train.eval_every=5",
            ],
            "run.early_stop.metric",
            "needs model.temporal_embeddings",
        ),
        (["model.frames=3"], "objective.jump_horizons", "only 2 frames to jump to"),
        (["model.frames=3", "objective.jump_context=3"], "objective.jump_context", "none to jump to"),
        (
            ["objective.rollout={weight: 1.0, context: 6, steps: 3}"],
            "objective.rollout.steps",
            "past the 8 frames of model.frames",
        ),
        (["objective.teacher_weight=0", "objective.jump_weight=0"], "objective.teacher_weight", "all 0"),
        (["objective.rollout.steps=3"], "objective.rollout.steps", "ignored"),
        (
            ["metrics.every=10", "objective.curriculum=[{plateau: {patience: 15}, jump_weight: 0}]"],
            "objective.curriculum.0.plateau.patience",
            "multiple of metrics.every=10",
        ),
        (
            ["model.block_pattern=[S,T]", "objective.curriculum=[{plateau: {patience: 10}, jump_weight: 0}]"],
            "model.block_pattern",
            "writes no memory",
        ),
        (
            ["model.memory.self_modify=[]", "objective.curriculum=[{plateau: {patience: 10}, jump_weight: 0}]"],
            "model.block_pattern",
            "writes no memory",
        ),
        (["optimizer.schedule.warmup=0.6", "optimizer.schedule.decay=0.6"], "optimizer.schedule.warmup", "at most 1"),
        (["optimizer.levels=[{period: 2}]"], "optimizer.levels.0.period", "must be 1"),
        (["optimizer.groups.vectors.algorithm=m3"], "optimizer.groups.vectors.algorithm", "must be adamw"),
        (["run.early_stop.patience=2"], "run.early_stop.patience", "train.eval_every=0"),
        (["train.micro_batch=17"], "train.micro_batch", "train.global_batch=16"),
        (
            ["model.cms.mode=param_period", "optimizer.groups.cms.period=8"],
            "optimizer.groups.cms.period",
            "ignored with model.cms.mode=param_period",
        ),
        (
            ["model.cms.mode=param_period", f"model.cms.levels=[{','.join(f'{{period: {n}}}' for n in range(1, 11))}]"],
            "model.cms.levels",
            "at most 8 different periods",
        ),
        (["metrics.token_file=x", "metrics.listen=off"], "metrics.token_file", "ignored"),
        (["metrics.discovery=x", "metrics.listen=off"], "metrics.discovery", "has nothing to name"),
        (["metrics.textfile=x"], "metrics.textfile", "would have every number read twice"),
        (["cluster.mounts=['/a:/b']"], "cluster.mounts", "ignored without cluster.container"),
        (["cluster.container_runtime=podman"], "cluster.container_runtime", "ignored without cluster.container"),
        (["cluster.partition='a b'"], "cluster.partition", "should match pattern"),
        (["optimizer.groups.embeddings.algorithm=m3"], "optimizer.groups.embeddings.algorithm", "must be adamw"),
        (["optimizer.plan=block_periodic"], "optimizer.plan.block_period", "is missing: strategy=block_periodic needs"),
        (["optimizer.plan.block_period=5"], "optimizer.plan.block_period", "the strategy is auto"),
        (["optimizer.plan.gram_wire=bf16", "optimizer.plan=owner"], "optimizer.plan.gram_wire", "plan.strategy=owner"),
        (["optimizer.plan=fastest"], "optimizer.plan.strategy", "'auto'"),
        (["optimizer.levels.1.eta=0.5"], "optimizer.levels.1.eta", "its list does not have"),
        (["optimizer.levels.first.eta=0.5"], "optimizer.levels.first.eta", "its list does not have"),
        (["optimizer.levels=[{period: 0}]"], "optimizer.levels.0.period", "greater than 0"),
    ],
)
def test_fields_that_do_not_fit_together_are_named(overrides: list[str], field: str, words: str) -> None:
    found = problem(*overrides)
    assert found.field == field
    assert words in found.rule


@pytest.mark.parametrize("fields", [["bucket_mib=3"], ["bucket_mib=3", "latency=0.5"], []])
def test_a_word_for_the_plan_leaves_its_other_fields_alone_whatever_the_order(fields: list[str]) -> None:
    others = [f"optimizer.plan.{field}" for field in fields]
    expected = load_config(["optimizer.plan.strategy=owner", *others])
    assert expected.optimizer.plan.strategy == "owner"
    for orders in (["optimizer.plan=owner", *others], [*others, "optimizer.plan=owner"]):
        assert load_config(orders) == with_overrides(load_config([]), orders) == expected
    assert load_config(["optimizer.plan=gather", *others, "optimizer.plan=owner"]) == expected


def test_a_word_for_the_plan_and_what_it_needs_may_come_in_any_order() -> None:
    for orders in (("=block_periodic", ".block_period=5"), (".block_period=5", "=block_periodic")):
        plan = load_config([f"optimizer.plan{order}" for order in orders]).optimizer.plan
        assert (plan.strategy, plan.block_period) == ("block_periodic", 5)


def test_a_file_may_not_use_a_short_form(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    shutil.copytree(configs_folder(), folder)
    (folder / "optimizer" / "mine.yaml").write_text("plan: owner\n")
    monkeypatch.setattr(compose, "configs_folder", lambda: folder)
    found = problem("optimizer=mine", "optimizer.plan.bucket_mib=3")
    assert (found.field, found.value, found.fix) == ("optimizer.plan", "owner", "write {strategy: owner}")


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("optimizer.lr=-1.0", "set optimizer.lr to a number above 0"),
        ("optimizer.levels=[{eta: 1.5}]", "set optimizer.levels.0.eta to a number below 1"),
        ("parallel.precision=fp16", "set parallel.precision to 'fp32' or 'bf16'"),
        ("train.steps=abc", "set train.steps to a whole number"),
        ("optimizer.clip=global", "set its fields, like optimizer.clip.mode"),
        ("optimizer.levels[0].eta=0.5", "write optimizer.levels.0.eta=..."),
    ],
)
def test_a_fix_says_what_would_fit(override: str, fix: str) -> None:
    assert problem(override).fix == fix


def test_a_rule_between_fields_shows_the_fields_it_names() -> None:
    found = problem("model.memory.retention=false", "model.memory.retention_bias=3.0")
    assert (found.field, found.value) == ("model.memory", {"retention": False, "retention_bias": 3.0})


def test_attention_heads_do_not_matter_without_attention() -> None:
    assert load_config(["model.block_pattern=[H]", "model.attention.heads=7"]).model.attention.heads == 7


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("experiment=dmo", "did you mean demo?"),
        ("optimizer=adam", "did you mean adamw?"),
        ("optimizer=zzz", "choose one of adamw, m3"),
        ("model={width: 5}", "choose one of"),
        ("model=null", "choose one of"),
    ],
)
def test_an_unknown_file_is_answered_with_the_nearest_one(override: str, fix: str) -> None:
    found = problem(override)
    assert found.field == override.split("=")[0]
    assert fix in found.fix
    assert "must be one of" in found.rule


@pytest.mark.parametrize("override", ["experiment", "a b", "~model", "model.width=1,2", "model.grid[0]=3", "x=[1", ""])
def test_an_override_that_cannot_be_parsed_is_quoted(override: str) -> None:
    found = problem(override)
    assert (found.field, found.value) == ("override", override)
    assert "key=value" in found.rule


@pytest.mark.parametrize("override", ["run.name=${nothing}", "train.steps=${oc.env:HOPESCALE_NOT_SET}"])
def test_an_interpolation_that_leads_nowhere_is_a_mistake_of_the_user(override: str) -> None:
    assert problem(override).field in ("override", override.split("=")[0])


def test_all_mistakes_of_a_kind_are_reported_at_once() -> None:
    found = problems("train.steps=0", "model.widht=5", "run.name=a/b", "zzz=1", "optimizer.schedule.warmup=2.0")
    fields = {"train.steps", "model.widht", "run.name", "zzz", "optimizer.schedule.warmup"}
    assert {p.field for p in found} == fields
    assert len(problems("x=[1", "~model")) == 2
    assert len(problems("model=x", "optimizer=y")) == 2


def test_mistakes_of_different_kinds_are_reported_at_once() -> None:
    found = problems("x=[1", "experiment=dmo", "model.widht=5")
    assert {p.field for p in found} == {"override", "experiment", "model.widht"}


@pytest.mark.parametrize("overrides", [[], ["experiment=demo", "optimizer=adamw", "data.view=[a,b]", "run.dir=x/y"]])
def test_a_configuration_survives_yaml(overrides: list[str]) -> None:
    config = load_config(overrides)
    assert validate(yaml.safe_load(to_yaml(config))) == config


def test_a_finished_configuration_takes_new_values_but_no_files() -> None:
    config = load_config(["experiment=demo", "train.steps=8"])
    changed = with_overrides(config, ["train.steps=9", "model.memory.heads=2"])
    assert (changed.train.steps, changed.model.memory.heads, changed.run.name) == (9, 2, "demo")
    assert config.train.steps == 8
    for bad, field in (("optimizer=adamw", "optimizer"), ("train.stepz=9", "train.stepz"), ("train.steps", "override")):
        with pytest.raises(ConfigError) as caught:
            with_overrides(config, [bad])
        assert [p.field for p in caught.value.problems] == [field]


def test_a_configuration_cannot_be_changed() -> None:
    config = load_config([])
    for section, field in ((config, "train"), (config.train, "steps"), (config.model.memory, "heads")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, field, 5)


def sections(model: type[BaseModel], seen: set[type[BaseModel]] | None = None) -> Iterator[type[BaseModel]]:
    """The model and every section below it, those in lists too."""
    seen = set() if seen is None else seen
    if model in seen:
        return
    seen.add(model)
    yield model
    for info in model.model_fields.values():
        for kind in (info.annotation, *typing.get_args(info.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from sections(kind, seen)


SECTIONS = list(sections(Config))


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_section_and_field_says_in_a_sentence_what_it_is(section: type[BaseModel]) -> None:
    assert section.__doc__
    for name, info in section.model_fields.items():
        nested = isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
        if not nested:
            assert info.description, f"{section.__name__}.{name} has no docstring"
            assert info.description.endswith("."), f"{section.__name__}.{name}"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_section_is_frozen_strict_and_closed(section: type[BaseModel]) -> None:
    settings = section.model_config
    assert (settings.get("frozen"), settings.get("strict"), settings.get("extra")) == (True, True, "forbid")
