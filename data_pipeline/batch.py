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
    """One clip as stored.

    Attributes:
        key: Of the clip; a window's first frame follows an @.
        partition: Of the clip.
        features: `[F, N, E]` in the stored type.
        actions: f32 `[F - 1, A]`, aligned: action t acts between frames t and t + 1.
        states: f32 `[F, S]`, or none.
        extrinsics: f32 `[F - 1, X]`, or none.
        features_scale: f32 `[E]` of int8 features, else none.
    """

    key: str
    partition: str
    features: Tensor
    actions: Tensor
    states: Tensor | None = None
    extrinsics: Tensor | None = None
    features_scale: Tensor | None = None

    def decoded(self) -> Tensor:
        """Return the features as f32 `[F, N, E]`."""
        return decode(self.features[None], None if self.features_scale is None else self.features_scale[None])[0]


@dataclass(frozen=True)
class ClipBatch:
    """A batch of clips, padded with zeros to a common number of frames.

    Attributes:
        features: `[B, F, N, E]`, raw encoder output: as stored on its way through the reader, f32 after `to`.
        actions: f32 `[B, T, A]`; action t acts between frames t and t + 1; T = F - 1.
        states: f32 `[B, F, S]`, or none.
        lengths: i64 `[B]`, valid frames.
        weights: f32 `[B]`: 1, or 0 for a clip that only keeps ranks in step.
        positions: i64 `[B]`, global sample positions, for counter-based randomness.
        keys: Clip keys.
        partitions: Partition of each clip.
        features_scale: f32 `[B, E]` of int8 features that were not decoded yet, else none.
        extrinsics: f32 `[B, T, X]`, or none.
    """

    features: Tensor
    actions: Tensor
    states: Tensor | None
    lengths: Tensor
    weights: Tensor
    positions: Tensor
    keys: list[str]
    partitions: list[str]
    features_scale: Tensor | None = None
    extrinsics: Tensor | None = None

    def to(self, device: torch.device | str) -> ClipBatch:
        """Return the batch on `device`, its features decoded there to f32.

        What the host decides by stays there: lengths, weights and positions. Features travel in their stored type, half
        or a quarter of the bytes.
        """

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            features=decode(self.features.to(device, non_blocking=True), moved(self.features_scale)),
            features_scale=None,
            actions=self.actions.to(device, non_blocking=True),
            states=moved(self.states),
            extrinsics=moved(self.extrinsics),
        )

    def num_frames(self, first: int = 0, end: int | None = None) -> float:
        """Return how many valid frames with numbers first .. end - 1 the clips have, times their weights."""
        frames = frames_between(self.lengths.numpy(), first, end)
        return float(frames @ self.weights.numpy())

    def without_weight(self) -> ClipBatch:
        """Return the batch with weight 0 for every clip: it keeps a rank in step and adds nothing."""
        return replace(self, weights=torch.zeros_like(self.weights))


@dataclass(frozen=True)
class StepBatches:
    """What one rank computes in one optimizer step.

    Attributes:
        position: First global position of the step.
        lengths: i64 `[G]`, valid frames of every clip of the whole global batch, on all ranks; clips of weight 0 count
            no frames. A clip that turned out bad and was masked still does: no rank knows of the others' masks, and all
            must divide by the same number.
        micro: Micro-batches; equally many on every rank.
    """

    position: int
    lengths: NDArray[np.int64]
    micro: list[ClipBatch]

    @property
    def num_clips(self) -> int:
        """Clips of the whole global batch that have weight, on all ranks."""
        return int(np.count_nonzero(self.lengths))

    def num_frames(self, first: int = 0, end: int | None = None) -> int:
        """Return how many valid frames the whole global batch has with numbers first .. end - 1 in their clips.

        This is what summed losses are divided by, so that ranks and micro-batches add up to one mean.
        """
        return int(frames_between(self.lengths, first, end).sum())

    def to(self, device: torch.device | str) -> StepBatches:
        """Return the step with its micro-batches on `device`, as `ClipBatch.to` puts them there."""
        return replace(self, micro=[clips.to(device) for clips in self.micro])


def collate(clips: Sequence[Clip], frames: int, positions: NDArray[np.int64]) -> ClipBatch:
    """Copy clips into one batch of their stored type, with weight 1.

    Args:
        clips: At least one; all of the same sizes and with the same fields.
        frames: F of the batch, at least that of each clip; what a clip lacks is zero.
        positions: i64 `[B]`.
    """

    def batched(name: str, length: int) -> Tensor | None:
        parts = [getattr(clip, name) for clip in clips]
        if parts[0] is None:
            return None
        whole = parts[0].new_zeros(len(parts), length, *parts[0].shape[1:])
        for row, part in enumerate(parts):
            whole[row, : len(part)] = part
        return whole

    features, actions = batched("features", frames), batched("actions", frames - 1)
    assert features is not None
    assert actions is not None
    return ClipBatch(
        features=features,
        actions=actions,
        states=batched("states", frames),
        lengths=torch.tensor([len(clip.features) for clip in clips]),
        weights=torch.ones(len(clips)),
        positions=torch.from_numpy(np.asarray(positions, np.int64)),
        keys=[clip.key for clip in clips],
        partitions=[clip.partition for clip in clips],
        features_scale=None if clips[0].features_scale is None else batched("features_scale", features.shape[-1]),
        extrinsics=batched("extrinsics", frames - 1),
    )


def decode(features: Tensor, scale: Tensor | None) -> Tensor:
    """Return f32 features `[B, F, N, E]`.

    Args:
        features: Of any stored type.
        scale: f32 `[B, E]` of int8 features, else none.
    """
    values = features.float()
    return values if scale is None else values.mul_(scale[:, None, None, :])


def not_finite(clips: ClipBatch) -> list[str]:
    """Return the keys of clips with weight whose features, actions or states hold values that are not finite."""
    given = [tensor for tensor in (clips.features, clips.actions, clips.states) if tensor is not None]
    finite = torch.stack([tensor.float().flatten(1).isfinite().all(1) for tensor in given]).all(0).tolist()
    return [
        key for key, fine, weight in zip(clips.keys, finite, clips.weights.tolist(), strict=True) if weight and not fine
    ]


def frames_between(lengths: NDArray[np.int64], first: int, end: int | None) -> NDArray[np.int64]:
    """Return how many of the frames first .. end - 1 (to the last one if end is None) clips of some lengths have."""
    return np.clip(lengths, first, end) - first
