from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hopescale.model.objective_schema import ObjectiveConfig, PhaseConfig

ROLLOUT = {"weight": 1.0}
PLATEAU = {"patience": 10}


def broken(fields: dict[str, Any]) -> list[tuple[str, str]]:
    """Field and rule of every error."""
    with pytest.raises(ValidationError) as caught:
        ObjectiveConfig.model_validate(fields)
    return [
        (".".join([*(str(part) for part in error["loc"]), str(rule[0])]), str(rule[2]))
        for error in caught.value.errors()
        for rule in error.get("ctx", {}).get("problems", [("", "", error["msg"])])
    ]


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"teacher_weight": 0, "jump_weight": 0}, "teacher_weight", "all 0"),
        ({"huber_delta": 2.0}, "huber_delta", "ignored with loss=l1"),
        ({"huber_delta": 0.5, "loss": "l2"}, "huber_delta", "ignored with loss=l2"),
        ({"rollout": {"context": 2}}, "rollout.context", "ignored"),
        ({"rollout": {"steps": 3}}, "rollout.steps", "ignored"),
        ({"rollout": {"memory": "reset_every", "reset_every": 1}}, "rollout.memory", "ignored"),
        ({"rollout": ROLLOUT | {"memory": "reset_every"}}, "rollout.reset_every", "must be set"),
        ({"rollout": ROLLOUT | {"reset_every": 1}}, "rollout.reset_every", "ignored with memory=carry"),
        (
            {"rollout": ROLLOUT | {"memory": "reset_every", "reset_every": 2}},
            "rollout.reset_every",
            "at most 2 frames are predicted",
        ),
        ({"curriculum": [{"start": 3}]}, "curriculum.0.start", "changes nothing"),
        ({"curriculum": [{"jump_weight": 0.5}]}, "curriculum.0.start", "exactly one"),
        ({"curriculum": [{"jump_weight": 0.5, "start": 1, "plateau": PLATEAU}]}, "curriculum.0.start", "exactly one"),
        ({"curriculum": [{"jump_weight": 0, "teacher_weight": 0, "start": 1}]}, "curriculum.0", "all 0"),
        (
            {"curriculum": [{"start": 5, "jump_weight": 0.5}, {"start": 5, "jump_weight": 0.1}]},
            "curriculum.1.start",
            "must come after start=5",
        ),
        ({"curriculum": [{"start": 5, "rollout_steps": 3}]}, "curriculum.0.rollout_steps", "ignored"),
        (
            {"curriculum": [{"start": 5, "jump_weight": 0, "jump_horizons": 2}]},
            "curriculum.0.jump_horizons",
            "ignored",
        ),
        (
            {"curriculum": [{"start": 5, "rollout_steps": 3}, {"start": 6, "rollout_steps": 4, "rollout_weight": 1}]},
            "curriculum.0.rollout_steps",
            "ignored",
        ),
        (
            {"rollout": {"steps": 3}, "curriculum": [{"start": 5, "rollout_steps": 4, "rollout_weight": 1}]},
            "rollout.steps",
            "ignored",
        ),
        (
            {"curriculum": [{"plateau": PLATEAU, "jump_weight": 0}, {"start": 20, "jump_weight": 1}]},
            "curriculum.0.plateau",
            "cannot be seen before start=20",
        ),
        (
            {"teacher_weight": 0, "curriculum": [{"plateau": PLATEAU, "teacher_weight": 1}]},
            "curriculum.0.plateau",
            "teacher branch",
        ),
    ],
)
def test_settings_that_do_not_fit_or_would_be_ignored_are_named(fields: dict[str, Any], field: str, words: str) -> None:
    ((found, rule),) = broken(fields)
    assert found == field
    assert words in rule


@pytest.mark.parametrize(
    "fields",
    [
        {"loss": "huber", "huber_delta": 0.3},
        {"rollout": ROLLOUT | {"context": 3, "steps": 4, "memory": "reset_every", "reset_every": 3}},
        # A setting of the objective may wait for the phase that gives it a weight.
        {"rollout": {"steps": 3, "context": 2}, "curriculum": [{"start": 5, "rollout_weight": 1}]},
        {"teacher_weight": 0, "jump_weight": 0, "rollout": ROLLOUT},
        {"curriculum": [{"start": 0, "jump_weight": 0}, {"plateau": PLATEAU, "rollout_weight": 1, "rollout_steps": 3}]},
        {"curriculum": [{"plateau": PLATEAU, "jump_weight": 0}, {"start": 21, "jump_weight": 1, "jump_horizons": 1}]},
    ],
)
def test_settings_that_fit_are_taken(fields: dict[str, Any]) -> None:
    config = ObjectiveConfig.model_validate(fields)
    assert ObjectiveConfig.model_validate(config.model_dump(mode="json")) == config


values = st.floats(0, 2)
phase_changes = st.fixed_dictionaries(
    {"jump_weight": values},
    optional={
        "teacher_weight": st.floats(0.1, 2),
        "rollout_weight": st.floats(0.1, 2),
        "jump_horizons": st.integers(1, 4),
    },
)


@settings(max_examples=60, deadline=None)
@given(changes=st.lists(phase_changes, max_size=5), steps=st.integers(1, 6))
def test_a_phase_keeps_what_it_does_not_name(changes: list[dict[str, Any]], steps: int) -> None:
    # Steps and weights that are never 0, so that nothing is ignored.
    phases = [change | {"start": n, "rollout_steps": steps + n} for n, change in enumerate(changes)]
    phases = [phase | {"jump_weight": phase["jump_weight"] + 0.1} for phase in phases]
    config = ObjectiveConfig.model_validate({"rollout": ROLLOUT | {"context": 2}, "curriculum": phases})
    expected = {
        "teacher_weight": 1.0,
        "jump_weight": 1.0,
        "rollout_weight": 1.0,
        "rollout_steps": 2,
        "jump_horizons": 3,
    }
    for number, stage in enumerate(config.stages):
        expected |= {name: value for name, value in phases[number - 1].items() if name in expected} if number else {}
        assert stage.weights == {
            "teacher": expected["teacher_weight"],
            "jump": expected["jump_weight"],
            "rollout": expected["rollout_weight"],
        }
        assert (stage.rollout.steps, stage.jump_horizons) == (expected["rollout_steps"], expected["jump_horizons"])
        assert stage.scored["rollout"] == (2, 2 + expected["rollout_steps"])
        assert (stage.rollout.context, stage.curriculum) == (2, ())


def test_a_phase_may_change_every_weight_and_horizon_of_the_objective() -> None:
    changeable = {"teacher_weight", "jump_weight", "jump_horizons", "rollout_weight", "rollout_steps"}
    assert set(PhaseConfig.model_fields) == changeable | {"start", "plateau"}
