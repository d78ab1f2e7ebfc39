from __future__ import annotations

from collections.abc import Callable

import pytest

from hopescale.errors import ConfigError, Problem, UserError
from hopescale.resilience.control_word import LEAST_SECONDS_LEFT, ControlWord, Interrupted
from hopescale.resilience.preemption import Stop, StopRequests

pytestmark = pytest.mark.usefixtures("one_rank")


class Wishes(StopRequests):
    """What a test wishes."""

    def __init__(self, stop: Stop = Stop.NO, *, save: bool = False, left: float = float("inf")) -> None:
        super().__init__(None)
        self.wishes = (stop, save, left)
        self.grants: list[dict[str, bool]] = []

    stop = property(lambda self: self.wishes[0])
    save = property(lambda self: self.wishes[1])
    seconds_left = property(lambda self: self.wishes[2])

    def granted(self, *, stop: bool = False, save: bool = False) -> None:
        self.grants.append({"stop": stop, "save": save})


def speak(control: ControlWord) -> ControlWord:
    with control.word(0):
        pass
    return control


@pytest.mark.parametrize("stop", list(Stop))
def test_the_wish_of_a_rank_is_that_of_all(stop: Stop) -> None:
    assert speak(ControlWord(Wishes(stop))).stop is stop


def test_a_stop_stays() -> None:
    wishes = Wishes(Stop.SIGNAL)
    control = speak(ControlWord(wishes))
    wishes.wishes = (Stop.NO, False, float("inf"))
    assert speak(control).stop is Stop.SIGNAL


def test_a_wish_to_save_stays_until_somebody_saves() -> None:
    wishes = Wishes(save=True)
    control = speak(ControlWord(wishes))
    wishes.wishes = (Stop.NO, False, float("inf"))
    assert speak(control).save
    assert wishes.grants == [{"stop": False, "save": True}]


@pytest.mark.parametrize(
    ("pause", "left", "stops"),
    [
        (1.0, LEAST_SECONDS_LEFT + 1, False),
        (1.0, LEAST_SECONDS_LEFT - 1, True),
        (100.0, 201.0, False),
        (100.0, 199.0, True),
    ],
)
def test_a_job_keeps_time_for_two_of_its_longest_steps(pause: float, left: float, stops: bool) -> None:
    clock = [0.0]
    wishes = Wishes(left=1e6)
    control = ControlWord(wishes, now=lambda: clock[0])
    speak(control)
    clock[0] += pause
    wishes.wishes = (Stop.NO, False, left)
    assert (speak(control).stop is Stop.TIME) == stops


def test_what_fails_in_a_word_is_raised_after_it() -> None:
    problem = Problem("shard", "a", "is gone", "bring it back")
    with pytest.raises(UserError) as failed, ControlWord(Wishes()).word(0):
        raise ConfigError(problem)
    assert failed.value.problems == (problem,)


def test_other_errors_pass_at_once() -> None:
    with pytest.raises(ZeroDivisionError), ControlWord(Wishes(Stop.SIGNAL)).word(0):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("stop", "block", "interrupts"),
    [
        (Stop.SIGNAL, ControlWord.part_of_evaluation, True),
        (Stop.NO, ControlWord.part_of_evaluation, False),
        (Stop.SIGNAL, ControlWord.word, False),
    ],
)
def test_an_evaluation_is_cut_off_and_a_step_is_not(stop: Stop, block: Callable, interrupts: bool) -> None:
    def evaluate() -> None:
        with block(ControlWord(Wishes(stop)), 0):
            pass

    if interrupts:
        with pytest.raises(Interrupted):
            evaluate()
    else:
        evaluate()
