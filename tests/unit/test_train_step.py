from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from data_pipeline.batch import ClipBatch
from hopescale.checkpoint.contents import tensors
from hopescale.config.compose import load_config
from hopescale.config.schema import Config
from hopescale.model.block import HopeBlock
from hopescale.model.init import initialise
from hopescale.model.predictor import HopePredictor
from hopescale.optim.m3 import M3
from hopescale.optim.routing import parameter_groups
from hopescale.parallel.engine import TorchEngine
from hopescale.train_step import StepResult, micro_losses, train_step
from tests.clip_batches import random_clips, rows, step_of

SMALL = [
    "model.encoder_dim=12",
    "model.grid=[2,2]",
    "model.frames=4",
    "model.width=24",
    "model.block_pattern=[S,H]",
    "model.memory.heads=2",
    "model.attention.heads=2",
    "objective.jump_horizons=2",
]

SLOW = [
    "model.cms.mode=param_period",
    "model.cms.levels=[{period: 1, hidden_multiplier: 1.0},{period: 3, hidden_multiplier: 1.0}]",
    "optimizer.groups.titan.period=2",
    "train.steps=20",
]


@pytest.fixture
def config() -> Config:
    return load_config(SMALL)


def _step(model: nn.Module, optimizer: M3, *arguments: Any, **keywords: Any) -> StepResult:
    return train_step(TorchEngine(model, optimizer), *arguments, **keywords)


def built(config: Config) -> tuple[HopePredictor, M3]:
    model = HopePredictor(config.model)
    initialise(model, 0)
    groups = parameter_groups(model.named_parameters(), config.optimizer, config.model.cms.parameter_periods)
    return model, M3(groups, config.optimizer)


def test_a_step_with_gradients_that_are_not_finite_moves_nothing(config: Config) -> None:
    model, optimizer = built(config)
    assert not _step(model, optimizer, step_of(random_clips(3)), config, attempt=0, step=0).skipped
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    steps = [group["num_steps"] for group in optimizer.param_groups]

    bad = random_clips(3)
    bad.features[1, 2, 0, 0] = float("nan")
    assert _step(model, optimizer, step_of(bad), config, attempt=1, step=1).skipped

    assert steps == [group["num_steps"] for group in optimizer.param_groups]
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), model.state_dict().values(), strict=True))
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(before[1][p][key], after[p][key]) for p in after for key in after[p])
    assert not _step(model, optimizer, step_of(random_clips(3)), config, attempt=2, step=1).skipped


def test_gradients_that_are_not_finite_do_not_wait_for_slow_groups() -> None:
    config = load_config([*SMALL, *SLOW])
    curves = []
    for bad_attempts in ((), (1, 3, 4)):
        model, optimizer = built(config)
        step = attempt = 0
        while step < 7:
            # What a step trains on follows the steps that count, not the attempts.
            batch = random_clips(3, seed=step)
            if attempt in bad_attempts:
                batch.features[1, 2, 0, 0] = float("inf")
            step += not train_step(
                TorchEngine(model, optimizer), step_of(batch), config, attempt=step, step=step
            ).skipped
            attempt += 1
        assert attempt == 7 + len(bad_attempts)
        curves.append(tensors(model, optimizer))
    assert all(torch.equal(tensor, curves[1][name]) for name, tensor in curves[0].items())


def test_a_cms_level_steps_on_the_sum_of_its_clipped_gradients_and_nothing_else_waits() -> None:
    config = load_config([*SMALL, *SLOW])
    model, optimizer = built(config)
    level = {name: p for name, p in model.named_parameters() if ".cms.levels.1." in name}
    assert len(level) == 6
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = {name: torch.nn.Parameter(p.detach().clone()) for name, p in level.items()}
    expected = M3(parameter_groups(plain.items(), config.optimizer), config.optimizer)
    sums = {name: torch.zeros_like(p) for name, p in level.items()}

    def add_up(*_: object) -> None:
        for name, parameter in level.items():
            assert parameter.grad is not None
            sums[name] += parameter.grad

    optimizer.register_step_pre_hook(add_up)
    for step in range(6):
        result = train_step(
            TorchEngine(model, optimizer), step_of(random_clips(3, seed=step)), config, attempt=step, step=step
        )
        assert not result.skipped
        if step == 1:
            still = {name for name, p in model.named_parameters() if torch.equal(p, start[name])}
            assert still == set(level)
        if step % 3 == 2:
            for group in expected.param_groups:
                group["lr"] = config.optimizer.lr * group["lr_scale"] * result.rate
            for name, parameter in plain.items():
                parameter.grad = sums[name].clone()
                sums[name].zero_()
            expected.step()
    assert all(torch.equal(level[name], plain[name]) for name in level)
    assert not any(torch.equal(level[name], start[name]) for name in level)


