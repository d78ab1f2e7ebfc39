"""How a batch lies in one block of memory, so that the block can be filled from files and used again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.dtypes import SCALED, STORED_TYPES
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
        for name, shape in self.shapes.items():
            starts[name] = at
            at += self.clips * int(np.prod(shape)) * self._type(name).itemsize
            at += -at % PAGE
        return starts

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the whole block."""
        last = next(reversed(self.shapes))
        end = self.starts[last] + self.clips * int(np.prod(self.shapes[last])) * self._type(last).itemsize
        return end + -end % PAGE

    def clip_bytes(self, block: NDArray[np.uint8], name: str, row: int) -> NDArray[np.uint8]:
        """Return the bytes of one clip's part of a field."""
        size = int(np.prod(self.shapes[name])) * self._type(name).itemsize
        start = self.starts[name] + row * size
        return block[start : start + size]

    def clip_array(self, block: NDArray[np.uint8], name: str, row: int) -> NDArray[np.float32]:
        """Return one clip's part of an f32 field."""
        return self.clip_bytes(block, name, row).view(np.float32).reshape(self.shapes[name])

    def tensors(self, block: NDArray[np.uint8], count: int) -> dict[str, Tensor]:
        """Return the fields of the first `count` clips as tensors that share, and keep alive, `block`."""
        whole = torch.from_numpy(block)
        fields = {}
        for name, shape in self.shapes.items():
            kind = self._type(name)
            size = count * int(np.prod(shape)) * kind.itemsize
            fields[name] = whole[self.starts[name] : self.starts[name] + size].view(kind.torch).view(count, *shape)
        return fields

    def _type(self, name: str):
        return STORED_TYPES[self.dtype if name == "features" else "float32"]
