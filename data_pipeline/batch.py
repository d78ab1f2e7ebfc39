"""Clips on their way to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Clip:
    """One clip as stored: features f32 `[F, N, E]`, actions f32 `[F - 1, A]`, states f32 `[F, S]` or none."""

    key: str
    partition: str
    features: Tensor
    actions: Tensor
    states: Tensor | None


@dataclass(frozen=True)
class ClipBatch:
    """A batch of clips, padded with zeros to a common number of frames.

    Attributes:
        features: f32 `[B, F, N, E]`, raw encoder output.
        actions: f32 `[B, T, A]`; action t acts between frames t and t + 1; T = F - 1.
        states: f32 `[B, F, S]`, or none.
        lengths: i64 `[B]`, valid frames.
        weights: f32 `[B]`: 1, or 0 for a clip that only keeps ranks in step.
        positions: i64 `[B]`, global sample positions, for counter-based randomness.
        keys: Clip keys.
        partitions: Partition of each clip.
    """

    features: Tensor
    actions: Tensor
    states: Tensor | None
    lengths: Tensor
    weights: Tensor
    positions: Tensor
    keys: list[str]
    partitions: list[str]

    def to(self, device: torch.device | str) -> ClipBatch:
        """Return the batch on `device`, but for what the host decides by: lengths, weights and positions stay there."""
        return replace(
            self,
            features=self.features.to(device, non_blocking=True),
            actions=self.actions.to(device, non_blocking=True),
            states=None if self.states is None else self.states.to(device, non_blocking=True),
        )

    def num_frames(self, first: int = 0, end: int | None = None) -> float:
        """Return how many valid frames with numbers first .. end - 1 the clips have, times their weights."""
        frames = frames_between(self.lengths.numpy(), first, end)
        return float(frames @ self.weights.numpy())

    def without_weight(self) -> ClipBatch:
        """Return the batch with weight 0 for every clip: it keeps a rank in step and adds nothing."""
        return replace(self, weights=torch.zeros_like(self.weights))


def frames_between(lengths: NDArray[np.int64], first: int, end: int | None) -> NDArray[np.int64]:
    """Return how many of the frames first .. end - 1 (to the last one if end is None) clips of some lengths have."""
    return np.clip(lengths, first, end) - first


def collate(clips: Sequence[Clip], frames: int, positions: np.ndarray, weights: np.ndarray) -> ClipBatch:
    """Stack clips into one batch.

    Args:
        clips: At least one; all with the same N, E, A, S, and all or none with states.
        frames: F of the batch; longer clips are cut, shorter ones padded with zeros.
        positions: i64 `[B]`.
        weights: f32 `[B]`.
    """
    count, (_, tokens, channels), action_dim = len(clips), clips[0].features.shape, clips[0].actions.shape[1]
    features = torch.zeros(count, frames, tokens, channels)
    actions = torch.zeros(count, frames - 1, action_dim)
    states = None if clips[0].states is None else torch.zeros(count, frames, clips[0].states.shape[1])
    lengths = torch.empty(count, dtype=torch.int64)
    for row, clip in enumerate(clips):
        length = min(frames, clip.features.shape[0])
        lengths[row] = length
        features[row, :length] = clip.features[:length]
        actions[row, : length - 1] = clip.actions[: length - 1]
        if states is not None and clip.states is not None:
            states[row, :length] = clip.states[:length]
    return ClipBatch(
        features=features,
        actions=actions,
        states=states,
        lengths=lengths,
        weights=torch.from_numpy(weights.astype(np.float32)),
        positions=torch.from_numpy(positions.astype(np.int64)),
        keys=[clip.key for clip in clips],
        partitions=[clip.partition for clip in clips],
    )
