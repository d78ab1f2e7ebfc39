"""The data section of a configuration, and what a data set says about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

EncodeMode = Literal["per-frame", "prefix", "clip", "unknown"]
"""What step t was encoded from: its own frames; frames up to t; all frames (leaks the future); nobody recorded it."""

Split = Literal["train", "heldout"]
SPLITS: tuple[str, ...] = get_args(Split)
LEAKY_ENCODE_MODES: tuple[str, ...] = ("clip", "unknown")
MANIFEST_FORMAT = 1


class DataConfig(BaseModel):
    """Which clips are read, and from where."""

    model_config = ConfigDict(
        allow_inf_nan=False, extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    path: str | None = None
    """Folder of the data set, the one that holds manifest.json; none lets the command choose or make one."""

    view: Annotated[tuple[str, ...] | None, Field(strict=False)] = None
    """Names of the partitions that are read; none reads all of them, in the order of the manifest."""

    allowed_schemes: Annotated[tuple[str, ...], Field(strict=False)] = ("file",)
    """URL schemes that `path` may have; a path without a scheme counts as file."""

    allow_leaky_features: bool = False
    """Accept features encoded from future frames, or in an unknown way, at the price of meaningless errors."""

    frames: Annotated[int | None, Field(ge=2)] = None
    """Stored frames used of each clip, counted from its first one; none uses all of them."""


@dataclass(frozen=True)
class ShardEntry:
    """One tar file of a data set.

    Attributes:
        name: File name inside `shards/`.
        bytes: File size in bytes.
        num_clips: Clips inside.
        sha256: Hex digest of the file.
    """

    name: str
    bytes: int
    num_clips: int
    sha256: str


@dataclass(frozen=True)
class Provenance:
    """Where the features come from.

    Attributes:
        encoder: Encoder id.
        weights_sha256: Hex digest of the encoder's weights file.
        encode_mode: Which frames each feature was computed from.
        preprocessing: What was done to pixels before the encoder.
        grid: Patch rows and columns; their product is the number of tokens.
        pixels_digest: Digest of the pixels folder.
        features_digest: Digest of the features folder.
    """

    encoder: str
    weights_sha256: str
    encode_mode: EncodeMode
    preprocessing: str
    grid: tuple[int, int]
    pixels_digest: str
    features_digest: str


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        format: Version of the layout on disk.
        fingerprint: sha256 over all clips and the provenance; the same whatever the number and size of shards.
        frames: Stored frames of the longest clip.
        tokens: Patch tokens of a frame.
        encoder_dim: Channels of a token.
        action_dim: Numbers in an action.
        state_dim: Numbers in a state; 0 when there are none.
        dtypes: Stored type of each field.
        seed: Seed of the shuffle before sharding.
        provenance: Where the features come from.
        partitions: Clips of each split, by partition.
        shards: The tar files, in the order of the index.
        files: sha256 of the index columns, the keys and the mean frame, by path relative to the folder.
    """

    format: int
    fingerprint: str
    frames: int
    tokens: int
    encoder_dim: int
    action_dim: int
    state_dim: int
    dtypes: dict[str, Literal["float16", "float32"]]
    seed: int
    provenance: Provenance
    partitions: dict[str, dict[str, int]]
    shards: tuple[ShardEntry, ...]
    files: dict[str, str]
