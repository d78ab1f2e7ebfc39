"""The `objective` section of the configuration: what the predictor is trained to do, and how that changes in a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from .schema import SECTION, Rule, require

Branch = Literal["teacher", "jump", "rollout"]


class RolloutConfig(BaseModel):
    """Predicting several frames on, from predictions of the frames before."""

    model_config = SECTION

    weight: NonNegativeFloat = 0.0
    """Weight of predicting frames from the predictor's own predictions of the frames before; 0 does not run it."""
    context: PositiveInt = 1
    """True frames before the first predicted one (C)."""
    steps: PositiveInt = 2
    """Frames predicted and scored (R); all but the last are fed back."""
    memory: Literal["carry", "reset_every"] = "carry"
    """What a fed-back frame finds in memories and attention caches: carry all frames before it; reset_every a fresh
    start every so many predicted frames."""
    reset_every: PositiveInt | None = None
    """Predicted frames between two fresh starts; with memory=reset_every, and only then."""

    @model_validator(mode="after")
    def _resets_fit(self) -> RolloutConfig:
        every, resets = self.reset_every, self.memory == "reset_every"
        fix = "set memory=reset_every and reset_every together, or neither"
        require(
            [
                (every is None or resets, "reset_every", every, f"is ignored with memory={self.memory}", fix),
                (every is not None or not resets, "reset_every", every, "must be set with memory=reset_every", fix),
            ]
        )
        return self


class PlateauConfig(BaseModel):
    """When the memories' surprise counts as no longer falling."""

    model_config = SECTION

    patience: PositiveInt
    """Steps of a window, a multiple of metrics.every; its mean surprise is compared with that of the window before."""
    min_fall: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share by which the surprise must fall from one window to the next, not to be a plateau."""
    earliest: NonNegativeInt = 0
    """Optimizer step before which the phase does not begin."""


class PhaseConfig(BaseModel):
    """One phase of the curriculum: when it begins, and what of the objective it replaces from then on."""

    model_config = SECTION

    start: NonNegativeInt | None = None
    """Optimizer step at which the phase begins, and with it all phases before it."""
    plateau: PlateauConfig | None = None
    """Lets the phase begin when the surprise no longer falls, in place of a fixed step."""
    teacher_weight: NonNegativeFloat | None = None
    """New objective.teacher_weight; null keeps it."""
    jump_weight: NonNegativeFloat | None = None
    """New objective.jump_weight; null keeps it."""
    rollout_weight: NonNegativeFloat | None = None
    """New objective.rollout.weight; null keeps it."""
    rollout_steps: PositiveInt | None = None
    """New objective.rollout.steps; null keeps it."""
    jump_horizons: PositiveInt | None = None
    """New objective.jump_horizons for training; null keeps it. Evaluation keeps to the objective's own."""

    @property
    def changes(self) -> dict[str, Any]:
        """Named fields and their new values."""
        return {name: value for name, value in self if name not in ("start", "plateau") and value is not None}

    @model_validator(mode="after")
    def _begins_and_changes(self) -> PhaseConfig:
        names = ", ".join(name for name in type(self).model_fields if name not in ("start", "plateau"))
        given, rule = (self.start is not None) + (self.plateau is not None), "and plateau: exactly one must be set"
        require(
            [
                (given == 1, "start", self.start, rule, "say when the phase begins in one way"),
                (bool(self.changes), "start", self.start, "begins a phase that changes nothing", f"set one of {names}"),
            ]
        )
        return self


