"""Which type computes what: products in autocast's type, everything that is carried or compared in fp32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """Type of matrix products: autocast's where it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def at_least_fp32(x: Tensor) -> Tensor:
    """The same in fp32, or as it is in fp64."""
    return x if x.dtype == torch.float64 else x.float()