def test_a_clip_of_weight_0_trains_nothing(config: Config) -> None:
    weights = []
    for extra in (False, True):
        model, optimizer = built(config)
        batches = step_of(random_clips(2))
        if extra:
            batches.micro.append(random_clips(1, seed=9).without_weight())
        _step(model, optimizer, batches, config, attempt=0, step=0)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


AHEAD = [
    "objective.jump_context=2",
    "objective.jump_horizons=1",
    "objective.rollout={weight: 0.5, context: 1, steps: 3}",
    "objective.teacher_weight=0.25",
    "objective.auxiliary_weight=0.125",
]


def of_lengths(*lengths: int) -> ClipBatch:
    batch = random_clips(len(lengths))
    for row, length in enumerate(lengths):
        batch.features[row, length:] = 0.0
    return replace(batch, lengths=torch.tensor(lengths))


def test_the_objective_is_a_mean_over_the_frames_that_each_branch_scores() -> None:
    config = load_config([*SMALL, *AHEAD, "model.drop_path=0.0"])
    model, optimizer = built(config)
    batch = of_lengths(4, 3, 2, 4)
    losses = micro_losses(model, batch, config, 0)
    result = _step(model, optimizer, step_of(batch), config, attempt=0, step=0)
    # Transitions 3 + 2 + 1 + 3; jumps of clips with a frame 2; frames 1 .. 3 of each clip.
    expected = 0.25 * losses.teacher / 9 + losses.jump / 3 + 0.5 * losses.rollout / 9 + 0.125 * losses.auxiliary / 4
    torch.testing.assert_close(result.objective, expected.detach())


@pytest.mark.parametrize("cut", [1, 3])
def test_any_micro_batches_train_the_same(cut: int) -> None:
    config, batch = load_config([*SMALL, *AHEAD]), of_lengths(4, 3, 2, 4, 2)
    objectives, weights = [], []
    for micro in ([batch], [rows(batch, 0, cut), rows(batch, cut, 5)]):
        model, optimizer = built(config)
        result = train_step(
            TorchEngine(model, optimizer), replace(step_of(batch), micro=micro), config, attempt=0, step=0
        )
        objectives.append(result.objective)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert not result.skipped
    torch.testing.assert_close(objectives[0], objectives[1])
    assert (weights[0] - weights[1]).norm() <= 1e-5 * weights[0].norm()


def test_clips_too_short_for_a_branch_leave_it_out() -> None:
    config = load_config([*SMALL, *AHEAD[:2], "objective.rollout={weight: 1.0, context: 2, steps: 2}"])
    model, optimizer = built(config)
    result = _step(model, optimizer, step_of(of_lengths(2, 2)), config, attempt=0, step=0)
    assert not result.skipped
    assert float(result.losses[0].jump) == float(result.losses[0].rollout) == 0.0
    torch.testing.assert_close(result.objective, result.losses[0].teacher / 2)


def test_bf16_keeps_parameters_and_fast_weights_in_fp32() -> None:
    config = load_config([*SMALL, "parallel.precision=bf16"])
    model, optimizer = built(config)
    seen: set[torch.dtype] = set()
    block = model.blocks[1]
    assert isinstance(block, HopeBlock)
    memory = block.memory
    write = type(memory).write

    def watched(fast, gates, *more, **options):
        new, written = write(memory, fast, gates, *more, **options)
        seen.update((new.w1.dtype, new.w2.dtype, gates.step_size.dtype, gates.retention.dtype))
        return new, written

    memory.write = watched
    result = _step(model, optimizer, step_of(random_clips(2)), config, attempt=0, step=0)
    assert not result.skipped
    assert seen == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_levels_that_learn_within_clips_are_taught_as_strongly_as_the_step_says() -> None:
    taught = ["model.cms.mode=online", "model.cms.online={teach_scale: 30.0, warmup_steps: 4}"]
    objectives = []
    for overrides, step in ((taught, 0), (["model.cms.mode=param_period"], 0), (taught, 2), (taught, 4)):
        config = load_config([*SMALL, *overrides, "model.drop_path=0.0"])
        model, optimizer = built(config)
        objectives.append(_step(model, optimizer, step_of(random_clips(3)), config, attempt=0, step=step).objective)
    torch.testing.assert_close(objectives[0], objectives[1])
    distances = [float((objective - objectives[0]).abs()) for objective in objectives[2:]]
    assert min(distances) > 1e-6
    assert distances[0] != distances[1]
