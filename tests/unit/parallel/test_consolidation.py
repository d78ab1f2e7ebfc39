"""When and how far long-term memories move, on one process; `tests/distributed/test_longterm.py` has several."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from data_pipeline.batch import StepBatches
from hopescale.checkpoint.contents import restore_rows, tensors
from hopescale.config.compose import load_config
from hopescale.config.schema import Config
from hopescale.model.init import initialise
from hopescale.model.longterm import LongTermChange, LongTermMemory
from hopescale.model.predictor import HopePredictor
from hopescale.optim.m3 import M3
from hopescale.optim.routing import parameter_groups
from hopescale.parallel.consolidation import consolidate, longterm_memories
from hopescale.parallel.engine import TorchEngine
from hopescale.train_step import train_step
from tests.clip_batches import random_clips, rows, step_of

SMALL = [
    "model.encoder_dim=12",
    "model.grid=[2,2]",
    "model.frames=4",
    "model.width=24",
    "model.block_pattern=[U,H]",
    "model.memory.heads=2",
    "model.attention.heads=2",
    "objective.jump_horizons=2",
]


def small(longterm: str) -> Config:
    return load_config([*SMALL, f"model.longterm={longterm}"])


def built(config: Config) -> tuple[HopePredictor, M3]:
    model = HopePredictor(config.model)
    initialise(model, 0)
    return model, M3(parameter_groups(model.named_parameters(), config.optimizer), config.optimizer)


def memories(model: HopePredictor) -> list[LongTermMemory]:
    return [memory for _, memory in longterm_memories(model)]


def random_changes(model: HopePredictor, seed: int) -> list[LongTermChange]:
    generator = torch.Generator().manual_seed(seed)
    return [
        LongTermChange(*(torch.randn(part.shape, generator=generator) for part in memory.carried))
        for memory in memories(model)
    ]


def carried(model: HopePredictor) -> Tensor:
    return torch.cat([part.flatten() for memory in memories(model) for part in memory.carried])


def flat(changes: Sequence[LongTermChange]) -> Tensor:
    return torch.cat([part.flatten() for change in changes for part in change])


def test_every_step_moves_a_share_of_the_way_to_what_its_clips_left() -> None:
    model, _ = built(small("{ema: 0.1}"))
    for step in range(3):
        before, changes = carried(model), random_changes(model, step)
        consolidate(model, changes, 4, step)
        # What the clips left beyond the trained memory is, on average, `before` plus their changes.
        left = before + flat(changes) / 4
        torch.testing.assert_close(carried(model), torch.lerp(before, left, 0.1))


def test_between_moves_changes_wait_and_then_count_for_all_steps_at_once() -> None:
    model, _ = built(small("{ema: 0.1, sync_every: 3}"))
    changes = [random_changes(model, step) for step in range(7)]
    for step in range(7):
        before = carried(model)
        consolidate(model, changes[step], 2, step)
        if step % 3 != 2:
            assert torch.equal(carried(model), before)
        else:
            mean = torch.stack([flat(change) for change in changes[step - 2 : step + 1]]).mean(0) / 2
            torch.testing.assert_close(carried(model) - before, (1 - 0.9**3) * mean)
    waiting = torch.cat([part.flatten() for memory in memories(model) for part in memory.waiting or ()])
    torch.testing.assert_close(waiting, flat(changes[6]) / 2)


@pytest.mark.parametrize("sync_every", [1, 2])
def test_steps_without_teacher_branch_move_nothing_and_count_in_the_mean(sync_every: int) -> None:
    longterm = f"{{ema: 0.5, sync_every: {sync_every}}}"
    phases = "[{start: 1, teacher_weight: 0.0}, {start: 2, teacher_weight: 1.0}]"
    config = load_config([*SMALL, f"model.longterm={longterm}", f"objective.curriculum={phases}"])
    model, optimizer = built(config)
    found = []
    for step, objective in enumerate(config.objective.stages):
        now = config.model_copy(update={"objective": objective})
        result = train_step(TorchEngine(model, optimizer), step_of(random_clips(3)), now, attempt=step, step=step)
        assert not result.skipped
        found.append(carried(model))
    if sync_every == 1:
        assert found[0].any()
        assert torch.equal(found[1], found[0])
        assert not torch.equal(found[2], found[1])
    else:
        assert not found[0].any()
        assert found[1].any(), "half of the window left something"
        assert torch.equal(found[2], found[1])


def test_a_model_without_long_term_memories_has_nothing_to_move() -> None:
    model, optimizer = built(load_config(SMALL))
    consolidate(model, [], 2, 0)
    assert not any("carried" in name or "waiting" in name for name in tensors(model, optimizer))


def test_a_step_that_is_not_taken_carries_over_nothing() -> None:
    config = small("{ema: 0.5, sync_every: 2}")
    model, optimizer = built(config)
    assert not train_step(TorchEngine(model, optimizer), step_of(random_clips(3)), config, attempt=0, step=0).skipped
    before = {name: tensor.clone() for name, tensor in tensors(model, optimizer).items()}
    assert any(tensor.any() for name, tensor in before.items() if "waiting" in name)
    bad = random_clips(3)
    bad.features[1, 2, 0, 0] = torch.nan
    assert train_step(TorchEngine(model, optimizer), step_of(bad), config, attempt=1, step=1).skipped
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model, optimizer).items())
    assert not train_step(TorchEngine(model, optimizer), step_of(random_clips(3)), config, attempt=2, step=1).skipped
    assert all(torch.isfinite(tensor).all() for tensor in tensors(model, optimizer).values())
    assert carried(model).any()


@pytest.mark.parametrize("cut", [1, 3])
def test_any_micro_batches_and_clips_of_weight_0_carry_over_the_same(cut: int) -> None:
    config, batch = small("{ema: 0.5}"), random_clips(5)
    found = []
    for extra in ((batch,), (rows(batch, 0, cut), rows(batch, cut, 5), random_clips(1, seed=9).without_weight())):
        model, optimizer = built(config)
        lengths = step_of(batch).lengths
        train_step(TorchEngine(model, optimizer), StepBatches(0, lengths, list(extra)), config, attempt=0, step=0)
        found.append(carried(model))
    assert found[0].any()
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)


def test_figures_of_a_step_do_not_hold_on_to_the_changes() -> None:
    config = small("{}")
    model, optimizer = built(config)
    result = train_step(TorchEngine(model, optimizer), step_of(random_clips(2)), config, attempt=0, step=0)
    assert all(trace.longterm is trace.auxiliary is None for losses in result.losses for trace in losses.traces)
    figures = [t for losses in result.losses for trace in losses.traces for t in trace if isinstance(t, Tensor)]
    assert not any(figure.requires_grad for figure in figures)


def test_what_waits_on_more_ranks_than_there_are_now_is_added_up() -> None:
    model, optimizer = built(small("{sync_every: 2}"))
    loaded = tensors(model, optimizer, saved_by=3)
    waits = [name for name in loaded if name.startswith("waiting/")]
    assert [len(loaded[name]) for name in waits] == [3] * 4
    for name in waits:
        loaded[name].copy_(torch.arange(1.0, 4.0).view(3, 1, 1, 1, 1).expand_as(loaded[name]))
    restore_rows(model, loaded)
    saved = tensors(model, optimizer)
    assert all(saved[name].shape[0] == 1 and (saved[name] == 6).all() for name in waits)


def test_matrices_of_long_term_and_u_memories_train_with_those_of_the_others() -> None:
    config = small("{}")
    model, optimizer = built(config)
    groups = {name: group["name"] for group in optimizer.param_groups for name in group["param_names"]}
    assert len(groups) == len(list(model.parameters()))
    by_group: dict[str, set[str]] = {}
    for name, group in groups.items():
        if ".memory." in name:
            by_group.setdefault(group, set()).add(name.split(".memory.")[1])
    assert by_group["titan"] == {"w1", "w2", "longterm.w1", "longterm.w2"}
    assert {"query.weight", "key.weight", "value.weight", "out.weight"} <= by_group["projections"]
    assert {"eta_bias", "alpha_bias", "longterm.gate.bias", "longterm.norm_weight"} <= by_group["vectors"]
