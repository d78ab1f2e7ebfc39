"""The host never waits for the device: not in forward or backward, not while figures are recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from data_pipeline.batch import ClipBatch
from hopescale.config.compose import load_config
from hopescale.config.schema import Config
from hopescale.diagnostics import labels, record_moves, record_parameters, record_traces
from hopescale.metrics.recorder import Recorder
from hopescale.model.build import build_predictor
from hopescale.model.init import initialise
from hopescale.optim.m3 import M3
from hopescale.optim.routing import parameter_groups
from hopescale.parallel.engine import TorchEngine
from hopescale.parallel.gradients import dead_numbers
from hopescale.train_step import micro_losses, objective_share, train_step
from tests.clip_batches import random_clips, step_of
from tests.waiting import META, CountReads, NoWaiting, without_autocast_on_meta

SMALL = [
    "model.encoder_dim=12",
    "model.grid=[2,2]",
    "model.frames=4",
    "model.width=24",
    "model.state_dim=2",
    "model.block_pattern=[H]",
    "model.memory.heads=2",
    "model.cms.levels=[{period: 1},{period: 3}]",
    "objective.jump_weight=0",
    "train.steps=20",
]
MIXED = ["model.block_pattern=[S,H,T]", "model.attention.heads=2", "model.spatial_mixing=true"]
BRANCHES = [
    "objective.jump_weight=1",
    "objective.jump_horizons=2",
    "objective.jump_context=2",
    "objective.rollout.weight=1",
]
OPTIONS = {
    "default": [],
    "all branches": BRANCHES,
    "other blocks": MIXED,
    "unified": ["model.block_pattern=[U]", "model.attention.heads=2"],
    "gate, momentum, two memories": [
        "model.memory.surprise_gate=0.1",
        "model.memory.momentum=0.5",
        "model.memory.self_modify=[key,main]",
    ],
    "token_exact, so": ["model.memory.chunk_rule=token_exact", "model.memory.meta_grad=so"],
    "scan, chunks of two": ["model.memory.chunk_rule=scan", "model.memory.chunk_size=2"],
    "straight_through": ["model.memory.meta_grad=straight_through"],
    "cut": ["model.memory.detach_interval=2", "model.memory.detach_rule=all"],
    "param_period": ["model.cms.mode=param_period"],
    "online": ["model.cms.mode=online"],
    "long-term": ["model.longterm={gate: retrieval}"],
    "one memory for the batch": ["model.memory.scope=batch"],
}


def clips() -> ClipBatch:
    return random_clips(3, state_dim=2, lengths=[4, 3, 4])


def built(config: Config, device: torch.device) -> tuple[Any, M3]:
    model = build_predictor(config.model)
    initialise(model, 0)
    model.to(device)
    groups = parameter_groups(model.named_parameters(), config.optimizer, config.model.cms.parameter_periods)
    return model, M3(groups, config.optimizer)


def recorder_for(config: Config, optimizer: M3, device: torch.device) -> Recorder:
    of_the_run = {"group": [group["name"] for group in optimizer.param_groups], **labels(config.model)}
    return Recorder([], rank=0, world_size=1, all_reduce=None, rank_file=None, labels=of_the_run, device=device)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_forward_backward_and_figures_never_wait(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    without_autocast_on_meta(monkeypatch)
    # Autocast has no type for this device, and is off.
    monkeypatch.setattr("hopescale.train_step.torch.autocast", lambda *_, **__: torch.enable_grad())
    config = load_config([*SMALL, *options])
    model, optimizer = built(config, META)
    recorder, batch = recorder_for(config, optimizer, META), clips()
    on_device = replace(step_of(batch), micro=[batch.to(META)])
    with NoWaiting():
        losses = micro_losses(model, on_device.micro[0], config, attempt=0)
        objective_share(losses, on_device, config).backward()
        record_traces(recorder, losses.traces, on_device.micro[0], config.model)
        dead = dead_numbers(optimizer.param_groups)
        record_parameters(recorder, optimizer.param_groups, dead, world_size=1)
    assert losses.traces
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("target_position"))


@pytest.mark.parametrize("report_in", [None, 0, 2])
@pytest.mark.parametrize("options", [[*MIXED, *BRANCHES], OPTIONS["param_period"]], ids=["mixed", "param_period"])
def test_a_step_reads_one_number_and_recording_it_none(options: list[str], report_in: int | None) -> None:
    config = load_config([*SMALL, *options])
    model, optimizer = built(config, torch.device("cpu"))
    recorder, batches = recorder_for(config, optimizer, torch.device("cpu")), step_of(clips())
    for attempt in range(3):
        with CountReads() as step_reads:
            result = train_step(
                TorchEngine(model, optimizer), batches, config, attempt=attempt, step=attempt, report_in=report_in
            )
        # Whether the gradients are finite: the one thing that the host decides by.
        assert step_reads.count == 1
        with CountReads() as record_reads:
            record_traces(recorder, result.losses[0].traces, batches.micro[0], config.model)
            record_moves(recorder, optimizer.param_groups, result.moved)
            if result.dead is not None:
                record_parameters(recorder, optimizer.param_groups, result.dead, world_size=1)
        assert record_reads.count == 0
    published = recorder.flush(3)
    assert ("dead_fraction" in published) == (report_in == 0)
    measured = [key for key in published if key.startswith("update_ratio")]
    assert bool(measured) == (report_in == 0 or (report_in == 2 and config.model.cms.mode == "param_period"))


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[:, [0, 1]],
        lambda x: x[:, torch.tensor([0, 1])],
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x + torch.ones(3).to(META),
    ],
)
def test_what_waits_is_found(waits: Callable[[torch.Tensor], object]) -> None:
    x = torch.empty(3, 3, device=META)
    with NoWaiting(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        waits(x)


@pytest.mark.parametrize(
    "goes_on",
    [
        lambda x: x + torch.ones(3).to(META, non_blocking=True),
        lambda x: x[:, 1:] * 2.0,
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: x + torch.full((3,), 2.0, device=META),
    ],
)
def test_what_does_not_wait_is_let_through(goes_on: Callable[[torch.Tensor], object]) -> None:
    with NoWaiting():
        goes_on(torch.empty(3, 3, device=META))
