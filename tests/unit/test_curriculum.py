from __future__ import annotations

import json
import math
from bisect import bisect_right
from dataclasses import asdict
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from hopescale.checkpoint.contents import RunState
from hopescale.curriculum import Curriculum, Progress
from hopescale.model.objective_schema import ObjectiveConfig

few = settings(max_examples=80, deadline=None)


def objective(*phases: dict[str, Any]) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate({"curriculum": phases})


def weights(*starts: int) -> list[dict[str, Any]]:
    return [{"start": start, "jump_weight": 0.5 + number} for number, start in enumerate(starts)]


class Run:
    """Steps through a curriculum as the training loop does, with the surprise of every log step given."""

    def __init__(self, config: ObjectiveConfig, every: int) -> None:
        self.config, self.every, self.step = config, every, 0
        self.curriculum = Curriculum(config, Progress())
        self.phases: list[int] = []

    def advance(self, surprise: float) -> None:
        self.curriculum.arrive(self.step)
        self.phases.append(self.curriculum.progress.phase)
        waiting = self.curriculum.awaited is not None
        self.step += 1
        if waiting and self.step % self.every == 0:
            self.curriculum.see(self.step, surprise)

    def resume(self) -> None:
        """Go on from what a checkpoint of this step holds."""
        saved = json.dumps(RunState(curriculum=self.curriculum.progress).to_json())
        self.curriculum = Curriculum(self.config, RunState.from_json(json.loads(saved)).curriculum)


@few
@given(starts=st.lists(st.integers(0, 60), unique=True, max_size=5), resumed=st.sets(st.integers(0, 60)))
def test_phases_begin_at_their_steps_in_any_job(starts: list[int], resumed: set[int]) -> None:
    run = Run(objective(*weights(*sorted(starts))), every=7)
    for step in range(60):
        if step in resumed:
            run.resume()
        run.advance(0.0)
    assert run.phases == [bisect_right(sorted(starts), step) for step in range(60)]


def test_the_objective_is_that_of_the_phase() -> None:
    run = Run(objective(*weights(2, 4)), every=1)
    seen = []
    for _ in range(6):
        run.advance(0.0)
        seen.append(run.curriculum.objective.jump_weight)
    assert seen == [1.0, 1.0, 0.5, 0.5, 1.5, 1.5]


def begins(surprises: list[float], every: int = 2, **plateau: Any) -> int | None:
    """First step trained in the phase that waits for a plateau."""
    run = Run(objective({"plateau": plateau, "jump_weight": 0.0}), every)
    for surprise in surprises:
        run.advance(surprise)
    return run.phases.index(1) if 1 in run.phases else None


def test_a_surprise_that_stays_begins_the_phase_after_two_windows() -> None:
    assert begins([1.0] * 30, patience=6) == 12
    assert begins([1.0] * 30, patience=6, earliest=13) == 18
    assert begins([1.0] * 30, patience=6, earliest=18) == 18
    assert begins([0.0] * 30, patience=6) == 12


def test_only_log_steps_are_seen_and_those_of_a_window_are_averaged() -> None:
    # Odd steps are no log steps; windows of three log steps have the means 4, 3, 3.
    values = [9.0, 5.0, 9.0, 4.0, 9.0, 3.0, 0.0, 1.0, 0.0, 5.0, 0.0, 3.0, 0.0, 2.0, 0.0, 3.0, 0.0, 4.0, 0.0]
    assert begins(values, patience=6, min_fall=0.2) == 18
    assert begins(values, patience=6, min_fall=0.3) == 12


@few
@given(
    falls=st.lists(st.floats(0.0, 0.5), min_size=1, max_size=8),
    # The mean of so many equal numbers is that number, to the last bit.
    patience=st.sampled_from([1, 2, 4]),
    every=st.integers(1, 3),
    min_fall=st.sampled_from([0.0, 0.05, 0.2]),
)
def test_the_phase_begins_with_the_first_window_that_falls_too_little(
    falls: list[float], patience: int, every: int, min_fall: float
) -> None:
    means = [1.0]
    for fall in falls:
        means.append(means[-1] * (1 - fall))
    steps = patience * every
    expected = next(
        (
            (number + 1) * steps
            for number in range(1, len(means))
            if means[number] >= (1 - min_fall) * means[number - 1] and (number + 1) * steps < len(means) * steps
        ),
        None,
    )
    surprises = [mean for mean in means for _ in range(steps)]
    assert begins(surprises, every, patience=steps, min_fall=min_fall) == expected


@few
@given(
    surprises=st.lists(st.floats(0.0, 2.0), min_size=40, max_size=40),
    resumed=st.sets(st.integers(0, 39)),
    earliest=st.integers(0, 20),
    start=st.integers(25, 39),
)
def test_a_run_stopped_at_any_steps_goes_through_the_same_phases(
    surprises: list[float], resumed: set[int], earliest: int, start: int
) -> None:
    first = {"plateau": {"patience": 4, "min_fall": 0.1, "earliest": earliest}, "jump_weight": 0.0}
    second = {"plateau": {"patience": 2}, "rollout_weight": 1.0}
    config = objective(first, second, {"start": start, "jump_weight": 1.0})
    whole, stopped = Run(config, 2), Run(config, 2)
    for step, surprise in enumerate(surprises):
        if step in resumed:
            stopped.resume()
        whole.advance(surprise)
        stopped.advance(surprise)
    assert stopped.phases == whole.phases
    assert asdict(stopped.curriculum.progress) == asdict(whole.curriculum.progress)
    assert whole.phases == sorted(whole.phases)
    assert whole.phases[start:] == [3] * (40 - start)


def test_a_phase_that_has_begun_starts_its_windows_anew() -> None:
    plateaus = [{"plateau": {"patience": 4}, "jump_weight": 0.5}, {"plateau": {"patience": 4}, "jump_weight": 0.2}]
    run = Run(objective(*plateaus), every=2)
    for _ in range(20):
        run.advance(1.0)
    assert run.phases == [0] * 8 + [1] * 8 + [2] * 4


def test_a_start_ends_the_wait_for_plateaus_before_it() -> None:
    run = Run(
        objective({"plateau": {"patience": 4}, "teacher_weight": 0.5}, {"start": 11, "jump_weight": 0.5}), every=2
    )
    for step in range(20):
        run.advance(2.0**-step)
    assert run.phases == [0] * 11 + [2] * 9
    assert run.curriculum.objective.teacher_weight == 0.5
    assert run.curriculum.awaited is None


def test_a_surprise_that_is_no_number_is_no_plateau() -> None:
    assert begins([math.nan] * 7 + [1.0] * 30, patience=6, every=1) == 24
