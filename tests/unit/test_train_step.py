from __future__ import annotations

import copy

import pytest
import torch

from data_pipeline.batch import ClipBatch
from data_pipeline.reader import StepBatches
from hopescale.config.compose import load_config
from hopescale.config.schema import Config
from hopescale.model.block import HopeBlock
from hopescale.model.init import initialise
from hopescale.model.predictor import HopePredictor
from hopescale.optim.m3 import M3
from hopescale.optim.routing import parameter_groups
from hopescale.train_step import train_step

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


@pytest.fixture
def config() -> Config:
    return load_config(SMALL)


def built(config: Config) -> tuple[HopePredictor, M3]:
    model = HopePredictor(config.model)
    initialise(model, 0)
    return model, M3(parameter_groups(model.named_parameters(), config.optimizer), config.optimizer)


def clips(count: int, seed: int = 0) -> ClipBatch:
    generator = torch.Generator().manual_seed(seed)
    return ClipBatch(
        features=torch.randn(count, 4, 4, 12, generator=generator),
        actions=torch.randn(count, 3, 2, generator=generator),
        states=None,
        lengths=torch.full((count,), 4),
        weights=torch.ones(count),
        positions=torch.arange(count),
        keys=[f"clip-{i}" for i in range(count)],
        partitions=["base"] * count,
    )


def step_of(batch: ClipBatch) -> StepBatches:
    return StepBatches(0, len(batch.keys), 3 * len(batch.keys), [batch])


def test_a_step_with_gradients_that_are_not_finite_moves_nothing(config: Config) -> None:
    model, optimizer = built(config)
    assert not train_step(model, optimizer, step_of(clips(3)), config, attempt=0, step=0).skipped
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    steps = [group["num_steps"] for group in optimizer.param_groups]

    bad = clips(3)
    bad.features[1, 2, 0, 0] = float("nan")
    assert train_step(model, optimizer, step_of(bad), config, attempt=1, step=1).skipped

    assert steps == [group["num_steps"] for group in optimizer.param_groups]
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), model.state_dict().values(), strict=True))
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(before[1][p][key], after[p][key]) for p in after for key in after[p])
    assert not train_step(model, optimizer, step_of(clips(3)), config, attempt=2, step=1).skipped


def test_a_clip_of_weight_0_trains_nothing(config: Config) -> None:
    weights = []
    for extra in (False, True):
        model, optimizer = built(config)
        batches = step_of(clips(2))
        if extra:
            batches.micro.append(clips(1, seed=9).without_weight())
        train_step(model, optimizer, batches, config, attempt=0, step=0)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_bf16_keeps_parameters_and_fast_weights_in_fp32() -> None:
    config = load_config([*SMALL, "parallel.precision=bf16"])
    model, optimizer = built(config)
    seen: set[torch.dtype] = set()
    block = model.blocks[1]
    assert isinstance(block, HopeBlock)
    memory = block.memory
    write = type(memory).write

    def watched(fast, reading, start_norm):
        new, trace = write(memory, fast, reading, start_norm)
        seen.update((new.w1.dtype, new.w2.dtype, reading.step_size.dtype, reading.retention.dtype))
        return new, trace

    memory.write = watched
    result = train_step(model, optimizer, step_of(clips(2)), config, attempt=0, step=0)
    assert not result.skipped
    assert seen == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
