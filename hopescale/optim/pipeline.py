"""Buckets taking turns, so that the exchange of one runs while another is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable

ENDED = object()

Turns = Generator[None, None, None]
"""Work that yields while it waits for others."""


def take_turns(tasks: Iterable[Turns]) -> None:
    """Run all tasks, at most three under way: one about to send, one computing, one about to receive.

    The order is the same wherever the tasks are: it depends on how often each yields, not on when exchanges end.
    """
    under_way: deque[Turns] = deque()
    for task in tasks:
        under_way.append(task)
        # Newest first: it begins its exchange before the one before it computes; then the oldest receives.
        for one in reversed(tuple(under_way)):
            if next(one, ENDED) is ENDED:
                under_way.remove(one)
        while len(under_way) > 2:
            _finish(under_way.popleft())
    while under_way:
        _finish(under_way.popleft())


def _finish(task: Turns) -> None:
    for _ in task:
        pass
