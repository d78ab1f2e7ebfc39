"""How many operators a step hands out, against a count of them."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from hopescale.config.compose import load_config
from hopescale.model.build import build_predictor
from hopescale.parallel.activation_checkpointing import recompute_blocks
from hopescale.plan.operators import operators
from hopescale.train_step import micro_losses, objective_share
from tests.clip_batches import clips_for, step_of

SMALL = ["model.width=64", "model.attention.heads=4", "model.encoder_dim=32", "model.grid=[2,2]"]


class Counting(TorchDispatchMode):
    """Counts what comes to the dispatcher."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings",
    [
        "model.block_pattern=[S,T] parallel.recompute=none",
        "model.block_pattern=[S,H,S]",
        "model.block_pattern=[H,H] parallel.recompute=none model.frames=5",
        "model.block_pattern=[H,H] model.frames=5 train.global_batch=2",
        "model.block_pattern=[H,U] parallel.recompute=chunk",
        "model.block_pattern=[U,U] parallel.recompute=none model.frames=12",
        "model.block_pattern=[H,H] model.memory.chunk_size=4 objective.jump_weight=0.0",
        "model.block_pattern=[H] model.longterm.ema=0.1 objective.rollout.weight=0.5",
        "model.block_pattern=[H,S] model.cms.mode=online",
        "model.block_pattern=[U,H] model.cms.mode=online parallel.recompute=none",
        "model.block_pattern=[H,H] objective.teacher_weight=0.0",
        "model.block_pattern=[S,S,S,S]",
        "model.block_pattern=[T,T] parallel.recompute=none",
        "model.block_pattern=[U,S] model.memory.self_modify=[]",
        "model.block_pattern=[H,S] model.frames=16 parallel.precision=bf16",
    ],
)
def test_operators_are_those_that_the_dispatcher_sees(settings: str) -> None:
    config = load_config(["parallel.device=cpu", "train.global_batch=1", *SMALL, *settings.split()])
    model, batch = build_predictor(config.model), step_of(clips_for(config.model, config.train.global_batch))
    recompute_blocks(list(model.blocks), config.parallel.recompute)
    with Counting() as seen:
        objective_share(micro_losses(model, batch.micro[0], config, 0), batch, config).backward()
    foreseen = operators(config.model, config.objective, config.model.frames, config.parallel.recompute)
    assert foreseen == pytest.approx(seen.number, rel=0.1)
