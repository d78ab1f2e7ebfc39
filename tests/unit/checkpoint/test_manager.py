from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hopescale.checkpoint.contents import RunState, optimizer_steps, tensors
from hopescale.checkpoint.manager import CheckpointManager
from hopescale.checkpoint.manifest import verify, write_manifest
from hopescale.checkpoint.staging import committed, step_folder
from hopescale.errors import EXIT_SUPERSEDED, CheckpointError, UserError
from hopescale.optim.m3 import M3
from hopescale.optim.schema import OptimizerConfig

pytestmark = pytest.mark.usefixtures("one_rank")

Trained = Callable[[int], tuple[nn.Module, M3]]


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_a_checkpoint_restores_everything(tmp_path: Path, trained: Trained) -> None:
    manager = CheckpointManager(tmp_path / "checkpoints", keep=2, config={"train": {"seed": 1}})
    model, optimizer = trained(0)
    state = RunState(step=2, attempted_steps=3, best=0.5, data={"seed": 1})
    folder = manager.save(model, optimizer, state)
    assert folder == step_folder(tmp_path / "checkpoints", 2)
    manifest = verify(folder)
    assert manifest["config"] == {"train": {"seed": 1}}
    assert manifest["world_size"] == 1

    other_model, other = trained(1)
    for group in other.param_groups:
        group["num_steps"] = 77
    assert manager.restore(folder, other_model, other) == state
    assert optimizer_steps(other) == {"m3": 2, "adamw": 2}
    expected = tensors(model, optimizer)
    for name, tensor in tensors(other_model, other).items():
        assert torch.equal(tensor, expected[name]), name


def test_training_goes_on_bit_equal_after_a_restore(tmp_path: Path, trained: Trained) -> None:
    manager = CheckpointManager(tmp_path, keep=2, config={})
    model, optimizer = trained(0)
    folder = manager.save(model, optimizer, RunState(step=2))
    resumed_model, resumed = trained(1)
    manager.restore(folder, resumed_model, resumed)
    for step in range(9):
        for one, two in zip(model.parameters(), resumed_model.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(step))
            two.grad = one.grad.clone()
        optimizer.step()
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed_model.parameters(), strict=True))


@pytest.mark.parametrize("algorithm", ["m3", "adamw"])
def test_gradients_that_wait_for_a_slow_group_survive_a_restore(tmp_path: Path, algorithm: str) -> None:
    def built() -> tuple[nn.Module, M3]:
        model = nn.Linear(6, 8, bias=False)
        nn.init.zeros_(model.weight)
        group = {"name": "slow", "params": [model.weight], "param_names": ["weight"], "period": 4}
        return model, M3([{**group, "algorithm": algorithm}], OptimizerConfig())

    def train(model: nn.Module, optimizer: M3, steps: range) -> None:
        for step in steps:
            model.weight.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            optimizer.step()

    manager = CheckpointManager(tmp_path, keep=2, config={})
    whole, restored = built(), built()
    train(*whole, range(6))
    folder = manager.save(*whole, RunState(step=6))
    manager.restore(folder, *restored)
    assert tensors(*restored)["optimizer/weight/period_sum"].any()
    assert optimizer_steps(restored[1]) == {"slow": 6}
    for pair in (whole, restored):
        train(*pair, range(6, 13))
    expected = tensors(*whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(*restored).items())


def test_the_newest_are_kept(tmp_path: Path, trained: Trained) -> None:
    manager = CheckpointManager(tmp_path, keep=2, config={})
    for step in (5, 10, 100):
        manager.save(*trained(0), RunState(step=step))
    manager.close()
    assert names(tmp_path) == ["step-000000010", "step-000000100"]
    assert [p.name for p in committed(tmp_path)] == ["step-000000100", "step-000000010"]


def test_a_committed_step_is_left_as_it_is(tmp_path: Path, trained: Trained) -> None:
    manager = CheckpointManager(tmp_path, keep=2, config={})
    folder = manager.save(*trained(0), RunState(step=5))
    before = verify(folder)
    assert manager.save(*trained(1), RunState(step=5)) == folder
    assert verify(folder) == before


def test_what_an_interrupted_save_left_is_no_checkpoint(tmp_path: Path, trained: Trained) -> None:
    for name in ("step-000000009.0a1b2c3d.part", "step-000000008.damaged", "step-7", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000000006").write_text("a file")
    assert committed(tmp_path) == []
    assert committed(tmp_path / "absent") == []
    CheckpointManager(tmp_path, keep=2, config={}).save(*trained(0), RunState(step=9))
    assert [p.name for p in committed(tmp_path)] == ["step-000000009"]


def test_a_save_that_fails_commits_nothing(tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("hopescale.checkpoint.manager.write_manifest", fail)
    with pytest.raises(UserError, match="disk full"):
        CheckpointManager(tmp_path, keep=2, config={}).save(*trained(0), RunState(step=4))
    assert committed(tmp_path) == []


def test_a_foreign_checkpoint_is_not_restored(tmp_path: Path, trained: Trained) -> None:
    manager = CheckpointManager(tmp_path, keep=2, config={})
    folder = manager.save(*trained(0), RunState(step=4))
    _, optimizer = trained(1)
    with pytest.raises(CheckpointError, match="model/weight"):
        manager.restore(folder, nn.Linear(2, 2), optimizer)


def test_what_an_interrupted_save_left_is_removed(tmp_path: Path) -> None:
    for name in ("writing-000000/step-000000004.0123abcd", "step-000000002.trash"):
        (tmp_path / name).mkdir(parents=True)
    kept = tmp_path / "step-000000003.damaged"
    kept.mkdir()
    CheckpointManager(tmp_path, keep=2, config={}, incarnation=1)
    assert names(tmp_path) == [kept.name, "writing-000001"]


def test_a_save_that_fails_leaves_room_for_the_next(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointManager(tmp_path, keep=2, config={}, incarnation=3)
    with monkeypatch.context() as broken:
        broken.setattr("hopescale.checkpoint.manager.write_manifest", _full)
        with pytest.raises(UserError, match="No space left"):
            manager.save(*trained(0), RunState(step=4))
    assert not list(manager.staging.path.iterdir())
    assert verify(manager.save(*trained(0), RunState(step=4)))["incarnation"] == 3


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "MANIFEST.json")


@pytest.mark.parametrize("moment", ["before saving", "before committing"])
def test_an_incarnation_that_was_superseded_commits_nothing(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    stale = CheckpointManager(tmp_path, keep=2, config={}, incarnation=0)
    stale.save(*trained(0), RunState(step=1))
    if moment == "before saving":
        CheckpointManager(tmp_path, keep=2, config={}, incarnation=1)
    else:

        def write_and_be_superseded(*told: Any) -> None:
            write_manifest(*told)
            CheckpointManager(tmp_path, keep=2, config={}, incarnation=1)

        monkeypatch.setattr("hopescale.checkpoint.manager.write_manifest", write_and_be_superseded)
    with pytest.raises(UserError, match="a later incarnation of this run has begun") as refused:
        stale.save(*trained(0), RunState(step=2))
    assert refused.value.exit_code == EXIT_SUPERSEDED
    assert [p.name for p in committed(tmp_path)] == ["step-000000001"]
    with pytest.raises(UserError, match="a later incarnation"):
        CheckpointManager(tmp_path, keep=2, config={}, incarnation=0)
