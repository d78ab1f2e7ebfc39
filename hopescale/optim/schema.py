"""The `optimizer` section of the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from hopescale.model.schema import Rule, require

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
    (CUDA, CPUs with AVX-512 BF16 or AMX), which is where auto takes it, unless plan.strategy=gram or a restart is set:
    these are fp32's, and so is auto then; fp32 gives the same on every machine."""
    restart: Annotated[int, Field(ge=0, le=5)] = 0
    """In the Gram form, iterations after which the Gram matrix is computed anew; 0 for 5, the most that fp32 allows."""


class PlanConfig(BaseModel):
    """How Newton-Schulz of sharded or replicated matrices is divided among ranks (`optim/planner.py`)."""

    model_config = SECTION

    strategy: Literal["auto", "local", "owner", "replicated", "gram", "gather", "block_periodic"] = "auto"
    """auto considers local, owner, replicated for whole matrices that several ranks hold, and in fp32 gram, for those
    over 1.5 times as long as wide whose long side alone is cut and for which it sends fewer bytes than owner; of these
    it takes the fastest by the cost model. It never takes gather, which repeats all work on every rank, or
    block_periodic, which is inexact: each rank orthogonalises its own pieces, and whole matrices only every
    block_period steps, which must be given."""
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
    """Cost model: operations a second of one rank's Newton-Schulz in fp32; null for the device's usual."""
    flops_bf16: PositiveFloat | None = None
    """Cost model: operations a second of one rank's Newton-Schulz in bf16; null for the device's usual."""

    SHORT_FORM: ClassVar[str] = "strategy"
    """Field that a word for the whole section is for: `optimizer.plan=owner` sets the strategy and nothing else."""

    @model_validator(mode="before")
    @classmethod
    def _strategy_alone(cls, given: Any) -> Any:
        return {cls.SHORT_FORM: given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _block_period_where_used(self) -> PlanConfig:
        periodic, period = self.strategy == "block_periodic", self.block_period
        missing = "is missing: strategy=block_periodic needs the steps from one exact step to the next"
        surplus = f"is of strategy=block_periodic alone, and the strategy is {self.strategy}"
        require(
            [
                (
                    not periodic or period is not None,
                    "block_period",
                    period,
                    missing,
                    "set optimizer.plan.block_period=5, say",
                ),
                (periodic or period is None, "block_period", period, surplus, "leave it out, or set that strategy"),
            ]
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
        rule = "is adamw's, and this group's algorithm is m3, whose momentum is optimizer.levels"
        betas = {"beta1": self.beta1, "beta2": self.beta2}
        require((self.algorithm != "m3" or b is None, name, b, rule, "leave it out") for name, b in betas.items())
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
        kinds = {name: getattr(self, name).algorithm for name in ("vectors", "embeddings")}
        rule = "must be adamw: m3 orthogonalises matrices"
        require((kind != "m3", f"{name}.algorithm", kind, rule, "leave it out") for name, kind in kinds.items())
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
        rule = f"leaves no room for decay={self.decay}: of one run they may be at most 1 together"
        require([(self.warmup + self.decay <= 1, "warmup", self.warmup, rule, "lower one of them")])
        return self


class M3Config(BaseModel):
    """All that `M3` itself reads. Clipping, schedule and routing are no part of an optimizer: see `OptimizerConfig`."""

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
    """Time scales of M3's momentum; the first must have period 1, and the others any, in any order."""
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

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        require([*self._level_rules(), *self._form_rules(), *self._newton_schulz_rules()])
        return self

    def _level_rules(self) -> Iterator[Rule]:
        periods, offloaded = [level.period for level in self.levels], self.slow_levels == "offloaded"
        rule, fix = "must be 1: the first level steps every step", "put a level of period 1 before the others"
        yield periods[0] == 1, "levels.0.period", periods[0], rule, fix
        nested = self.buffers != "cascaded" or not any(slow % fast for fast, slow in pairwise(periods))
        rule = f"needs periods that divide each other in order, and the levels have {periods}"
        yield nested, "buffers", self.buffers, rule, "set optimizer.buffers=plain, or periods like 1, 4, 16"
        rule = f"needs buffers=cascaded, and they are {self.buffers}: else slow buffers would be touched every step"
        cascaded = not offloaded or self.buffers == "cascaded"
        yield cascaded, "slow_levels", self.slow_levels, rule, "set optimizer.buffers=cascaded, or leave it out"
        rule = f"needs a level with a period above 1, and the levels have {periods}"
        yield not offloaded or max(periods) > 1, "slow_levels", self.slow_levels, rule, "add a level, or leave it out"

    def _form_rules(self) -> Iterator[Rule]:
        given, rule = self.paper_form.model_dump(exclude_defaults=True), f"is ignored with form={self.form}"
        yield self.form == "paper" or not given, "paper_form", given, rule, "set optimizer.form=paper, or leave it out"
        fix = "leave it out, or begin with optimizer=m3_paper"
        for name in OF_LEVELS:
            value = getattr(self, name)
            used = self.form == "levels" or value == type(self).model_fields[name].default
            yield used, name, list(map(dict, value)) if name == "levels" else value, rule, fix

    def _newton_schulz_rules(self) -> Iterator[Rule]:
        strategy, (restart, steps) = self.plan.strategy, (self.newton_schulz.restart, self.newton_schulz.steps)
        rounded, bf16 = self.plan.gram_wire == "bf16", self.newton_schulz.precision == "bf16"
        used, rule = not rounded or strategy in ("auto", "gram"), f"is ignored with plan.strategy={strategy}"
        yield used, "plan.gram_wire", "bf16", rule, "leave it out"
        rule = f"needs newton_schulz.restart of 1 or 2, below its steps, and has restart={restart}, steps={steps}: "
        rule += "without, a rounded Gram matrix blows up"
        allowed = not rounded or not used or (1 <= restart <= 2 and restart < steps)
        yield allowed, "plan.gram_wire", "bf16", rule, "set optimizer.newton_schulz.restart=2, or leave it out"
        rule = "is ignored with plan.strategy=gram, which computes in fp32"
        yield strategy != "gram" or not bf16, "newton_schulz.precision", "bf16", rule, "leave it out"
        rule = "is ignored with newton_schulz.precision=bf16, whose plain form computes every Gram matrix anew"
        yield (
            not restart or not bf16,
            "newton_schulz.restart",
            restart,
            rule,
            "leave it out, or set optimizer.newton_schulz.precision=fp32",
        )


OF_LEVELS = ("levels", "drain", "nesterov", "buffers", "slow_levels")
"""Settings of form=levels alone."""


class OptimizerConfig(M3Config):
    """One optimizer, an algorithm per group, and what a training step does around it.

    `M3` reads none of the fields that this adds: `parameter_groups` reads `groups` and `routes`, and the training step
    clips and sets the rates.
    """

    groups: GroupsConfig = GroupsConfig()
    routes: Annotated[tuple[RouteConfig, ...], Field(strict=False)] = ()
    """Rules that come before the built-in ones, first match first; each must name a parameter."""
    clip: ClipConfig = ClipConfig()
    schedule: ScheduleConfig = ScheduleConfig()
