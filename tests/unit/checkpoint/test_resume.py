from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from hopescale.checkpoint.manifest import describe, write_manifest
from hopescale.checkpoint.resume import check_same_curve, newest_valid
from hopescale.checkpoint.staging import step_folder
from hopescale.config.compose import to_tree
from hopescale.config.schema import Config
from hopescale.errors import CheckpointError, ConfigError


def commit(root: Path, step: int) -> Path:
    folder = step_folder(root, step)
    folder.mkdir(parents=True)
    (folder / "rank-00000.bin").write_bytes(b"weights")
    write_manifest(folder, {"rank-00000.bin": describe(folder / "rank-00000.bin")}, {})
    return folder


def damage(folder: Path) -> None:
    (folder / "rank-00000.bin").write_bytes(b"WEIGHTS")


def test_without_checkpoints_a_run_starts_at_the_beginning(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "checkpoints") is None
    (tmp_path / "step-000000005.0badc0de.part").mkdir()
    assert newest_valid(tmp_path) is None


def test_the_newest_is_taken_by_number(tmp_path: Path) -> None:
    for step in (9, 1_000_000_000, 10):
        commit(tmp_path, step)
    assert newest_valid(tmp_path) == step_folder(tmp_path, 1_000_000_000)


def test_damaged_ones_are_set_aside_and_older_ones_kept(tmp_path: Path) -> None:
    folders = [commit(tmp_path, step) for step in (1, 2, 3, 4)]
    damage(folders[3])
    (folders[2] / "MANIFEST.json").unlink()
    assert newest_valid(tmp_path) == folders[1]
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["step-000000001", "step-000000002", "step-000000003.damaged", "step-000000004.damaged"]
    assert newest_valid(tmp_path) == folders[1]


def test_a_manifest_without_files_is_damage(tmp_path: Path) -> None:
    good, bad = commit(tmp_path, 1), commit(tmp_path, 2)
    (bad / "MANIFEST.json").write_text('{"format": 1}')
    assert newest_valid(tmp_path) == good


def test_a_step_can_be_damaged_a_second_time(tmp_path: Path) -> None:
    good = commit(tmp_path, 1)
    for _ in range(2):
        damage(commit(tmp_path, 2))
        assert newest_valid(tmp_path) == good


def test_no_whole_checkpoint_is_an_error_that_names_them_all(tmp_path: Path) -> None:
    for step in (1, 2):
        damage(commit(tmp_path, step))
    with pytest.raises(CheckpointError) as caught:
        newest_valid(tmp_path)
    assert caught.value.exit_code == 71
    assert [Path(str(problem.value)).name for problem in caught.value.problems] == ["step-000000002", "step-000000001"]


def test_a_second_attempt_does_not_silently_start_from_scratch(tmp_path: Path) -> None:
    damage(commit(tmp_path, 1))
    for _ in range(2):
        with pytest.raises(CheckpointError):
            newest_valid(tmp_path)


def changed(path: str, value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(to_tree(Config()))
    *sections, field = path.split(".")
    section = tree
    for name in sections:
        section = section[name]
    section[field] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("run.name", "other"),
        ("train.steps", 5),
        ("train.micro_batch", 3),
        ("train.stop_after", 4),
        ("parallel.recompute", "none"),
        ("checkpoint.every", 7),
        ("data.path", "elsewhere"),
        ("optimizer.plan.strategy", "gather"),
        ("optimizer.plan.bucket_mib", 3.0),
    ],
)
def test_what_does_not_shape_the_curve_may_change(path: str, value: Any) -> None:
    check_same_curve(to_tree(Config()), changed(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("train.seed", 5),
        ("train.global_batch", 5),
        ("model.memory.heads", 2),
        ("model.block_pattern", ["H"]),
        ("optimizer.lr", 1.0),
        ("optimizer.plan.strategy", "block_periodic"),
        ("optimizer.plan.gram_wire", "bf16"),
        ("optimizer.groups.titan.lr_scale", 0.5),
        ("objective.loss", "l2"),
        ("data.view", ["base"]),
    ],
)
def test_what_shapes_the_curve_must_not(path: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        check_same_curve(to_tree(Config()), changed(path, value))
    (problem,) = caught.value.problems
    assert (problem.field, problem.value) == (path, value)


def test_log_steps_shape_the_curve_where_a_plateau_is_waited_for() -> None:
    check_same_curve(to_tree(Config()), changed("metrics.every", 7))
    phase = {"start": None, "plateau": {"patience": 70}, "jump_weight": 0.0}
    saved, current = changed("objective.curriculum", [phase]), changed("metrics.every", 7)
    current["objective"] = saved["objective"]
    with pytest.raises(ConfigError) as caught:
        check_same_curve(saved, current)
    assert [problem.field for problem in caught.value.problems] == ["metrics.every"]


def test_all_differences_are_named_at_once() -> None:
    other = changed("train.seed", 5)
    other["model"]["width"] = 64
    with pytest.raises(ConfigError) as caught:
        check_same_curve(to_tree(Config()), other)
    assert [problem.field for problem in caught.value.problems] == ["model.width", "train.seed"]
    assert "trained with 384" in str(caught.value)


def test_a_field_that_only_one_side_has_is_a_difference() -> None:
    tree = to_tree(Config())
    more = copy.deepcopy(tree)
    more["model"]["novelty"] = 1
    for saved, current, words in ((tree, more, "no such field"), (more, tree, "trained with 1")):
        with pytest.raises(ConfigError, match=words):
            check_same_curve(saved, current)
