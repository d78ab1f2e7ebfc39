from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hopescale.errors import ConfigError, Problem
from hopescale.metrics.reliability_metrics import TIME_CLASSES
from hopescale.resilience.goodput import Goodput, process_age, read_history


class Times:
    """A monotonic and a wall clock that a test moves together, or apart."""

    def __init__(self) -> None:
        self.wall, self.monotonic = 1_000.0, 50.0

    def pass_by(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds

    def account(self, path: Path | None, incarnation: int = 0, age: float = 0.0) -> Goodput:
        return Goodput(path, incarnation, age=age, now=lambda: self.monotonic, clock=lambda: self.wall)


def step(account: Goodput, times: Times, number: int, seconds: float, *, skipped: bool = False) -> None:
    with account.stepping() as taken:
        times.pass_by(seconds)
        taken(number, skipped)


def test_every_second_belongs_to_one_class(tmp_path: Path) -> None:
    times = Times()
    account = times.account(tmp_path / "goodput.jsonl", age=3.0)
    times.pass_by(2.0)
    with account.spending("load"):
        times.pass_by(4.0)
    account.enter("other")
    step(account, times, 1, 8.0)
    with account.spending("data_wait"):
        times.pass_by(0.5)
    step(account, times, 2, 1.0)
    step(account, times, 2, 1.5, skipped=True)
    with account.spending("save"):
        times.pass_by(0.25)
    times.pass_by(0.125)
    assert account.seconds() == {
        "init": 5.0,
        "load": 4.0,
        "compile": 8.0,
        "step": 1.0,
        "lost_step": 1.5,
        "data_wait": 0.5,
        "save": 0.25,
        "restart_gap": 0.0,
        "other": 0.125,
    }


def test_a_run_that_goes_on_counts_the_gap_and_what_it_does_again(tmp_path: Path) -> None:
    path, times = tmp_path / "goodput.jsonl", Times()
    first = times.account(path)
    first.enter("other")
    for number in (1, 2, 3):
        step(first, times, number, 1.0)
    first.tell(3)
    step(first, times, 4, 1.0)  # killed before it could tell
    times.pass_by(100.0)
    second = times.account(path, 1, age=10.0)
    second.enter("other")
    for number in (2, 3, 4):
        step(second, times, number, 1.0)
    second.tell(4, "preempted")
    seconds = second.seconds()
    # From the last line, at 3 s, to 10 s before the second incarnation opened its account.
    assert seconds["restart_gap"] == pytest.approx(1.0 + 100.0 - 10.0)
    assert (seconds["init"], seconds["compile"], seconds["lost_step"], seconds["step"]) == (10.0, 2.0, 1.0, 3.0)
    history = read_history(path)
    assert (history.restarts, history.preemptions, history.step) == (1, 1, 4)
    assert history.until is not None
    assert history.began is not None
    assert sum(history.seconds.values()) == pytest.approx(history.until - history.began)


@given(
    spans=st.lists(st.tuples(st.sampled_from(TIME_CLASSES), st.floats(0, 1e5), st.booleans()), max_size=30),
    gaps=st.lists(st.floats(-1e4, 1e6), max_size=4),
)
def test_classes_add_up_to_the_time_of_all_incarnations(
    tmp_path_factory: pytest.TempPathFactory, spans: list[tuple[str, float, bool]], gaps: list[float]
) -> None:
    path, times = tmp_path_factory.mktemp("account") / "goodput.jsonl", Times()
    passed = 0.0
    for incarnation, gap in enumerate([0.0, *gaps]):
        times.wall += gap
        passed += max(gap, 0.0)
        account = times.account(path, incarnation)
        for kind, seconds, told in spans:
            if kind == "step":
                step(account, times, 1, seconds)
            else:
                with account.spending(kind):
                    times.pass_by(seconds)
            passed += seconds
            if told:
                account.tell(0)
        account.tell(0, "finished")
        # A clock that was set back has the next incarnation begin where this one ended.
        times.wall = max(times.wall, account.history.until or 0.0)
    assert sum(read_history(path).seconds.values()) == pytest.approx(passed, rel=1e-6, abs=1e-6)


def test_a_step_in_which_everything_stood_still_is_useful_for_as_long_as_steps_usually_take(tmp_path: Path) -> None:
    times = Times()
    account = times.account(tmp_path / "goodput.jsonl")
    account.enter("other")
    # The first one, which compiles, is no measure of those after it.
    step(account, times, 1, 60.0)
    for number in range(2, 12):
        step(account, times, number, 2.0)
    step(account, times, 12, 19.0)
    step(account, times, 13, 3600.0)
    seconds = account.seconds()
    assert (seconds["compile"], seconds["step"], seconds["other"]) == (60.0, 10 * 2.0 + 19.0 + 2.0, 3598.0)
    with account.settling():
        times.pass_by(5.0)
    assert account.seconds()["step"] == seconds["step"] + 5.0


def test_steps_that_have_become_longer_for_good_are_the_usual_ones_soon(tmp_path: Path) -> None:
    times = Times()
    account = times.account(tmp_path / "goodput.jsonl")
    account.enter("other")
    for number in range(1, 70):
        step(account, times, number, 1.0)
    for number in range(70, 170):
        step(account, times, number, 30.0)
    assert account.seconds()["other"] == pytest.approx(29.0 * 32, rel=0.05)


def test_a_torn_line_is_passed_over_and_the_next_one_whole(tmp_path: Path) -> None:
    path, times = tmp_path / "goodput.jsonl", Times()
    times.account(path).tell(1)
    with path.open("a") as file:
        file.write('{"incarnation": 0, "eve')
    times.account(path, 1).tell(2)
    assert read_history(path).step == 2
    assert read_history(path).restarts == 1
    assert len([line for line in path.read_text().splitlines() if line.endswith("}")]) == 4


def test_a_full_disk_loses_no_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    times = Times()
    account = times.account(tmp_path / "goodput.jsonl")
    account.enter("step")
    times.pass_by(5.0)
    (tmp_path / "goodput.jsonl").rename(tmp_path / "away")
    (tmp_path / "goodput.jsonl").mkdir()
    with caplog.at_level(logging.ERROR, logger="hopescale"):
        account.tell(1)
    assert "goodput.jsonl lacks a line" in caplog.text
    (tmp_path / "goodput.jsonl").rmdir()
    (tmp_path / "away").rename(tmp_path / "goodput.jsonl")
    times.pass_by(1.0)
    account.tell(2)
    assert read_history(tmp_path / "goodput.jsonl").seconds["step"] == 6.0


@pytest.mark.parametrize(
    ("outcome", "event"), [("finished", "finished"), ("preempted", "preempted"), ("error", "failed")]
)
def test_the_last_line_says_how_an_incarnation_ended(tmp_path: Path, outcome: str, event: str) -> None:
    account = Times().account(tmp_path / "goodput.jsonl")

    def live() -> None:
        with account.ending_aloud(lambda: 7):
            if outcome == "error":
                raise ConfigError(Problem("a", 1, "is wrong", "mend it"))
            account.outcome = outcome

    if outcome == "error":
        with pytest.raises(ConfigError):
            live()
    else:
        live()
    last = json.loads((tmp_path / "goodput.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["step"]) == (event, 7)


def test_a_crash_says_nothing(tmp_path: Path) -> None:
    account = Times().account(tmp_path / "goodput.jsonl")
    with pytest.raises(RuntimeError), account.ending_aloud(lambda: 7):
        raise RuntimeError
    assert len((tmp_path / "goodput.jsonl").read_text().splitlines()) == 1


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    account = Times().account(None)
    account.tell(3, "finished")
    assert not list(tmp_path.iterdir())


def test_a_process_knows_its_age() -> None:
    assert 0 < process_age() < 86_400
