"""Worker processes of the sharder: each writes one shard at a time and ends with the process that started it."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import connection, get_context, parent_process, reduction
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch

from data_pipeline.errors import DataError, Problem, UserError
from data_pipeline.shard.journal import ShardRecord
from data_pipeline.shard.lock import PartLock
from data_pipeline.shard.plan import PlannedClip
from data_pipeline.shard.worker import Job, write_shard
from data_pipeline.sources.base import SkippedClip


class Finished(NamedTuple):
    """What the process that hands out work needs to know of a finished shard."""

    num_clips: int
    num_bytes: int
    skipped: tuple[SkippedClip, ...]

    @classmethod
    def of(cls, record: ShardRecord) -> Finished:
        """Return it from the record."""
        return cls(len(record.clips), record.num_bytes, record.skipped)


Task = tuple[int, Sequence[PlannedClip]]
"""Number and clips of a shard."""


def write_shards(
    job: Job,
    tasks: Sequence[Task],
    workers: int,
    lock: PartLock,
    clip_done: Callable[[], None],
    shard_done: Callable[[Finished], None],
) -> None:
    """Write shards, in this process if one worker is asked for.

    Each process computes with one thread: so sums come out the same whatever the number of processes.

    Args:
        job: How.
        tasks: Which.
        workers: Number of processes.
        lock: Held by the caller, and by every worker as long as it lives.
        clip_done: Called after each clip.
        shard_done: Called after each shard.

    Raises:
        DataError: As `write_shard`, or a worker was killed. The other workers are ended.
    """
    workers = min(workers, len(tasks))
    if workers > 1:
        _Pool(job, tasks, workers, lock).run(clip_done, shard_done)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number, clips in tasks:
            shard_done(Finished.of(write_shard(job, number, clips, clip_done)))
    finally:
        torch.set_num_threads(threads)


class _Pool:
    def __init__(self, job: Job, tasks: Sequence[Task], workers: int, lock: PartLock) -> None:
        # Forked from a small server that has imported what workers need, never from this process and its threads.
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(["data_pipeline.shard.pool"])
        self._job, self._tasks, self._lock = job, list(reversed(tasks)), lock
        self._workers: dict[connection.Connection, tuple[BaseProcess, str]] = {}
        self._count = workers

    def run(self, clip_done: Callable[[], None], shard_done: Callable[[Finished], None]) -> None:
        try:
            for _ in range(self._count):
                self._start()
            while self._workers:
                for ready in connection.wait(list(self._workers)):
                    if isinstance(ready, connection.Connection):
                        self._hear(ready, clip_done, shard_done)
        finally:
            for pipe, (process, _) in self._workers.items():
                process.terminate()
                process.join()
                pipe.close()

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        arguments = (theirs, self._job, _Inherited(self._lock.fileno()))
        process = self._context.Process(target=_work, args=arguments, name="hopescale-shard")
        process.start()
        theirs.close()
        self._workers[ours] = (process, "")
        self._hand_out(ours)

    def _hand_out(self, pipe: connection.Connection) -> None:
        process, _ = self._workers[pipe]
        task = self._tasks.pop() if self._tasks else None
        with suppress(BrokenPipeError):
            # A worker that has died is noticed when it is listened to.
            pipe.send(task)
        if task is None:
            del self._workers[pipe]
            process.join()
            pipe.close()
        else:
            self._workers[pipe] = (process, self._job.plan.shards[task[0]].name)

    def _hear(
        self, pipe: connection.Connection, clip_done: Callable[[], None], shard_done: Callable[[Finished], None]
    ) -> None:
        try:
            kind, content = pipe.recv()
        except (EOFError, ConnectionResetError):
            process, shard = self._workers[pipe]
            process.join()
            rule = f"a worker ended with exit code {process.exitcode} while it wrote {shard}"
            fix = "use fewer workers if memory was short, and run the same command again: finished shards are kept"
            raise DataError(Problem("workers", self._count, rule, fix)) from None
        if kind == "clip":
            clip_done()
        elif kind == "shard":
            shard_done(content)
            self._hand_out(pipe)
        elif kind == "error":
            raise content
        else:
            raise RuntimeError(f"a worker failed:\n{content}")


class _Inherited:
    """A descriptor that a started process gets a copy of."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return _detached, (reduction.DupFd(self.descriptor),)


def _detached(duplicate: Any) -> _Inherited:
    return _Inherited(duplicate.detach())


def _work(pipe: connection.Connection, job: Job, lock: _Inherited) -> None:
    # The process that started us decides what an interrupt means; what it was told to do ends with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        while (task := pipe.recv()) is not None:
            record = write_shard(job, task[0], task[1], lambda: pipe.send(("clip", None)))
            pipe.send(("shard", Finished.of(record)))
    except UserError as error:
        pipe.send(("error", error))
    except (EOFError, BrokenPipeError):
        return
    except Exception:
        pipe.send(("crash", traceback.format_exc()))


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
