"""Stored number types: names, how .npy files spell them, and which torch type they are.

numpy has no bfloat16 and no fp8: such values are stored as unsigned integers of the same width, and the manifest says
what they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch


@dataclass(frozen=True)
class StoredType:
    """One type that values may have on disk.

    Attributes:
        name: As in the manifest.
        descr: As in the header of a .npy file, little-endian.
        torch: The same type in torch.
        itemsize: Bytes of one number.
    """

    name: str
    descr: str
    torch: torch.dtype
    itemsize: int

    @property
    def numpy(self) -> np.dtype:
        """The numpy type of the same bytes."""
        return np.dtype(self.descr)


_TYPES = (
    StoredType("float32", "<f4", torch.float32, 4),
    StoredType("float16", "<f2", torch.float16, 2),
    StoredType("bfloat16", "<u2", torch.bfloat16, 2),
    StoredType("int8", "|i1", torch.int8, 1),
    StoredType("float8_e4m3fn", "|u1", torch.float8_e4m3fn, 1),
    StoredType("float8_e5m2", "|u1", torch.float8_e5m2, 1),
)
STORED_TYPES = MappingProxyType({stored.name: stored for stored in _TYPES})
"""By name. int8 features come with a scale per channel, in the field `features_scale`."""

SCALED = "int8"
"""The type whose numbers mean nothing without their scale."""
