"""The `optimizer` section of the configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

SECTION = ConfigDict(allow_inf_nan=False, extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

Algorithm = Literal["m3", "adamw"]
Beta = Annotated[float, Field(ge=0, lt=1)]


class MomentumLevel(BaseModel):
    """One time scale of M3's momentum."""

    model_config = SECTION

    period: PositiveInt = 1
    """Steps of its group between two updates of this level; gradients in between wait in its buffer."""
    eta: Beta = 0.95
    """Share of the momentum kept at an update."""
    theta: PositiveFloat = 0.05
    """Weight of the drained gradients at an update."""
    weight: float = 1.0
    """Weight of the level in the sum that is orthogonalised."""


class NewtonSchulzConfig(BaseModel):
    """How a matrix is orthogonalised."""

    model_config = SECTION

    coefficients: Literal["simple", "quintic"] = "quintic"
    """Named set of polynomial coefficients; see optim/newton_schulz.py for where each comes from."""
    steps: Annotated[int, Field(ge=1, le=20)] = 5
    """Iterations; past the end of the table it starts over."""


class AdamConfig(BaseModel):
    """AdamW's constants, for the groups that use it."""

    model_config = SECTION

    beta1: Beta = 0.9
    """Decay of the first moment per step."""
    beta2: Beta = 0.999
    """Decay of the second moment per step."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""


class GroupConfig(BaseModel):
    """What one group of parameters gets."""

    model_config = SECTION

    algorithm: Algorithm = "adamw"
    """m3 orthogonalises matrices; adamw works element by element."""
    lr_scale: NonNegativeFloat = 1.0
    """Factor on optimizer.lr for this group."""
    weight_decay: NonNegativeFloat | None = None
    """Decoupled decay per unit of learning rate; null takes optimizer.weight_decay."""
    period: PositiveInt = 1
    """Training steps for one step of this group, taken on the sum of their clipped gradients at the last one's rate."""


class GroupsConfig(BaseModel):
    """The groups that routing sorts parameters into (`optim/routing.py`)."""

    model_config = SECTION

    titan: GroupConfig = GroupConfig(weight_decay=0.0)
    """Titan memory matrices."""
    cms: GroupConfig = GroupConfig(algorithm="m3")
    """CMS matrices."""
    attention: GroupConfig = GroupConfig(algorithm="m3")
    """Attention and MLP matrices of S and T blocks."""
    projections: GroupConfig = GroupConfig(algorithm="m3")
    """Query, output, embedding and spatial-mixing matrices."""
    embeddings: GroupConfig = GroupConfig(weight_decay=0.0)
    """Position tables, and matrices with a side too short to orthogonalise."""
    vectors: GroupConfig = GroupConfig(weight_decay=0.0)
    """Biases and norms."""

    @model_validator(mode="before")
    @classmethod
    def _keep_what_is_not_given(cls, given: Any) -> Any:
        """A group of which some fields are given keeps its defaults here, not those of any group, for the others."""
        if not isinstance(given, dict):
            return given
        defaults = {name: field.default.model_dump(exclude_unset=True) for name, field in cls.model_fields.items()}
        return {
            name: defaults[name] | fields if name in defaults and isinstance(fields, dict) else fields
            for name, fields in given.items()
        }

    @model_validator(mode="after")
    def _vectors_by_adamw(self) -> GroupsConfig:
        for name in ("vectors", "embeddings"):
            if getattr(self, name).algorithm == "m3":
                raise ValueError(f"{name}.algorithm must be adamw: m3 orthogonalises matrices")
        return self


class ClipConfig(BaseModel):
    """Gradient clipping by norm, before the optimizer's momentum."""

    model_config = SECTION

    mode: Literal["per_group", "global", "none"] = "per_group"
    """per_group clips each optimizer group by its own norm, global all by one norm."""
    max_norm: PositiveFloat = 1.5
    """Largest norm of the whole, unsharded gradient of what is clipped together."""


class ScheduleConfig(BaseModel):
    """Learning rate over a run: warm-up, constant, decay."""

    model_config = SECTION

    warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the run's steps over which the rate rises linearly."""
    decay: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the run's steps over which the rate falls at the end."""
    shape: Literal["linear", "cosine"] = "linear"
    """How it falls."""
    start: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Factor on the rate at the first step of warm-up."""
    end: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Factor on the rate where decay would arrive one step after the last."""

    @model_validator(mode="after")
    def _phases_fit(self) -> ScheduleConfig:
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup={self.warmup} + decay={self.decay} must be at most 1")
        return self


class OptimizerConfig(BaseModel):
    """One optimizer, an algorithm per group."""

    model_config = SECTION

    lr: PositiveFloat = 2e-4
    """Base learning rate."""
    weight_decay: NonNegativeFloat = 0.04
    """Decoupled decay per unit of learning rate, for groups that set none of their own."""
    levels: Annotated[tuple[MomentumLevel, ...], Field(strict=False, min_length=1)] = (
        MomentumLevel(period=1, eta=0.9, theta=0.1),
        MomentumLevel(period=8, eta=0.99, theta=0.01),
    )
    """Time scales of M3's momentum, fastest first; the first must have period 1."""
    drain: Literal["sum", "mean"] = "mean"
    """Whether a slow level takes in the sum or the mean of the gradients that waited."""
    nesterov: bool = False
    """Looks one step ahead on the fastest level."""
    adjust: Literal["original", "match_rms_adamw", "spectral_unclamped"] = "match_rms_adamw"
    """Factor by matrix shape r x c: sqrt(max(1, r/c)), 0.2 sqrt(max(r, c)), or sqrt(r/c)."""
    newton_schulz: NewtonSchulzConfig = NewtonSchulzConfig()
    adam: AdamConfig = AdamConfig()
    groups: GroupsConfig = GroupsConfig()
    clip: ClipConfig = ClipConfig()
    schedule: ScheduleConfig = ScheduleConfig()

    @model_validator(mode="after")
    def _first_level_every_step(self) -> OptimizerConfig:
        if self.levels[0].period != 1:
            raise ValueError(f"levels[0].period={self.levels[0].period} must be 1: the fastest level steps every step")
        return self
