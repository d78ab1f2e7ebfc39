"""Sources of clips in memory, for tests of what comes after sources."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from data_pipeline.alignment import ActionAlignment, rows_needed
from data_pipeline.dtypes import SCALED, STORED_TYPES
from data_pipeline.errors import DataError, Problem
from data_pipeline.schema import Split
from data_pipeline.sources.base import ArraySpec, Listing, SkippedClip, SourceClip, SourceProvenance


@dataclass
class MemorySource:
    """Clips in memory. Instances can be pickled, as those of any source.

    Attributes:
        clips: As listed.
        arrays: Of each clip, by key and field.
        provenance: Of the features.
        bad: As listed.
        unreadable: Keys whose `read` fails.
        seconds: What one `read` takes.
    """

    clips: list[SourceClip]
    arrays: dict[str, dict[str, np.ndarray]]
    provenance: SourceProvenance = field(default_factory=lambda: SourceProvenance(encode_mode="per-frame"))
    bad: tuple[SkippedClip, ...] = ()
    unreadable: frozenset[str] = frozenset()
    seconds: float = 0.0
    kind: str = "memory"

    def listing(self) -> Listing:
        return Listing(tuple(self.clips), self.bad)

    def read(self, clip: SourceClip) -> dict[str, np.ndarray]:
        time.sleep(self.seconds)
        if clip.key in self.unreadable:
            raise DataError(Problem("source", clip.key, "the file ends too early", "copy it again"))
        return dict(self.arrays[clip.key])


def memory_source(
    num_clips: int = 10,
    *,
    heldout: int = 2,
    lengths: Sequence[int] = (4, 5, 5),
    frame: tuple[int, int] = (6, 16),
    dtype: str = "float16",
    states: int = 3,
    extrinsics: int = 0,
    action_dtype: str = "float32",
    alignment: ActionAlignment = "as-is",
    partitions: Sequence[str] = ("base", "ice"),
    values: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray] | None = None,
) -> MemorySource:
    """Return a source of random clips, always the same ones; each fifth key or so is heldout.

    Args:
        num_clips: Of all partitions and splits together; partitions take turns.
        heldout: Of them, the last ones.
        lengths: Stored frames, in turn.
        frame: Tokens and channels.
        dtype: Of the features: a name of `STORED_TYPES`, float64 or an integer type.
        states: Numbers in a state, 0 for none.
        extrinsics: Numbers in the extrinsics, 0 for none.
        action_dtype: Of the actions.
        alignment: Decides the number of rows of actions.
        partitions: Names.
        values: Draws features; standard normal numbers by default.
    """
    clips, arrays = [], {}
    for number in range(num_clips):
        random = np.random.default_rng([7, number])
        length, partition = lengths[number % len(lengths)], partitions[number % len(partitions)]
        split: Split = "train" if number < num_clips - heldout else "heldout"
        key = f"{partition}/clip_{number:05d}"
        shape = (length, *frame)
        features = random.normal(size=shape) * 3 if values is None else values(random, shape)
        found = stored_features(features, dtype)
        found["actions"] = (random.normal(size=(rows_needed(alignment, length)[0], 2)) * 9).astype(action_dtype)
        if states:
            found["states"] = random.normal(size=(length, states)).astype(np.float32)
        if extrinsics:
            found["extrinsics"] = random.normal(size=(length - 1, extrinsics)).astype(np.float32)
        specs = {
            name: ArraySpec(dtype if name == "features" else array.dtype.name, array.shape)
            for name, array in found.items()
        }
        clips.append(SourceClip(key, partition, split, specs, f"stamp-{number}", f"row {number}"))
        arrays[key] = found
    return MemorySource(clips, arrays, SourceProvenance(encode_mode="per-frame", action_alignment=alignment))


def stored_features(values: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """Return features in a type, and their scale if it needs one."""
    if dtype == SCALED:
        scale = (np.abs(values).max((0, 1)) / 127).astype(np.float32)
        return {"features": np.rint(values / scale).astype(np.int8), "features_scale": scale}
    if dtype not in STORED_TYPES:
        return {"features": values.astype(dtype)}
    stored = STORED_TYPES[dtype]
    unsigned = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[stored.itemsize]
    return {"features": torch.from_numpy(values).to(stored.torch).view(unsigned).numpy().view(stored.numpy)}


def changed(source: MemorySource, which: str, **changes: object) -> MemorySource:
    """Return a source with another entry in the listing of one clip."""
    clips = [replace(clip, **changes) if clip.key == which else clip for clip in source.clips]
    return replace(source, clips=clips)


def with_arrays(source: MemorySource, key: str, arrays: Mapping[str, np.ndarray]) -> MemorySource:
    """Return a source that reads other values for one clip, of the types and shapes listed."""
    return replace(source, arrays={**source.arrays, key: {**source.arrays[key], **arrays}})
