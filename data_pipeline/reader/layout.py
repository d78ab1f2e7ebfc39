"""How a batch lies in one block of memory, so that the block can be filled from files and used again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.dtypes import SCALED, STORED_TYPES, StoredType
from data_pipeline.schema import Manifest

PAGE = 4096


@dataclass(frozen=True)
class BatchLayout:
    """Sizes of a batch and where its fields start.

    Attributes:
        clips: Most clips in a batch, B.
        frames: Stored frames, F.
        tokens: Patch tokens of a frame, N.
        channels: Channels of a token, E.
        dtype: Stored type of the features.
        action_dim: Numbers in an action, A.
        state_dim: Numbers in a state, S; 0 for none.
        extrinsics_dim: Numbers in extrinsics, X; 0 for none.
    """

    clips: int
    frames: int
    tokens: int
    channels: int
    dtype: str
    action_dim: int
    state_dim: int
    extrinsics_dim: int

    @classmethod
    def of(cls, manifest: Manifest, clips: int, frames: int) -> BatchLayout:
        """Return the layout of batches from a data set."""
        return cls(
            clips,
            frames,
            manifest.tokens,
            manifest.encoder_dim,
            manifest.dtypes["features"],
            manifest.action_dim,
            manifest.state_dim,
            manifest.extrinsics_dim,
        )

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame's features."""
        return self.tokens * self.channels * STORED_TYPES[self.dtype].itemsize

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one clip's part of each field there is."""
        shapes = {
            "features": (self.frames, self.tokens, self.channels),
            "features_scale": (self.channels,) if self.dtype == SCALED else (0,),
            "actions": (self.frames - 1, self.action_dim),
            "states": (self.frames, self.state_dim),
            "extrinsics": (self.frames - 1, self.extrinsics_dim),
        }
        return {name: shape for name, shape in shapes.items() if 0 not in shape}

    @cached_property
    def starts(self) -> dict[str, int]:
        """Byte at which each field starts, each on a page."""
        starts, at = {}, 0
        for name in self.shapes:
            starts[name] = at
            at += self.clips * self.sizes[name]
            at += -at % PAGE
        return starts

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of one clip's part of each field."""
        return {name: int(np.prod(shape)) * self._type(name).itemsize for name, shape in self.shapes.items()}

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the whole block."""
        last = next(reversed(self.shapes))
        end = self.starts[last] + self.clips * self.sizes[last]
        return end + -end % PAGE

    def clip_bytes(self, block: NDArray[np.uint8], name: str, row: int) -> NDArray[np.uint8]:
        """Return the bytes of one clip's part of a field."""
        start = self.starts[name] + row * self.sizes[name]
        return block[start : start + self.sizes[name]]

    def clip_array(self, block: NDArray[np.uint8], name: str, row: int) -> NDArray[np.float32]:
        """Return one clip's part of an f32 field."""
        return self.clip_bytes(block, name, row).view(np.float32).reshape(self.shapes[name])

    def tensors(self, block: NDArray[np.uint8], count: int) -> dict[str, Tensor]:
        """Return the fields of the first `count` clips as tensors that share, and keep alive, `block`."""
        whole = torch.from_numpy(block)
        fields = {}
        for name, shape in self.shapes.items():
            part = whole[self.starts[name] : self.starts[name] + count * self.sizes[name]]
            fields[name] = part.view(self._type(name).torch).view(count, *shape)
        return fields

    def decoded(self) -> BatchLayout:
        """Return the layout of the same batches with features in f32."""
        return replace(self, dtype="float32")

    def _type(self, name: str) -> StoredType:
        return STORED_TYPES[self.dtype if name == "features" else "float32"]
