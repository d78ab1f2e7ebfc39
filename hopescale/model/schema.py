"""The `model` and `objective` sections of the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator
from pydantic_core import PydanticCustomError

SECTION = ConfigDict(allow_inf_nan=False, extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

BlockKind = Literal["S", "T", "H"]
MemoryName = Literal["key", "value", "eta", "alpha", "main"]
MEMORIES: tuple[MemoryName, ...] = ("key", "value", "eta", "alpha", "main")


class MemoryConfig(BaseModel):
    """The five self-modifying Titan memories of an H block."""

    model_config = SECTION

    heads: PositiveInt = 1
    """Independent slices of the width; each head has its own matrices, gates, step sizes and write limit."""
    hidden_multiplier: Annotated[float, Field(gt=0)] = 4.0
    """Hidden features of a memory per feature of width; times width / heads it must be whole."""
    chunk_size: PositiveInt = 1
    """Frames between two memory writes; reads inside a chunk see the memory as it was before the chunk."""
    meta_grad: Literal["fo", "fo_kv", "so"] = "fo_kv"
    """What the outer gradient sees of a write: fo step sizes and retention, fo_kv also keys and targets, so all."""
    eta_max: Annotated[float, Field(gt=0)] = 30.0
    """Largest summed step size of one write; a token's own step is at most eta_max / tokens in the chunk."""
    retention_bias: float = 4.0
    """Logit added to the retention gate; 4 keeps 98.2 % of a memory per chunk at initialisation."""
    write_limit: Annotated[float, Field(gt=0)] = 0.1
    """Upper bound of one write's norm as a share of the written matrix's norm, approached smoothly."""
    self_modify: Annotated[tuple[MemoryName, ...], Field(strict=False)] = MEMORIES
    """Memories that are written during a clip; the others are only read."""

    @field_validator("self_modify")
    @classmethod
    def _each_memory_once(cls, names: tuple[MemoryName, ...]) -> tuple[MemoryName, ...]:
        if len(set(names)) != len(names):
            raise ValueError("names each memory at most once")
        return names


class CmsLevel(BaseModel):
    """One level of the Continuum Memory System: a residual MLP with its own period."""

    model_config = SECTION

    period: PositiveInt = 1
    """The level is applied to frames whose number in the clip is a multiple of this."""
    hidden_multiplier: Annotated[float, Field(gt=0)] = 4.0
    """Hidden features of the level per feature of width; times width it must be whole."""


class CmsConfig(BaseModel):
    """The Continuum Memory System of an H block."""

    model_config = SECTION

    mode: Literal["frame_mask"] = "frame_mask"
    """How levels differ in pace: frame_mask applies a level only to every period-th frame."""
    levels: Annotated[tuple[CmsLevel, ...], Field(strict=False)] = (
        CmsLevel(period=1, hidden_multiplier=2.0),
        CmsLevel(period=3, hidden_multiplier=2.5),
        CmsLevel(period=7, hidden_multiplier=3.0),
    )
    """Levels in order of application, fastest first; an empty list leaves the CMS out."""


class AttentionConfig(BaseModel):
    """Attention of S and T blocks."""

    model_config = SECTION

    heads: PositiveInt = 16
    """Attention heads; must divide width, with an even number of at least 6 features a head for rotary positions."""
    mlp_multiplier: Annotated[float, Field(gt=0)] = 4.0
    """Hidden features of the MLP after attention per feature of width; times width it must be whole."""


