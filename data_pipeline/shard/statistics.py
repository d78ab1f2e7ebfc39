"""Statistics of a data set, made in the pass that writes or indexes it, and merged in one fixed order.

Parts of a data set are summarised apart and combined by the rule of Chan, Golub and LeVeque ("Updating formulae and a
pairwise algorithm for computing sample variances"), so the result does not depend on who summarised which part.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.cache import write_bytes
from data_pipeline.dataset.index import save_array
from data_pipeline.dataset.manifest import MEAN_FRAME_FILE, STATISTICS_FILE
from data_pipeline.order import mix64
from data_pipeline.schema import ROW_FIELDS, SPLITS
from data_pipeline.shard.convert import as_float32, as_float64, layer_norm, tensor

SAMPLE_EVERY = 8
"""A sample holds one of so many (frame, token) pairs."""

_SAMPLE_WORD = 0x53414D504C45
_BLOCK_VALUES = 1 << 18
_ROWS_AT_ONCE = 512
_BY_PARTITION = (*ROW_FIELDS, "features")
Parts = Mapping[str, np.ndarray]


def phases(clips: Iterable[tuple[str, str, int]]) -> dict[str, int]:
    """Return for each key the frames of the clips of its split whose keys sort before it: where a sample goes on.

    Args:
        clips: Key, split and frames of each.
    """
    found: dict[str, int] = {}
    seen = dict.fromkeys(SPLITS, 0)
    for key, split, frames in sorted(clips):
        found[key] = seen[split]
        seen[split] += frames
    return found


@dataclass
class Moments:
    """Count, mean, sum of squared deviations, least and greatest value of some columns.

    Attributes:
        columns: Number of columns, d.
        count: Rows seen.
        mean: f64 `[d]`.
        deviations: f64 `[d]`, sum of (x - mean)².
        low: f64 `[d]`.
        high: f64 `[d]`.
    """

    columns: int
    count: int = 0
    mean: NDArray[np.float64] = field(init=False)
    deviations: NDArray[np.float64] = field(init=False)
    low: NDArray[np.float64] = field(init=False)
    high: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.mean, self.deviations = np.zeros(self.columns), np.zeros(self.columns)
        self.low, self.high = np.full(self.columns, np.inf), np.full(self.columns, -np.inf)

    def add(self, rows: NDArray[np.floating]) -> Moments:
        """Add rows `[n, d]`, at least one, of f32 or f64, and return the moments of these alone."""
        added = Moments(self.columns)
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            added.merge(self._add(rows[first : first + _ROWS_AT_ONCE]))
        return added

    def _add(self, rows: NDArray[np.floating]) -> Moments:
        # numpy adds whole rows, in order: the same wherever they lie in memory, which matrix products are not. Numbers
        # taken off a mean first lose nothing that matters in f32.
        about = (self.mean if self.count else rows.mean(0)).astype(rows.dtype)
        centred = rows - about
        part = Moments(self.columns, len(rows))
        correction = centred.sum(0).astype(np.float64) / len(rows)
        np.multiply(centred, centred, out=centred)
        squares = centred.sum(0).astype(np.float64) - len(rows) * np.square(correction)
        part.mean, part.deviations = about.astype(np.float64) + correction, np.maximum(squares, 0)
        part.low, part.high = rows.min(0).astype(np.float64), rows.max(0).astype(np.float64)
        self.merge(part)
        return part

    def pooled(self) -> Moments:
        """Return the moments of the values of all columns, as of a single one."""
        values = Moments(1, self.count * self.columns)
        values.mean = self.mean.mean(keepdims=True)
        between = self.count * np.square(self.mean - values.mean).sum()
        values.deviations = np.array([self.deviations.sum() + between])
        values.low, values.high = self.low.min(keepdims=True), self.high.max(keepdims=True)
        return values

    def merge(self, other: Moments) -> None:
        """Add what another part has seen."""
        if not other.count:
            return
        total = self.count + other.count
        difference = other.mean - self.mean
        self.mean = self.mean + difference * (other.count / total)
        between = np.square(difference) * (self.count * other.count / total)
        self.deviations = self.deviations + other.deviations + between
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        self.count = total

    @property
    def std(self) -> NDArray[np.float64]:
        """Of the rows themselves (divided by n, not n - 1); zeros without any."""
        return np.sqrt(self.deviations / max(self.count, 1))

    def arrays(self) -> NDArray[np.float64]:
        """Return f64 `[5, d]`: count in every column, mean, deviations, low, high."""
        return np.stack([np.full(self.columns, float(self.count)), self.mean, self.deviations, self.low, self.high])

    @classmethod
    def of(cls, arrays: NDArray[np.float64]) -> Moments:
        """Return what `arrays` was made from."""
        moments = cls(arrays.shape[1], int(arrays[0, 0]) if arrays.shape[1] else 0)
        moments.mean, moments.deviations, moments.low, moments.high = arrays[1:]
        return moments


def token_groups(tokens: int, every: int) -> list[NDArray[np.int64]]:
    """Return which tokens are sampled together: `every` groups, equally large but for one token.

    Frame f of a split, counted over its clips in the order of their keys, contributes group `f mod every`. So each
    token is seen in one of `every` frames, whatever the shards, the workers or the machines.

    Args:
        tokens: Patch tokens of a frame, N.
        every: 1 for all tokens of all frames.
    """
    if every == 1:
        return [np.arange(tokens)]
    shuffled = np.argsort(mix64(np.arange(tokens, dtype=np.uint64), _SAMPLE_WORD), kind="stable")
    return [np.sort(shuffled[group::every]).astype(np.int64) for group in range(every)]


def sampled(
    features: np.ndarray,
    name: str,
    scale: np.ndarray | None,
    groups: Sequence[NDArray[np.int64]],
    phase: int,
    *,
    wide: bool = False,
) -> Float[Tensor, "n E"]:
    """Return the sampled tokens of a clip as f32, frame after frame.

    Args:
        features: `[F, N, E]` as stored.
        name: Of their type.
        scale: f32 `[E]` of int8.
        groups: Of `token_groups`.
        phase: Group of the first frame.
        wide: Return f64 instead, for types that f32 does not hold.
    """
    read = as_float64 if wide else as_float32
    if len(groups) == 1:
        return read(features.reshape(-1, features.shape[-1]), name, scale)
    frames = tensor(features.view(f"i{features.dtype.itemsize}"), "")
    picks = [torch.from_numpy(groups[(phase + place) % len(groups)]) for place in range(len(frames))]
    rows = torch.cat([frame.index_select(0, pick) for frame, pick in zip(frames, picks, strict=True)])
    return read(rows.numpy().view(features.dtype), name, scale)


def frame_blocks(shape: Sequence[int], every: int) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of runs of frames whose samples as f32 fit a processor's cache, one frame at least.

    Args:
        shape: Of the features, `[F, N, E]`.
        every: One of so many tokens is sampled.
    """
    step = max(1, _BLOCK_VALUES * every // (shape[1] * shape[2]))
    for first in range(0, shape[0], step):
        yield first, min(first + step, shape[0])


class Statistics:
    """Of the training clips of one part of a data set, e.g. a shard."""

    def __init__(
        self, frame: tuple[int, int], widths: Mapping[str, int], partitions: int, every: int, *, feature_type: str
    ) -> None:
        """Start empty.

        Args:
            frame: Tokens and channels, N and E.
            widths: Numbers in a row of each of `ROW_FIELDS` there is.
            partitions: Number of partitions.
            every: Sample one of so many (frame, token) pairs; 1 takes all.
            feature_type: Stored type of the features.
        """
        self._frame, self._feature_type = frame, feature_type
        self._groups = token_groups(frame[0], every)
        self._channels = Moments(frame[1])
        self._sums = [torch.zeros(len(group), frame[1], dtype=torch.float64) for group in self._groups]
        self._frames = [0] * every
        self._rows = {name: [Moments(width) for _ in range(partitions)] for name, width in widths.items()}
        self._values = [Moments(1) for _ in range(partitions)]

    def add(self, arrays: Mapping[str, np.ndarray], partition: int, phase: int) -> None:
        """Add a training clip.

        Args:
            arrays: By field, as stored.
            partition: Its number.
            phase: Training frames of the clips whose keys sort before this one's.
        """
        for name, moments in self._rows.items():
            if len(arrays[name]):
                moments[partition].add(arrays[name].astype(np.float64))
        features, scale, every = arrays["features"], arrays.get("features_scale"), len(self._groups)
        for first, end in frame_blocks(features.shape, every):
            rows = sampled(features[first:end], self._feature_type, scale, self._groups, phase + first)
            if len(rows):
                self._values[partition].merge(self._channels.add(rows.numpy()).pooled())
                self._add_frames(layer_norm(rows), end - first, phase + first)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what `merged` needs."""
        sums, frames = np.zeros(self._frame), np.zeros(self._frame[0], np.int64)
        for group, part, count in zip(self._groups, self._sums, self._frames, strict=True):
            sums[group], frames[group] = part.numpy(), count
        by_partition = {**self._rows, "features": self._values}
        rows = {name: np.stack([moments.arrays() for moments in several]) for name, several in by_partition.items()}
        return {"channels": self._channels.arrays(), "mean_frame_sum": sums, "mean_frame_count": frames, **rows}

    def _add_frames(self, rows: Float[Tensor, "n E"], frames: int, phase: int) -> None:
        at = 0
        for number in range(phase, phase + frames):
            group = number % len(self._groups)
            size = len(self._groups[group])
            self._sums[group] += rows[at : at + size]
            self._frames[group] += 1
            at += size


@dataclass
class Summary:
    """Statistics of a whole data set."""

    channels: Moments
    mean_frame_sum: NDArray[np.float64]
    mean_frame_count: NDArray[np.int64]
    rows: dict[str, list[Moments]]

    def write(self, out: Path, partitions: Sequence[str]) -> dict[str, str]:
        """Write mean_frame.npy and stats.npz, and return their sha256 by relative path.

        mean_frame.npy is f32 `[N, E]`, the mean of LayerNormed training features; zeros for tokens never seen.
        stats.npz holds `channel_mean`, `channel_std`, `channel_absmax` f64 `[E]` and `channel_count` of stored features
        before LayerNorm; `partitions`, their names; and for each field of rows FIELD_count `[P]`, FIELD_mean,
        FIELD_std, FIELD_min, FIELD_max f64 `[P, d]` of the rows as recorded, zeros for partitions without training
        clips. features_count and so on are of the single values of the features sampled, d = 1.

        Args:
            out: Folder of the data set.
            partitions: Names, P of them.
        """
        mean = self.mean_frame_sum / np.maximum(self.mean_frame_count, 1)[:, None]
        seen = self.channels.count > 0
        absmax = np.maximum(-self.channels.low, self.channels.high) if seen else np.zeros(self.channels.columns)
        arrays: dict[str, np.ndarray] = {
            "channel_mean": self.channels.mean,
            "channel_std": self.channels.std,
            "channel_absmax": absmax,
            "channel_count": np.array(self.channels.count, np.int64),
            "partitions": np.array(list(partitions), dtype=np.str_),
        }
        for name, several in self.rows.items():
            arrays[f"{name}_count"] = np.array([moments.count for moments in several], np.int64)
            arrays[f"{name}_mean"] = np.stack([moments.mean for moments in several])
            arrays[f"{name}_std"] = np.stack([moments.std for moments in several])
            for bound in ("low", "high"):
                values = [getattr(m, bound) if m.count else np.zeros(m.columns) for m in several]
                arrays[f"{name}_{'min' if bound == 'low' else 'max'}"] = np.stack(values)
        content = npz_bytes(arrays)
        write_bytes(out / STATISTICS_FILE, content)
        return {
            MEAN_FRAME_FILE: save_array(out / MEAN_FRAME_FILE, mean.astype(np.float32)),
            STATISTICS_FILE: hashlib.sha256(content).hexdigest(),
        }


def merged(parts: Iterable[Parts]) -> Summary:
    """Return the statistics of a data set from those of its parts, at least one, in the order of the shards."""
    total: Summary | None = None
    for part in parts:
        rows = {name: [Moments.of(each) for each in part[name]] for name in _BY_PARTITION if name in part}
        one = Summary(Moments.of(part["channels"]), part["mean_frame_sum"], part["mean_frame_count"], rows)
        if total is None:
            total = one
            continue
        total.channels.merge(one.channels)
        total.mean_frame_sum = total.mean_frame_sum + one.mean_frame_sum
        total.mean_frame_count = total.mean_frame_count + one.mean_frame_count
        for name, several in rows.items():
            for mine, theirs in zip(total.rows[name], several, strict=True):
                mine.merge(theirs)
    if total is None:
        raise ValueError("there are no parts")
    return total


def npz_bytes(arrays: Parts) -> bytes:
    """Return an uncompressed .npz file, the same for the same arrays."""
    buffer = io.BytesIO()
    ordered: dict[str, Any] = {name: arrays[name] for name in sorted(arrays)}
    np.savez(buffer, **ordered)
    return buffer.getvalue()
