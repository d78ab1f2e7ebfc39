"""Batches of random clips for predictors of 4 patches of 12 channels and actions of 2 numbers, and steps of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from data_pipeline.batch import ClipBatch
from data_pipeline.reader import StepBatches


def random_clips(count: int, *, seed: int = 0, state_dim: int = 0, lengths: Sequence[int] | None = None) -> ClipBatch:
    """Clips of 4 stored frames, or as long as `lengths` says, all of weight 1."""
    generator = torch.Generator().manual_seed(seed)
    return ClipBatch(
        features=torch.randn(count, 4, 4, 12, generator=generator),
        actions=torch.randn(count, 3, 2, generator=generator),
        states=torch.randn(count, 4, state_dim, generator=generator) if state_dim else None,
        lengths=torch.full((count,), 4) if lengths is None else torch.tensor(lengths),
        weights=torch.ones(count),
        positions=torch.arange(count),
        keys=[f"clip-{i}" for i in range(count)],
        partitions=["base"] * count,
    )


def rows(batch: ClipBatch, first: int, end: int) -> ClipBatch:
    """Some of a batch's clips."""
    return replace(batch, **{name: value[first:end] for name, value in vars(batch).items() if value is not None})


def step_of(*micro: ClipBatch) -> StepBatches:
    """A step of these micro-batches on one rank."""
    return StepBatches(0, torch.cat([batch.lengths for batch in micro]).numpy(), list(micro))
