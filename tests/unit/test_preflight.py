"""What training needs beyond its configuration is checked before any rank starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.shard import shard
from hopescale.config.compose import load_config
from hopescale.errors import UserError
from hopescale.parallel.process_group import Launch
from hopescale.preflight import preflight
from tests.feature_folders import write_features


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    shard(write_features(root / "features", states=True), root / "shards")
    return root / "shards"


def check(data: Path, tmp_path: Path, world_size: int, *overrides: str) -> None:
    settings = [
        f"data.path={data}",
        f"run.root={tmp_path}",
        "model.encoder_dim=16",
        "model.grid=[2,3]",
        "model.frames=5",
        "metrics.port=0",
        "metrics.tensorboard=false",
        "train.global_batch=4",
    ]
    readers = preflight(load_config([*settings, *overrides]), Launch(rank=world_size - 1, world_size=world_size))
    for reader in readers:
        reader.close()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_memories_of_clips_of_their_own_train_on_any_number_of_ranks(
    data: Path, tmp_path: Path, world_size: int
) -> None:
    check(data, tmp_path, world_size)


def test_a_memory_shared_by_the_batch_trains_on_one_rank_alone(data: Path, tmp_path: Path) -> None:
    check(data, tmp_path, 1, "model.memory.scope=batch")
    with pytest.raises(UserError) as caught:
        check(data, tmp_path, 2, "model.memory.scope=batch")
    (problem,) = caught.value.problems
    assert problem.field == "model.memory.scope"
    assert "2 ranks" in problem.rule
    assert "scope=clip" in problem.fix


@pytest.mark.parametrize(("states", "given"), [(2, "3 numbers a state"), (4, "3 numbers a state")])
def test_states_of_another_width_are_named(data: Path, tmp_path: Path, states: int, given: str) -> None:
    check(data, tmp_path, 1, "model.state_dim=3")
    check(data, tmp_path, 1, "model.state_dim=0")
    with pytest.raises(UserError) as caught:
        check(data, tmp_path, 1, f"model.state_dim={states}")
    (problem,) = {str(problem) for problem in caught.value.problems}
    assert f"model.state_dim={states}" in problem
    assert given in problem


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["model.memory.chunk_size=4"], "model.memory.chunk_size"),
        (["model.memory.detach_interval=2"], "model.memory.detach_interval"),
        (["model.memory.chunk_size=2", "objective.auxiliary_weight=0.1"], "objective.auxiliary_weight"),
    ],
    ids=["chunk", "cut", "auxiliary loss"],
)
def test_clips_shorter_than_the_model_allows_must_be_long_enough_for_its_memories(
    data: Path, tmp_path: Path, overrides: list[str], field: str
) -> None:
    alone = ["objective.jump_horizons=2", "data.frames=3"]
    check(data, tmp_path, 1, *alone)
    load_config(["model.frames=5", "objective.jump_horizons=2", *overrides])
    with pytest.raises(UserError) as caught:
        check(data, tmp_path, 1, *alone, *overrides)
    assert {problem.field for problem in caught.value.problems} == {field}


def test_routes_that_do_not_suit_the_model_are_told_with_everything_else(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        check(data, tmp_path, 2, "optimizer.routes=[{pattern: 'nothing*', group: titan}]", "model.memory.scope=batch")
    assert {problem.field for problem in caught.value.problems} == {"optimizer.routes", "model.memory.scope"}
