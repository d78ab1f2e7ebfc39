from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hopescale.optim.pipeline import Turns, take_turns


def logged(name: int, num_yields: int, log: list[tuple[int, int]]) -> Turns:
    """Work in parts, numbered from 0, between which it yields."""
    for part in range(num_yields):
        log.append((name, part))
        yield
    log.append((name, num_yields))


def under_way(log: list[tuple[int, int]], num_yields: list[int]) -> Iterator[int]:
    """After each part: tasks that have begun and not ended."""
    begun: set[int] = set()
    for name, part in log:
        begun.add(name)
        if part == num_yields[name]:
            begun.remove(name)
        yield len(begun)


def test_a_task_sends_while_the_one_before_computes_and_the_one_before_that_receives() -> None:
    log: list[tuple[int, int]] = []
    take_turns([logged(name, 2, log) for name in range(4)])
    # Part 0 sends, part 1 computes and sends back, part 2 receives.
    # fmt: off
    assert log == [
        (0, 0),
        (1, 0), (0, 1),
        (2, 0), (1, 1), (0, 2),
        (3, 0), (2, 1), (1, 2),
        (2, 2),
        (3, 1), (3, 2),
    ]
    # fmt: on


@given(st.lists(st.integers(0, 7), max_size=8))
def test_all_tasks_end_each_in_its_order_and_few_are_under_way(num_yields: list[int]) -> None:
    log: list[tuple[int, int]] = []
    take_turns([logged(name, count, log) for name, count in enumerate(num_yields)])
    for name, count in enumerate(num_yields):
        assert [part for who, part in log if who == name] == list(range(count + 1))
    assert [who for who, part in log if part == 0] == list(range(len(num_yields)))
    assert max(under_way(log, num_yields), default=0) <= 3


@given(st.lists(st.integers(1, 7), min_size=2, max_size=8))
def test_a_task_begins_before_the_one_before_goes_on(num_yields: list[int]) -> None:
    log: list[tuple[int, int]] = []
    take_turns([logged(name, count, log) for name, count in enumerate(num_yields)])
    for name in range(1, len(num_yields)):
        assert log.index((name, 0)) < log.index((name - 1, 1))


def test_tasks_are_begun_one_at_a_time() -> None:
    log: list[tuple[int, int]] = []

    def tasks() -> Iterator[Turns]:
        for name in range(4):
            # All but the three newest have ended by now: memory of a bucket is taken when it begins.
            assert sum((old, 2) in log for old in range(name)) >= name - 2
            yield logged(name, 2, log)

    take_turns(tasks())
    assert len(log) == 12


def test_nothing_to_do_is_done() -> None:
    take_turns([])


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_an_error_comes_out(part: int, place: int) -> None:
    log: list[tuple[int, int]] = []

    def failing() -> Turns:
        yield from logged(place, part, log)
        raise RuntimeError("lost a rank")

    tasks = [logged(name, 2, log) if name != place else failing() for name in range(4)]
    with pytest.raises(RuntimeError, match="lost a rank"):
        take_turns(tasks)
    assert log[-1] == (place, part)
