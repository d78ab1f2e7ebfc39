"""The `optimizer` section of the configuration."""

from __future__ import annotations

from itertools import pairwise
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

    coefficients: Literal["simple", "quintic", "polar_express", "deepseek_v4", "cubic"] = "quintic"
    """Named set of polynomial coefficients; see optim/newton_schulz.py for where each comes from."""
    steps: Annotated[int, Field(ge=1, le=20)] = 5
    """Iterations; past the end of the table it starts over, or repeats the last where that is made for it."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of its matrix products: bf16 errs by 1e-2 and is several times faster where the device multiplies bf16 itself
    (CUDA, CPUs with AVX-512 BF16 or AMX), which is where auto takes it; fp32 gives the same on every machine."""
    restart: Annotated[int, Field(ge=0, le=20)] = 0
    """In the Gram form, iterations after which the Gram matrix is computed anew; 0 for 5, which fp32 allows."""


class PlanConfig(BaseModel):
    """How Newton-Schulz of sharded or replicated matrices is divided among ranks (`optim/planner.py`)."""

    model_config = SECTION

    strategy: Literal["auto", "local", "owner", "replicated", "gram", "gather", "block_periodic"] = "auto"
    """auto takes the exact plan that the cost model finds fastest; block_periodic is inexact: each rank orthogonalises
    its own pieces, and whole matrices only every block_period steps."""
    bucket_mib: PositiveFloat = 64.0
    """Largest fp32 size in MiB of one rank's pieces that are exchanged at once; buckets overlap with each other."""
    gram_wire: Literal["fp32", "bf16"] = "fp32"
    """What Gram matrices travel in; bf16 needs newton_schulz.restart, without which their rounding blows up."""
    block_period: Annotated[int, Field(ge=2)] | None = None
    """Steps of a group between two exact ones with block_periodic, which alone takes it and cannot do without."""
    latency: NonNegativeFloat | None = None
    """Cost model: seconds of an exchange between the ranks that share a model's shards; null for the device's usual."""
    bandwidth: PositiveFloat | None = None
    """Cost model: bytes a second that a rank sends to those; null for the device's usual."""
    across_latency: NonNegativeFloat | None = None
    """Cost model: seconds of an exchange between replicas; null for the device's usual."""
    across_bandwidth: PositiveFloat | None = None
    """Cost model: bytes a second that a rank sends to other replicas; null for the device's usual."""
    flops: PositiveFloat | None = None
    """Cost model: operations a second of one rank's Newton-Schulz; null for the device's usual."""

    @model_validator(mode="before")
    @classmethod
    def _strategy_alone(cls, given: Any) -> Any:
        """`optimizer.plan=owner` is short for `optimizer.plan.strategy=owner`."""
        return {"strategy": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _block_period_where_used(self) -> PlanConfig:
        if (self.strategy == "block_periodic") != (self.block_period is not None):
            raise ValueError(
                f"block_period={self.block_period} with strategy={self.strategy}: block_periodic needs it, and no "
                "other strategy takes it"
            )
        return self


class PaperConfig(BaseModel):
    """M3 as printed (arXiv 2512.24695, Algorithm 1): a fast and a slow momentum, orthogonalised apart."""

    model_config = SECTION

    period: PositiveInt = 100
    """Steps of a group whose gradients the slow momentum takes in together; what comes of it acts from the next on."""
    alpha: NonNegativeFloat = 1.0
    """Weight of the orthogonalised slow momentum."""
    momentum: Literal["accumulate", "ema"] = "accumulate"
    """accumulate is the printed M += beta g, which never forgets; ema is M = beta M + (1 - beta) g."""
    beta1: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Of the fast momentum."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Of the second moment."""
    beta3: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Of the slow momentum."""
    denominator: Literal["none", "elementwise"] = "elementwise"
    """elementwise is the printed division by the second moment's root, after which the update is not orthogonal."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""


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
    beta1: Beta | None = None
    """Decay of adamw's first moment per step; null takes optimizer.adam.beta1."""
    beta2: Beta | None = None
    """Decay of adamw's second moment per step; null takes optimizer.adam.beta2."""
    period: PositiveInt = 1
    """Training steps for one step of this group, taken on the sum of their clipped gradients at the last one's rate."""

    @model_validator(mode="after")
    def _betas_are_of_adamw(self) -> GroupConfig:
        if self.algorithm == "m3" and (self.beta1 is not None or self.beta2 is not None):
            raise ValueError(
                "beta1 and beta2 are adamw's: this group's algorithm is m3, whose momentum is optimizer.levels"
            )
        return self


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


GroupName = Literal["titan", "cms", "attention", "projections", "embeddings", "vectors"]


class RouteConfig(BaseModel):
    """One more routing rule, tried before those of `optim/routing.py`."""

    model_config = SECTION

    pattern: str
    """Name of parameters, with * for any part of it."""
    group: GroupName
    """Group they go to."""


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
    form: Literal["levels", "paper"] = "levels"
    """levels sums momenta of any number of time scales and orthogonalises the sum; paper is `paper_form`."""
    paper_form: PaperConfig = PaperConfig()
    """For form=paper."""
    levels: Annotated[tuple[MomentumLevel, ...], Field(strict=False, min_length=1)] = (
        MomentumLevel(period=1, eta=0.9, theta=0.1),
    )
    """Time scales of M3's momentum, fastest first; the first must have period 1."""
    drain: Literal["sum", "mean"] = "mean"
    """Whether a slow level takes in the sum or the mean of the gradients that waited."""
    nesterov: bool = False
    """Looks one step ahead on the fastest level."""
    buffers: Literal["plain", "cascaded"] = "plain"
    """Whether a slow level's buffer takes in every gradient, or what the level before it drains: the same sums (up to
    rounding) in fewer passes, for periods that divide each other."""
    slow_levels: Literal["resident", "offloaded"] = "resident"
    """offloaded keeps three tensors a parameter on the device whatever the number of levels, and the rest in host
    memory until a slow level fires; needs cascaded buffers."""
    adjust: Literal["original", "match_rms_adamw", "spectral_unclamped"] = "match_rms_adamw"
    """Factor by matrix shape r x c: sqrt(max(1, r/c)), 0.2 sqrt(max(r, c)), or sqrt(r/c)."""
    newton_schulz: NewtonSchulzConfig = NewtonSchulzConfig()
    plan: PlanConfig = PlanConfig()
    adam: AdamConfig = AdamConfig()
    groups: GroupsConfig = GroupsConfig()
    routes: Annotated[tuple[RouteConfig, ...], Field(strict=False)] = ()
    """Rules that come before the built-in ones, first match first; each must name a parameter."""
    clip: ClipConfig = ClipConfig()
    schedule: ScheduleConfig = ScheduleConfig()

    @model_validator(mode="after")
    def _settings_fit_together(self) -> OptimizerConfig:
        periods = [level.period for level in self.levels]
        changed = {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
        strategy, precision = self.plan.strategy, self.newton_schulz.precision
        restart, rounded = self.newton_schulz.restart, self.plan.gram_wire == "bf16"
        rules = {
            f"levels[0].period={periods[0]} must be 1: the fastest level steps every step": periods[0] != 1,
            f"buffers=cascaded needs periods that divide each other in order; levels have {periods}": (
                self.buffers == "cascaded" and any(slow % fast for fast, slow in pairwise(periods))
            ),
            "slow_levels=offloaded needs buffers=cascaded, or slow buffers would be touched every step": (
                self.slow_levels == "offloaded" and self.buffers != "cascaded"
            ),
            f"slow_levels=offloaded needs a level with a period above 1; levels have {periods}": (
                self.slow_levels == "offloaded" and max(periods) == 1
            ),
            "paper_form is only used with form=paper": self.form == "levels" and "paper_form" in changed,
            f"form=paper does not use {', '.join(sorted(changed & OF_LEVELS))}; leave them out": (
                self.form == "paper" and bool(changed & OF_LEVELS)
            ),
            "plan.gram_wire=bf16 needs newton_schulz.restart of 1 or 2, below its steps: without, a rounded Gram "
            f"matrix blows up; restart={restart}, steps={self.newton_schulz.steps}": (
                rounded and not (1 <= restart <= 2 and restart < self.newton_schulz.steps)
            ),
            f"plan.gram_wire=bf16 is not used by plan.strategy={strategy}; leave it out": (
                rounded and strategy not in ("auto", "gram")
            ),
            "newton_schulz.precision=bf16 is not used by plan.strategy=gram, which computes in fp32; leave it out": (
                strategy == "gram" and precision == "bf16"
            ),
            f"newton_schulz.restart={restart} is not used by newton_schulz.precision=bf16, whose plain form computes "
            "every Gram matrix anew; leave it out": bool(restart) and precision == "bf16",
        }
        broken = [rule for rule, is_broken in rules.items() if is_broken]
        if broken:
            raise ValueError("; ".join(broken))
        return self


OF_LEVELS = {"levels", "drain", "nesterov", "buffers", "slow_levels"}
"""Settings of form=levels alone."""