class ObjectiveConfig(BaseModel):
    """What the predictor is trained to do."""

    model_config = SECTION

    teacher_weight: NonNegativeFloat = 1.0
    """Weight of predicting every next frame from the true frames before it; 0 does not run it."""
    jump_weight: NonNegativeFloat = 1.0
    """Weight of predicting one late frame from the first ones and their actions; 0 does not run it."""
    jump_horizons: PositiveInt = 3
    """The jump's target is drawn evenly from this many last frames of the clip, those of the context left out."""
    jump_context: PositiveInt = 1
    """True frames the jump is made from, in evaluation too."""
    rollout: RolloutConfig = RolloutConfig()
    auxiliary_weight: NonNegativeFloat = 0.0
    """Weight of teaching keys and values, in the teacher branch, to be what the main memory recalls for each other; 0
    computes nothing."""
    loss: Literal["l1", "l2", "huber"] = "l1"
    """Distance between layer-normalised prediction and target."""
    huber_delta: PositiveFloat = 1.0
    """Distance at which loss=huber turns from square to linear."""
    curriculum: Annotated[tuple[PhaseConfig, ...], Field(strict=False)] = ()
    """Phases in the order they begin; each replaces what it names until a later one does."""

    @property
    def weights(self) -> Mapping[Branch, float]:
        """Weight of each branch."""
        return {"teacher": self.teacher_weight, "jump": self.jump_weight, "rollout": self.rollout.weight}

    @property
    def scored(self) -> Mapping[Branch, tuple[int, int | None]]:
        """Numbers of the frames each branch scores in a clip long enough: the first, and the one after the last.

        A jump scores one frame of every clip that goes on past its context, and is counted by the first one there.
        """
        first, start = self.jump_context, self.rollout.context
        return {"teacher": (1, None), "jump": (first, first + 1), "rollout": (start, start + self.rollout.steps)}

    def at_phase(self, number: int) -> ObjectiveConfig:
        """The objective once `number` phases have begun; it has no curriculum of its own."""
        changes = {name: value for phase in self.curriculum[:number] for name, value in phase.changes.items()}
        of_rollout = {
            name: changes.pop(f"rollout_{name}") for name in ("weight", "steps") if f"rollout_{name}" in changes
        }
        return self.model_copy(
            update={**changes, "rollout": self.rollout.model_copy(update=of_rollout), "curriculum": ()}
        )

    @property
    def stages(self) -> tuple[ObjectiveConfig, ...]:
        """The objective before its first phase, and after each has begun."""
        return tuple(self.at_phase(number) for number in range(len(self.curriculum) + 1))

    @property
    def waits_for_plateau(self) -> bool:
        """Whether a phase begins on a plateau."""
        return any(phase.plateau is not None for phase in self.curriculum)

    @model_validator(mode="after")
    def _settings_fit(self) -> ObjectiveConfig:
        stages = self.stages
        require([*self._branch_rules(stages), *self._rollout_rules(stages), *self._curriculum_rules(stages)])
        return self

    def _branch_rules(self, stages: tuple[ObjectiveConfig, ...]) -> Iterator[Rule]:
        for number, stage in enumerate(stages):
            yield (
                any(stage.weights.values()),
                f"curriculum.{number - 1}" if number else "teacher_weight",
                "a phase" if number else self.teacher_weight,
                "leaves teacher_weight, jump_weight and rollout.weight all 0",
                "set one of them above 0",
            )
        yield (
            not self.auxiliary_weight or any(stage.teacher_weight for stage in stages),
            "auxiliary_weight",
            self.auxiliary_weight,
            "is ignored where the teacher branch, which writes the memories, has no weight above 0",
            "leave it out, or set teacher_weight above 0",
        )
        yield (
            self.loss == "huber" or self.huber_delta == 1.0,
            "huber_delta",
            self.huber_delta,
            f"is ignored with loss={self.loss}",
            "leave it out, or set loss=huber",
        )

    def _rollout_rules(self, stages: tuple[ObjectiveConfig, ...]) -> Iterator[Rule]:
        rollout, defaults = self.rollout, RolloutConfig()
        steps = [stage.rollout.steps for stage in stages if stage.rollout.weight]
        fix = "leave it out, or set a weight for the rollout"
        for name in ("context", "memory"):
            value = getattr(rollout, name)
            used = bool(steps) or value == getattr(defaults, name)
            yield used, f"rollout.{name}", value, "is ignored where no rollout has a weight above 0", fix
        used = rollout.steps == defaults.steps or 0 not in self._unused(stages, "rollout_steps", "rollout")
        yield used, "rollout.steps", rollout.steps, "is ignored where no rollout has a weight above 0", fix
        if rollout.reset_every is not None and steps:
            rule = f"never comes, for at most {max(steps)} frames are predicted"
            fix = "lower it, or set memory=carry"
            yield rollout.reset_every < max(steps), "rollout.reset_every", rollout.reset_every, rule, fix

    def _curriculum_rules(self, stages: tuple[ObjectiveConfig, ...]) -> Iterator[Rule]:
        starts = [(number, phase.start) for number, phase in enumerate(self.curriculum) if phase.start is not None]
        for (_, before), (number, start) in pairwise(starts):
            rule = f"must come after start={before}, that of a phase before it"
            yield start > before, f"curriculum.{number}.start", start, rule, "put the phases in order"
        horizons: tuple[tuple[str, Branch], ...] = (("rollout_steps", "rollout"), ("jump_horizons", "jump"))
        for name, branch in horizons:
            for number in self._unused(stages, name, branch):
                if number:
                    field, value = f"curriculum.{number - 1}.{name}", self.curriculum[number - 1].changes[name]
                    rule = f"is ignored where the {branch} has no weight above 0"
                    yield False, field, value, rule, f"leave it out, or set {branch}_weight"
        for number, phase in enumerate(self.curriculum):
            if phase.plateau is not None:
                before = max((start for n, start in starts if n < number), default=0)
                after = min((start for n, start in starts if n > number), default=None)
                seen = max(phase.plateau.earliest, before + 2 * phase.plateau.patience)
                field, value = f"curriculum.{number}.plateau", f"step {seen} or later"
                rule = f"cannot be seen before start={after} of a later phase, which begins this one too"
                yield after is None or seen < after, field, value, rule, "lower patience or earliest"
                rule = "is seen in the memory writes of the teacher branch, which has no weight before this phase"
                fix = "set teacher_weight above 0, or give the phase a start"
                yield stages[number].teacher_weight > 0, field, value, rule, fix

    def _unused(self, stages: tuple[ObjectiveConfig, ...], name: str, branch: Branch) -> list[int]:
        """Stages (0 the objective itself) whose value of a field is replaced before its branch has a weight."""
        setters = [0, *(number for number, phase in enumerate(self.curriculum, 1) if name in phase.changes)]
        return [
            first
            for first, end in pairwise([*setters, len(stages)])
            if not any(stage.weights[branch] for stage in stages[first:end])
        ]
