"""From arrays as people lay them out to the fields of a clip: one shape for each field, and lengths that agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from data_pipeline.alignment import ActionAlignment, rows_needed
from data_pipeline.dtypes import SCALED, STORED_TYPES
from data_pipeline.sources.base import ArraySpec
from data_pipeline.sources.stored import Seen

Grid = tuple[int, int]
REQUIRED = ("features", "actions")
_MEANT_BY = {"uint16": ("bfloat16", "uint16"), "uint8": ("float8_e4m3fn", "float8_e5m2", "uint8")}
_OTHER_SIZES = {256: 576, 576: 256}
"""Tokens of a frame that common encoders make: 16 x 16 and 24 x 24."""
FEATURES_DTYPES: tuple[str, ...] = tuple(name for names in _MEANT_BY.values() for name in names)
"""What unsigned integers in place of features may be said to be."""


class BadClip(ValueError):
    """Why a clip cannot be used: file, value and rule."""


@dataclass(frozen=True)
class Layout:
    """How a source's arrays are to be understood.

    Attributes:
        features_dtype: What unsigned integers in place of features are, one of `FEATURES_DTYPES`; None refuses them.
        tokens: Tokens of a frame; None where the arrays say it themselves.
        flat_tokens: Tokens of a frame in features `[F * N, E]` where `tokens` is None and the rows of all other fields
            are those of so many frames; None refuses such features.
        first_extrinsics: Take the first F - 1 rows of longer extrinsics.
        action_alignment: Decides how many rows of actions a clip needs.
    """

    features_dtype: str | None
    tokens: int | None
    flat_tokens: int | None
    first_extrinsics: bool
    action_alignment: ActionAlignment

    def specs(self, seen: Mapping[str, Seen], names: Mapping[str, str]) -> tuple[dict[str, ArraySpec], Grid | None]:
        """Return the normalised arrays of a clip, and rows and columns of its tokens where the features say them.

        Args:
            seen: Stored arrays by field.
            names: What a user calls each of them.

        Raises:
            BadClip: Shapes or types that are not those of a clip.
        """
        features, grid = self._features(seen, names["features"])
        frames = features.shape[0]
        if frames < 2:
            raise BadClip(f"{names['features']}: too few frames, {frames}: there is no transition in fewer than 2")
        specs = {"features": features}
        for field in sorted(set(seen) - {"features"}):
            rows = self._rows(field, seen[field], frames, names[field])
            specs[field] = ArraySpec(seen[field].dtype, (rows, *seen[field].shape[1:]), seen[field].fortran)
        self._check_scale(specs, names)
        return specs, grid

    def _features(self, fields: Mapping[str, Seen], name: str) -> tuple[ArraySpec, Grid | None]:
        seen = fields["features"]
        dtype, shape, grid = self._features_type(seen.dtype, name), seen.shape, None
        if len(shape) == 4:
            grid = (shape[1], shape[2])
            shape = (shape[0], shape[1] * shape[2], shape[3])
        elif len(shape) == 2:
            tokens = self.tokens or self.flat_tokens
            if tokens is None:
                rule = "two dimensions are read as [F * N, E] only when the option tokens says N"
                raise BadClip(f"{name}: features {list(shape)}: {rule}")
            if shape[0] % tokens:
                raise BadClip(f"{name}: features {list(shape)}: {shape[0]} rows are no whole frames of {tokens} tokens")
            if self.tokens is None:
                _check_guess(fields, name, tokens)
            shape = (shape[0] // tokens, tokens, shape[1])
        if len(shape) != 3 or min(shape) < 1:
            raise BadClip(f"{name}: features {list(seen.shape)}: must be [F * N, E], [F, N, E] or [F, H, W, E]")
        if self.tokens is not None and shape[1] != self.tokens:
            raise BadClip(f"{name}: its frames have {shape[1]} tokens, the option tokens says {self.tokens}")
        return ArraySpec(dtype, shape, seen.fortran), grid

    def _features_type(self, dtype: str, name: str) -> str:
        meant = _MEANT_BY.get(dtype)
        if meant is not None and self.features_dtype is None:
            rule = f"is it {' or '.join(meant)}? Say so with the option features_dtype"
            raise BadClip(f"{name}: features have type {dtype}: {rule}")
        if self.features_dtype is None:
            return dtype
        if meant is None or self.features_dtype not in meant:
            stored = next(kind for kind, names in _MEANT_BY.items() if self.features_dtype in names)
            rule = f"{self.features_dtype}, as the option features_dtype says, is stored as {stored}"
            raise BadClip(f"{name}: features have type {dtype}: {rule}")
        return self.features_dtype

    def _rows(self, field: str, seen: Seen, frames: int, name: str) -> int:
        shape = seen.shape
        if field == "features_scale":
            if len(shape) != 1 or seen.dtype != "float32":
                raise BadClip(f"{name}: features_scale is {seen.dtype} {list(shape)}: must be float32 [E]")
            return shape[0]
        if len(shape) != 2 or shape[1] < 1:
            raise BadClip(f"{name}: {field} {list(shape)}: must have two dimensions, one row each time")
        least, most = frames, frames
        if field == "actions":
            least, most = rows_needed(self.action_alignment, frames)
        elif field == "extrinsics":
            least, most = frames - 1, None if self.first_extrinsics else frames - 1
        if shape[0] < least or (most is not None and shape[0] > most):
            raise BadClip(f"{name}: {self._row_rule(field, shape[0], frames, least, most)}")
        return frames - 1 if field == "extrinsics" else shape[0]

    def _row_rule(self, field: str, rows: int, frames: int, least: int, most: int | None) -> str:
        wanted = f"{least}" if most == least else f"at least {least}"
        text = f"{field} have {rows} rows, and {frames} frames need {wanted}"
        if field == "actions":
            return f"{text} with provenance.action_alignment={self.action_alignment}"
        if field == "extrinsics" and rows > least:
            return f"{text}; extrinsics_rows=first takes the first ones"
        return text

    def _check_scale(self, specs: Mapping[str, ArraySpec], names: Mapping[str, str]) -> None:
        features, scale = specs["features"], specs.get("features_scale")
        if features.dtype == SCALED and scale is None:
            raise BadClip(f"{names['features']}: int8 features mean nothing without features_scale, float32 [E]")
        if scale is not None:
            if features.dtype != SCALED:
                raise BadClip(f"{names['features_scale']}: features_scale belongs to int8, not {features.dtype}")
            if scale.shape[0] != features.shape[2]:
                text = f"features_scale has {scale.shape[0]} channels, features have {features.shape[2]}"
                raise BadClip(f"{names['features_scale']}: {text}")


def _check_guess(fields: Mapping[str, Seen], name: str, tokens: int) -> None:
    """Check that nothing speaks against the usual number of tokens where nobody has said it.

    Raises:
        BadClip: Another usual number fits too, or a field has no rows of so many frames.
    """
    shape = fields["features"].shape
    frames, other = shape[0] // tokens, _OTHER_SIZES.get(tokens)
    text, fix = f"{name}: features {list(shape)} have no frames of their own", "say it with the option tokens"
    if other is not None and shape[0] % other == 0:
        raise BadClip(f"{text}: frames of {tokens} tokens would fit and frames of {other}; {fix}")
    # Recorded at stored frames or between them, or at two pixel frames for each stored one.
    usual = {frames - 1, frames, 2 * frames - 2, 2 * frames - 1, 2 * frames}
    for field in sorted(set(fields) - {"features", "features_scale"}):
        rows = fields[field].shape[0] if fields[field].shape else 0
        if rows not in usual:
            rule = f"with {tokens} tokens there would be {frames}, which {rows} rows of {field} do not confirm"
            raise BadClip(f"{text}: {rule}; {fix}")


def normalised(field: str, array: np.ndarray, spec: ArraySpec) -> np.ndarray:
    """Return an array in the shape of its spec, without a copy.

    Raises:
        BadClip: Its type or size is not the one that was listed.
    """
    stored = STORED_TYPES.get(spec.dtype)
    dtype = np.dtype(spec.dtype) if stored is None else stored.numpy
    if field == "extrinsics":
        array = array[: spec.shape[0]]
    same = array.dtype == dtype and array.size == int(np.prod(spec.shape, dtype=np.int64))
    if not same or (field != "features" and array.shape != spec.shape):
        raise BadClip(f"{field} are {array.dtype} {list(array.shape)}, and {dtype} {list(spec.shape)} were listed")
    return array.reshape(spec.shape)
