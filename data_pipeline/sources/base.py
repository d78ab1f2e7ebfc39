"""What every source of clips offers: a listing made from headers alone, and the arrays of one clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from data_pipeline.alignment import ActionAlignment
from data_pipeline.schema import EncodeMode, Split


@dataclass(frozen=True)
class ArraySpec:
    """Type and shape of one array, known before it is read.

    Attributes:
        dtype: A name of `dtypes.STORED_TYPES`, or float64 or an integer type that is converted when it is stored.
        shape: After the source's layout was normalised: features `[F, N, E]`, actions `[rows, A]`, states `[F, S]`,
            extrinsics `[F - 1, X]`.
        fortran: Whether its first axis varies fastest in the source; it is read in C order all the same.
    """

    dtype: str
    shape: tuple[int, ...]
    fortran: bool = False


@dataclass(frozen=True)
class SourceClip:
    """One clip of a source.

    Attributes:
        key: Unique name; `shard.tar.is_valid_key` holds for it.
        partition: Group that views select by.
        split: train or heldout, or None where the source does not say.
        arrays: By field: features and actions, optionally states, extrinsics and features_scale.
        stamp: Changes whenever the clip's files do: sizes and times, or a hash where the source has one.
        where: Of the clip inside its source, for errors and for reading; a path relative to the source, or a row.
        places: Of the clip's arrays in the file they share, so that it is not searched again; their meaning is the
            source's own.
    """

    key: str
    partition: str
    split: Split | None
    arrays: Mapping[str, ArraySpec]
    stamp: str
    where: str
    places: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Stored frames, F."""
        return self.arrays["features"].shape[0]


@dataclass(frozen=True)
class SourceProvenance:
    """Where a source's features come from, as far as it knows.

    Attributes:
        encoder: Encoder id, or `unknown`.
        weights_sha256: Hex digest of the encoder's weights, or empty.
        encode_mode: Which frames each feature was computed from.
        preprocessing: What was done to pixels before the encoder, or `unknown`.
        grid: Patch rows and columns; None takes a square one from the number of tokens, or 1 x N.
        pixels_digest: Of the pixels, or empty.
        features_digest: Of the features folder, or empty.
        action_alignment: How stored actions become one per transition.
    """

    encoder: str = "unknown"
    weights_sha256: str = ""
    encode_mode: EncodeMode = "unknown"
    preprocessing: str = "unknown"
    grid: tuple[int, int] | None = None
    pixels_digest: str = ""
    features_digest: str = ""
    action_alignment: ActionAlignment = "as-is"


@dataclass(frozen=True)
class SkippedClip:
    """A clip that its source lists but cannot offer, and why."""

    key: str
    where: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """All clips of a source, in a fixed order, and those that could not be listed."""

    clips: Sequence[SourceClip]
    bad: Sequence[SkippedClip] = field(default_factory=tuple)


class Source(Protocol):
    """A place that holds clips. Instances can be pickled: worker processes read from their own copy."""

    kind: str
    """Name of the layout, as in the manifest."""

    provenance: SourceProvenance

    def listing(self) -> Listing:
        """Return every clip, from headers alone: no payload is read.

        Raises:
            DataError: The source as a whole cannot be used. A single bad clip goes to `Listing.bad`.
        """
        ...

    def read(self, clip: SourceClip) -> dict[str, np.ndarray]:
        """Return the arrays of a clip: C-ordered, of the listed shapes, values as the source holds them.

        bfloat16 and fp8 come as unsigned integers of the same width.

        Raises:
            DataError: A file is missing, truncated, or not what its header says; the file is named.
        """
        ...
