"""The data section of a configuration, and what a data set says about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from data_pipeline.alignment import ActionAlignment
from data_pipeline.checksum import ChecksumName

EncodeMode = Literal["per-frame", "prefix", "clip", "unknown"]
"""What step t was encoded from: its own frames; frames up to t; all frames (leaks the future); nobody recorded it."""

Split = Literal["train", "heldout"]
SPLITS: tuple[str, ...] = get_args(Split)
LEAKY_ENCODE_MODES: tuple[str, ...] = ("clip", "unknown")
MANIFEST_FORMAT = 2
FIELDS = ("actions", "extrinsics", "features", "features_scale", "states")
"""Every field a clip may have, as its members are named. features_scale is the f32 `[E]` of int8 features."""
ROW_FIELDS = ("actions", "extrinsics", "states")
"""Fields with a row of numbers a frame or transition."""


def row_shape(field: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of one frame or row of a field; all of features_scale, which has neither.

    Args:
        field: One of `FIELDS`.
        shape: Of the whole field.
    """
    return shape if field == "features_scale" else shape[1:]


StoredName = Literal["float32", "float16", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2"]


class _Section(BaseModel):
    model_config = ConfigDict(
        allow_inf_nan=False, extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class SelectConfig(_Section):
    """Which clips of the viewed partitions are read."""

    keys: str | None = None
    """Shell pattern that a clip's key must match, e.g. `clip_0*`; none takes every key."""

    first_key: str | None = None
    """Clips whose key sorts before this one are left out."""

    end_key: str | None = None
    """Clips whose key is this one or sorts after it are left out."""

    min_frames: Annotated[int, Field(ge=2)] = 2
    """Stored frames a clip must at least have."""

    max_frames: Annotated[int | None, Field(ge=2)] = None
    """Stored frames a clip may at most have; none sets no limit."""


class WindowConfig(_Section):
    """Samples cut from long clips that were encoded frame by frame."""

    frames: Annotated[int, Field(ge=2)]
    """Stored frames of each sample; clips with fewer are left out."""

    stride: Annotated[int, Field(ge=1)] = 1
    """Frames between the starts of two samples of a clip."""


class SourceConfig(_Section):
    """One part of a mixture."""

    view: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    """Names of the partitions this part draws from."""

    weight: Annotated[float, Field(gt=0)]
    """Share of all clips that come from this part, relative to the weights of the others."""

    clips: Annotated[int | None, Field(ge=1)] = None
    """Draw from this many clips only, chosen by the seed, as a replay buffer of that size does; none draws from all."""


class ReaderConfig(_Section):
    """How the training clips get into memory."""

    threads: Annotated[int | None, Field(ge=1, le=64)] = None
    """Threads of each rank that read shards; none takes one for each processor this rank may use, at most 4."""

    batches: Annotated[int, Field(ge=1, le=256)] = 4
    """Micro-batches that each rank reads ahead; with those of the current step, all that is kept in memory."""

    checksums: bool = True
    """Check every field's checksum; false trusts the disk and saves about a third of the reading time."""

    on_bad_clip: Literal["raise", "substitute", "mask"] = "raise"
    """A clip that stays unreadable after two retries ends the run, is replaced by one drawn by its position, or gets
    weight 0."""

    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 1e-4
    """Share of the view's clips, rounded up, that a rank may find bad before the run ends; for substitute and mask."""

    timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds that a step waits for its batch before the reader's state is shown and the run ends."""


class StagingConfig(_Section):
    """Copies of shards on the node."""

    folder: str | None = None
    """Folder on the node's own disk or in its memory that shards are copied to before they are read; none reads them
    where they are, which only local data sets allow."""

    max_bytes: Annotated[int | None, Field(ge=1)] = None
    """Bytes of shards that all processes of the node may keep there; the copy needed last makes room. None sets no
    limit."""


class DataConfig(_Section):
    """Which clips are read, and from where."""

    path: str | None = None
    """Folder or URL of the data set, the one that holds manifest.json; none lets the command choose or make one."""

    view: Annotated[tuple[str, ...] | None, Field(strict=False)] = None
    """Names of the partitions that are read; none reads all of them, in the order of the manifest."""

    select: SelectConfig = SelectConfig()
    """Which clips of the view are read."""

    window: WindowConfig | None = None
    """Cut samples out of long clips; none takes each clip from its first frame."""

    mixture: Annotated[tuple[SourceConfig, ...], Field(strict=False)] = ()
    """Parts that training clips are drawn from in exact shares; none draws evenly from the view."""

    mixture_block: Annotated[int, Field(ge=1)] = 100
    """Clips within which the shares of a mixture are kept to the nearest whole clip."""

    order: Literal["full", "windowed"] = "full"
    """full draws each epoch from all clips evenly; windowed goes through groups of `order_shards` shards, for shards
    that are fetched."""

    order_shards: Annotated[int, Field(ge=1)] = 16
    """Shards in one group of the windowed order."""

    tail: Literal["continuous", "drop", "pad_zero_weight"] = "continuous"
    """At an epoch's end a step goes on into the next epoch, is left out, or is filled up with clips of weight 0."""

    skip_list: str | None = None
    """File of clip keys, one a line, that are left out: what `hopescale data verify --quarantine` writes."""

    action_alignment: ActionAlignment | None = None
    """How recorded actions become one per transition; none does what the data set says."""

    allowed_schemes: Annotated[tuple[str, ...], Field(strict=False)] = ("file",)
    """URL schemes that `path` may have; a path without a scheme counts as file."""

    allow_leaky_features: bool = False
    """Accept features encoded from future frames, or in an unknown way, at the price of meaningless errors."""

    frames: Annotated[int | None, Field(ge=2)] = None
    """Stored frames used of each clip, counted from its first one; none uses all of them."""

    reader: ReaderConfig = ReaderConfig()
    """How the training clips get into memory."""

    staging: StagingConfig = StagingConfig()
    """Copies of shards on the node."""


@dataclass(frozen=True)
class ShardEntry:
    """One file of a data set that holds clips.

    Attributes:
        name: File name inside the manifest's `shard_folder`.
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
        features_digest: Digest of the features folder, or empty.
        source: Layout the clips were read from.
    """

    encoder: str
    weights_sha256: str
    encode_mode: EncodeMode
    preprocessing: str
    grid: tuple[int, int]
    pixels_digest: str
    features_digest: str
    source: str


@dataclass(frozen=True)
class Conversion:
    """What a change of type did to the features: over the same share of tokens as the statistics, of all clips.

    Attributes:
        from_dtype: Type in the source.
        to_dtype: Type in the shards.
        relative_rmse: Root of (sum of squared differences / sum of squares).
        relative_rmse_normalised: The same after LayerNorm of both.
        min_cosine: Smallest cosine between a token before and after.
        overflows: Values, of all tokens, that were finite before and not after; their clips were left out.
    """

    from_dtype: str
    to_dtype: str
    relative_rmse: float
    relative_rmse_normalised: float
    min_cosine: float
    overflows: int


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        format: Version of the layout on disk.
        fingerprint: sha256 over all clips and the provenance; the same whatever the number and size of shards.
        num_clips: Rows of the index.
        frames: Stored frames of the longest clip.
        tokens: Patch tokens of a frame.
        encoder_dim: Channels of a token.
        action_dim: Numbers in an action.
        state_dim: Numbers in a state; 0 when there are none.
        extrinsics_dim: Numbers in a camera's extrinsics; 0 when there are none.
        dtypes: Stored type of each field.
        action_alignment: How recorded actions become one per transition.
        checksum: Of every field in the index.
        container: What the shards are: tars, or one sharded zarr v3 group for analysis.
        shard_folder: Folder of the shards, relative to the manifest's; `.` for tars indexed where they are.
        seed: Seed of the shuffle before sharding.
        statistics_share: Share of the training tokens that stats.npz and the mean frame were made from.
        conversion: What changing the features' type did to them, if it was changed.
        provenance: Where the features come from.
        partitions: Clips of each split, by partition.
        shards: The files, in the order of the index.
        files: sha256 of the index columns, the keys, the statistics and the mean frame, by relative path.
    """

    format: int
    fingerprint: str
    num_clips: int
    frames: int
    tokens: int
    encoder_dim: int
    action_dim: int
    state_dim: int
    extrinsics_dim: int
    dtypes: dict[str, StoredName]
    action_alignment: ActionAlignment
    checksum: ChecksumName
    container: Literal["tar", "zarr"]
    shard_folder: str
    seed: int
    statistics_share: float
    conversion: Conversion | None
    provenance: Provenance
    partitions: dict[str, dict[str, int]]
    shards: tuple[ShardEntry, ...]
    files: dict[str, str]

    def row_shape(self, field: str) -> tuple[int, ...]:
        """Return the shape of one frame or row of a field; all of features_scale, which has neither."""
        return {
            "actions": (self.action_dim,),
            "extrinsics": (self.extrinsics_dim,),
            "features": (self.tokens, self.encoder_dim),
            "features_scale": (self.encoder_dim,),
            "states": (self.state_dim,),
        }[field]

    def shape(self, field: str, length: int, rows: int) -> tuple[int, ...]:
        """Return the shape of a field of one clip.

        Args:
            field: One of `FIELDS`.
            length: Stored frames of the clip.
            rows: Its recorded rows of actions.
        """
        if field == "features_scale":
            return self.row_shape(field)
        return ({"actions": rows, "extrinsics": length - 1}.get(field, length), *self.row_shape(field))
