"""Batches of random clips, unless told otherwise of 4 patches of 12 channels and actions of 2 numbers, and steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from data_pipeline.batch import ClipBatch, StepBatches
from hopescale.model.schema import ModelConfig


def random_clips(
    count: int,
    *,
    seed: int = 0,
    frames: int = 4,
    patches: int = 4,
    channels: int = 12,
    action_dim: int = 2,
    state_dim: int = 0,
    lengths: Sequence[int] | None = None,
) -> ClipBatch:
    """Clips of so many stored frames, or as long as `lengths` says, all of weight 1."""
    generator = torch.Generator().manual_seed(seed)
    return ClipBatch(
        features=torch.randn(count, frames, patches, channels, generator=generator),
        actions=torch.randn(count, frames - 1, action_dim, generator=generator),
        states=torch.randn(count, frames, state_dim, generator=generator) if state_dim else None,
        lengths=torch.full((count,), frames) if lengths is None else torch.tensor(lengths),
        weights=torch.ones(count),
        positions=torch.arange(count),
        keys=[f"clip-{i}" for i in range(count)],
        partitions=["base"] * count,
    )


def rows(batch: ClipBatch, first: int, end: int) -> ClipBatch:
    """Some of a batch's clips."""
    return replace(batch, **{name: value[first:end] for name, value in vars(batch).items() if value is not None})


def clips_for(model: ModelConfig, count: int) -> ClipBatch:
    """Clips of full length for a predictor."""
    return random_clips(
        count,
        frames=model.frames,
        patches=model.num_patches,
        channels=model.encoder_dim,
        action_dim=model.action_dim,
        state_dim=model.state_dim,
    )


def step_of(*micro: ClipBatch) -> StepBatches:
    """A step of these micro-batches on one rank."""
    return StepBatches(0, torch.cat([batch.lengths for batch in micro]).numpy(), list(micro))
