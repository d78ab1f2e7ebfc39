"""Values from one number type to another, what the change does to features, and whether values are finite."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from data_pipeline.dtypes import SCALED, STORED_TYPES

FeatureType = Literal["keep", "float32", "float16", "bfloat16", "int8"]
"""How features are stored: as the source has them, or converted."""

FEATURE_TYPES: tuple[str, ...] = get_args(FeatureType)
LAYER_NORM_EPS = 1e-6
INTEGERS = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")

_INT8_MAX = 127
_FIRST_NOT_FINITE = {
    "float64": 0x7FF0_0000_0000_0000,
    "float32": 0x7F80_0000,
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float8_e5m2": 0x7C,
    "float8_e4m3fn": 0x7F,
}
"""Bits of the smallest positive pattern that is no finite number; all above it are none either."""

LARGEST = 1e17
"""Of features: the squares of a few hundred such numbers still have a sum in float32."""

_FIRST_TOO_LARGE = {
    "float64": int(np.float64(LARGEST).view(np.uint64)) + 1,
    "float32": int(np.float32(LARGEST).view(np.uint32)) + 1,
    "bfloat16": (int(np.float32(LARGEST).view(np.uint32)) >> 16) + 1,
}


@dataclass(frozen=True)
class Converted:
    """Features as they are stored.

    Attributes:
        values: `[F, N, E]`, bfloat16 as unsigned integers.
        scale: f32 `[E]` of int8, else none.
        overflows: Values that were finite before and are not any more.
    """

    values: np.ndarray
    scale: np.ndarray | None
    overflows: int


def all_finite(values: np.ndarray, name: str) -> bool:
    """Return whether an array holds neither infinities nor NaN.

    Read as integers, numbers of one sign sort by size with infinities and NaN last, so two maxima decide, at the speed
    of memory and without a copy.

    Args:
        values: C-ordered, of any shape; bfloat16 and fp8 as unsigned integers.
        name: Of their type; integers other than fp8 are always finite.
    """
    limit = _FIRST_NOT_FINITE.get(name)
    return limit is None or _bits_below(values, limit)


def all_below(values: np.ndarray, name: str) -> bool:
    """Return whether all magnitudes of an array are finite and at most `LARGEST`.

    Args:
        values: As for `all_finite`.
        name: Of their type; of integers only those of 64 bits may be larger.
    """
    if name in ("int64", "uint64"):
        return values.size == 0 or (float(values.max()) <= LARGEST and float(values.min()) >= -LARGEST)
    limit = _FIRST_TOO_LARGE.get(name)
    return all_finite(values, name) if limit is None else _bits_below(values, limit)


def _bits_below(values: np.ndarray, limit: int) -> bool:
    if values.size == 0:
        return True
    flat, size = values.reshape(-1), values.dtype.itemsize
    sign = 1 << (8 * size - 1)
    return int(flat.view(f"i{size}").max()) < limit and int(flat.view(f"u{size}").max()) < limit | sign


def first_not_finite(values: np.ndarray, name: str) -> tuple[tuple[int, ...], float]:
    """Return place and value of the first number of an array that is not finite.

    Raises:
        ValueError: All are finite.
    """
    wrong = ~torch.isfinite(tensor(values, name).float())
    if not wrong.any():
        raise ValueError("all values are finite")
    place = tuple(int(index) for index in np.argwhere(wrong.numpy())[0])
    return place, float(tensor(values, name).float()[place])


def tensor(values: np.ndarray, name: str) -> Tensor:
    """Return an array as a tensor of its own type, without a copy; nothing may be written to it.

    Args:
        values: C-ordered; bfloat16 and fp8 as unsigned integers.
        name: Of its type.
    """
    stored = STORED_TYPES.get(name)
    alias = torch.from_numpy(values if values.flags.writeable else np.asarray(_Writable(values)))
    return alias if stored is None else alias.view(stored.torch)


def as_float32(values: np.ndarray, name: str, scale: np.ndarray | None = None) -> Float[Tensor, ...]:
    """Return values as f32, int8 times its scale per channel.

    Args:
        values: C-ordered, channels last; bfloat16 and fp8 as unsigned integers.
        name: Of their type.
        scale: f32 `[E]` of int8.
    """
    numbers = tensor(values, name).float()
    return numbers if scale is None else numbers * tensor(scale, "float32")


def as_float64(values: np.ndarray, name: str, scale: np.ndarray | None = None) -> Float[Tensor, ...]:
    """Return the same as f64, for types that f32 does not hold."""
    numbers = tensor(values, name).double()
    return numbers if scale is None else numbers * tensor(scale, "float32").double()


def converted(values: np.ndarray, scale: np.ndarray | None, source: str, target: str) -> Converted:
    """Return features in another type, rounded to nearest, ties to even.

    int8 has one scale a channel and clip: the largest magnitude / 127, or 1 for a channel of zeros (or of numbers too
    small for a normal f32 scale, which become zeros).

    Args:
        values: C-ordered `[F, N, E]`, finite; bfloat16 and fp8 as unsigned integers.
        scale: f32 `[E]` if `values` are int8.
        source: Type of `values`.
        target: Type to store: float32, float16, bfloat16 or int8.
    """
    if target == SCALED:
        return _quantised(values, scale, source)
    kind = STORED_TYPES[target]
    out = torch.empty(values.shape, dtype=kind.torch)
    # Frame by frame: intermediate values stay in the processor's cache.
    for place, frame in enumerate(values):
        out[place] = as_float32(frame, source, scale)
    unsigned = {2: torch.int16, 4: torch.int32}[kind.itemsize]
    stored = out.view(unsigned).numpy().view(kind.numpy)
    overflows = 0 if all_finite(stored, target) else int((~torch.isfinite(out)).sum())
    return Converted(stored, None, overflows)


def rounded(values: np.ndarray, name: str) -> tuple[np.ndarray, int, float]:
    """Return values as f32, how many of them changed, and by how much at most, relative to the value.

    Args:
        values: Finite, C-ordered; bfloat16 and fp8 as unsigned integers.
        name: Of their type.
    """
    if name == "float32":
        return values, 0, 0.0
    with np.errstate(over="ignore"):
        exact = name in STORED_TYPES
        single = as_float32(values, name).numpy() if exact else values.astype(np.float32)
    if exact:
        return single, 0, 0.0
    before, after = values.astype(np.float64), single.astype(np.float64)
    changed = after != before
    largest = np.abs(after[changed] - before[changed]) / np.abs(before[changed])
    return single, int(changed.sum()), float(largest.max(initial=0.0))


class Deviation:
    """What a conversion did to features, summed over clips in a fixed order.

    Attributes:
        sums: f64 `[5]`: squared differences and squares before LayerNorm, the same after it, and the overflows.
        min_cosine: Smallest cosine between a token before and after.
    """

    def __init__(self, sums: np.ndarray | None = None, min_cosine: float = 1.0) -> None:
        self.sums = np.zeros(5) if sums is None else sums
        self.min_cosine = min_cosine

    def add(self, before: Float[Tensor, "n E"], after: Float[Tensor, "n E"], overflows: int = 0) -> None:
        """Compare tokens as they were with tokens as they are read back."""
        pairs = ((before, after), (layer_norm(before), layer_norm(after)))
        figures = [float((x - y).double().square().sum()) for x, y in pairs]
        squares = [float(x.double().square().sum()) for x, _ in pairs]
        self.sums += np.array([figures[0], squares[0], figures[1], squares[1], overflows])
        products, norms = (before * after).sum(-1), before.norm(dim=-1) * after.norm(dim=-1)
        cosines = (products / norms)[norms > 0]
        # A token that is lost altogether points nowhere.
        lost = bool(((norms == 0) & (before.norm(dim=-1) > 0)).any())
        smallest = 0.0 if lost else float(cosines.min()) if len(cosines) else 1.0
        self.min_cosine = min(self.min_cosine, smallest)

    def merge(self, other: Deviation) -> None:
        """Add what another part of the clips has found."""
        self.sums = self.sums + other.sums
        self.min_cosine = min(self.min_cosine, other.min_cosine)

    @property
    def relative_rmse(self) -> float:
        """Root of squared differences / squares."""
        return _ratio(self.sums[0], self.sums[1])

    @property
    def relative_rmse_normalised(self) -> float:
        """The same after LayerNorm of both."""
        return _ratio(self.sums[2], self.sums[3])


def layer_norm(features: Float[Tensor, "... E"]) -> Float[Tensor, "... E"]:
    """Return features normalised over E without affine parameters, eps 1e-6."""
    return F.layer_norm(features, features.shape[-1:], eps=LAYER_NORM_EPS)


def _ratio(difference: float, total: float) -> float:
    if total == 0:
        return 0.0 if difference == 0 else math.inf
    return math.sqrt(difference / total)


def _quantised(values: np.ndarray, scale: np.ndarray | None, source: str) -> Converted:
    largest = torch.zeros(values.shape[-1])
    for frame in values:
        largest = torch.maximum(largest, as_float32(frame, source, scale).abs().amax(0))
    overflows = int((~torch.isfinite(largest)).sum())
    if overflows:
        return Converted(np.zeros(values.shape, np.int8), np.ones(values.shape[-1], np.float32), overflows)
    steps = largest / _INT8_MAX
    steps = torch.where(steps >= torch.finfo(torch.float32).tiny, steps, torch.ones(()))
    out = torch.empty(values.shape, dtype=torch.int8)
    for place, frame in enumerate(values):
        out[place] = (as_float32(frame, source, scale) / steps).round_()
    return Converted(out.numpy(), steps.numpy(), 0)


class _Writable:
    """Lets torch alias a read-only array without a warning about writes that never happen."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        interface: dict[str, Any] = dict(values.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