class ModelConfig(BaseModel):
    """The predictor: shapes of its input, and what it is built from."""

    model_config = SECTION

    encoder_dim: PositiveInt = 1024
    """Channels of one stored token (E)."""
    grid: Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)] = (16, 16)
    """Rows and columns of patch tokens in a frame; their product is the tokens per frame (N)."""
    frames: Annotated[int, Field(ge=2)] = 8
    """Longest clip in stored frames (F); transitions are one fewer."""
    action_dim: PositiveInt = 2
    """Numbers in one action (A)."""
    state_dim: Annotated[int, Field(ge=0)] = 0
    """Numbers in one state (S); 0 leaves out the state token and its encoder."""
    width: PositiveInt = 384
    """Features of a token inside the predictor (D)."""
    block_pattern: Annotated[tuple[BlockKind, ...], Field(strict=False, min_length=1)] = ("S", "H", "S")
    """Blocks in order: S attention within each frame, T frame-causal attention over all frames, H HOPE."""
    memory: MemoryConfig = MemoryConfig()
    cms: CmsConfig = CmsConfig()
    attention: AttentionConfig = AttentionConfig()
    spatial_mixing: bool = False
    """Adds a learned mixing over the tokens of a frame to H blocks."""
    patch_position: Literal["none", "sincos"] = "none"
    """Adds fixed positions to patch tokens, for encoders whose features do not tell where a token lies."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Probability that a clip skips a branch of the last block; it falls linearly to 0 at the first block."""
    output: Literal["residual", "absolute"] = "residual"
    """Whether the predictor emits the change from the newest frame or the whole next frame."""

    @property
    def num_patches(self) -> int:
        """Patch tokens in a frame (N)."""
        return self.grid[0] * self.grid[1]

    @property
    def num_conditioning(self) -> int:
        """Conditioning tokens in a frame: the action's, and the state's where there is one."""
        return 1 + (self.state_dim > 0)

    @property
    def num_tokens(self) -> int:
        """All tokens in a frame (P)."""
        return self.num_patches + self.num_conditioning

    @model_validator(mode="after")
    def _sizes_fit(self) -> ModelConfig:
        broken = [rule for holds, *rule in self._size_rules() if not holds]
        if broken:
            # Each rule becomes an error of its own: the composer reads them from the context.
            text = "; ".join(f"{field}={value} {rule}" for field, value, rule, _ in broken)
            raise PydanticCustomError("rules", "{text}", {"text": text, "problems": broken})
        return self

    def _size_rules(self) -> Iterator[tuple[bool, str, object, str, str]]:
        """Holds or not, field, value, rule, fix."""
        width, memory, attention = self.width, self.memory, self.attention
        whole = f"times width={width} must be whole"
        yield (
            width % memory.heads == 0,
            "memory.heads",
            memory.heads,
            f"must divide width={width}",
            "change memory.heads or width",
        )
        yield (
            width % memory.heads > 0 or _whole(memory.hidden_multiplier * width / memory.heads),
            "memory.hidden_multiplier",
            memory.hidden_multiplier,
            f"times width / memory.heads = {width / memory.heads:g} must be whole",
            "change it, width or memory.heads",
        )
        for number, level in enumerate(self.cms.levels):
            multiplier = level.hidden_multiplier
            yield _whole(multiplier * width), f"cms.levels.{number}.hidden_multiplier", multiplier, whole, "change it"
        if set(self.block_pattern) & {"S", "T"}:
            size, rest = divmod(width, attention.heads)
            yield (
                rest == 0 and size % 2 == 0 and size >= 6,
                "attention.heads",
                attention.heads,
                f"must divide width={width} into an even number of at least 6 features a head",
                "change attention.heads or width",
            )
            multiplier = attention.mlp_multiplier
            yield _whole(multiplier * width), "attention.mlp_multiplier", multiplier, whole, "change it"


def _whole(value: float) -> bool:
    return abs(value - round(value)) < 1e-9 and round(value) >= 1


class ObjectiveConfig(BaseModel):
    """What the predictor is trained to do."""

    model_config = SECTION

    teacher_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of predicting every next frame from the true frames before it."""
    jump_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of predicting one late frame from the first frame and its action."""
    jump_horizons: PositiveInt = 3
    """The jump's target is drawn evenly from this many last frames of the clip."""
    loss: Literal["l1", "l2", "huber"] = "l1"
    """Distance between layer-normalised prediction and target; huber has its knee at 1."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> ObjectiveConfig:
        if self.teacher_weight == 0 and self.jump_weight == 0:
            raise ValueError("teacher_weight and jump_weight must not both be 0")
        return self
