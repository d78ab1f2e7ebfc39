"""Many shards read by some threads, each with a reader of its own, that count their clips together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from data_pipeline.dataset.spans import SpanReader
from data_pipeline.errors import DataError, Problem

Progress = Callable[[int, int], None]
Task = TypeVar("Task")
Result = TypeVar("Result")

_MAX_WORKERS = 256


def check_workers(workers: int) -> None:
    """Refuse a number of threads that no machine can use.

    Raises:
        DataError: It is below 1 or above 256.
    """
    if not 1 <= workers <= _MAX_WORKERS:
        raise DataError(Problem("workers", workers, f"must be 1 to {_MAX_WORKERS}", "use the number of cores"))


def in_order(run: Callable[[Task, SpanReader], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Yield the results of some tasks in their order; after an error no further one is begun.

    Args:
        run: Given a task and the reader of its thread.
        tasks: What is to be done.
        workers: Threads.
    """
    own = threading.local()

    def task(each: Task) -> Result:
        if not hasattr(own, "reader"):
            own.reader = SpanReader()
        return run(each, own.reader)

    with ThreadPoolExecutor(workers) as threads:
        yield from threads.map(task, tasks)


def ticks(progress: Progress | None, clips: int) -> Callable[[int], None]:
    """Return what any thread calls with numbers of clips that are done.

    Args:
        progress: Called with (clips done, clips in all), by one thread at a time.
        clips: In all.
    """
    done, lock = 0, threading.Lock()

    def tick(more: int) -> None:
        nonlocal done
        with lock:
            done += more
            if progress is not None and more:
                progress(done, clips)

    return tick
