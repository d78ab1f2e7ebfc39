"""A ring of reused memory blocks between reading threads and the consumer, who gets tensors on loan.

Fresh memory for every batch costs more than reading it: the kernel must clear each page. Here a block is filled again
as soon as nothing refers to its tensors any more. Whoever keeps a batch keeps its block: nothing is overwritten, the
ring takes another one instead and counts it.
"""

from __future__ import annotations

import mmap
import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.errors import DataError, Problem
from data_pipeline.reader.counters import Counters
from data_pipeline.reader.shard_reads import OpenShards

T = TypeVar("T")


class Block:
    """Memory for one batch, lent out again and again."""

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        """Take memory: pinned, which a GPU copies from while the host goes on, or pages of the system."""
        self.on_loan = False
        if pinned:
            self._memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        else:
            # Shared mappings, the default, get no huge pages, and a forked child would write into them.
            pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                pages.madvise(mmap.MADV_HUGEPAGE)
            self._memory = np.frombuffer(pages, np.uint8)

    def view(self) -> NDArray[np.uint8]:
        """Return the memory as a new array, whose end of life can be waited for."""
        return self._memory[:]


class Ring(Generic[T]):
    """Fills blocks in order on several threads.

    Batch n is made by `fill(n, memory, files)`, which any thread may call at any time; `take` returns batches in order.
    """

    def __init__(
        self,
        fill: Callable[[int, NDArray[np.uint8], OpenShards], T],
        open_shards: Callable[[], OpenShards],
        *,
        nbytes: int,
        blocks: int,
        threads: int,
        timeout: float,
        counters: Counters,
        pinned: bool = False,
    ) -> None:
        """Start reading.

        Args:
            fill: Makes batch n in the memory it is given; the result's tensors must share that memory.
            open_shards: Makes each thread's own open files.
            nbytes: Size of a block.
            blocks: Blocks kept.
            threads: Threads that fill.
            timeout: Seconds `take` waits at most.
            counters: What has been done.
            pinned: Whether blocks are pinned for copies to a GPU.
        """
        self._fill, self._open_shards = fill, open_shards
        self._nbytes, self._planned, self._pinned = nbytes, blocks, pinned
        self._timeout, self._counters = timeout, counters
        self._free: SimpleQueue[Block | None] = SimpleQueue()
        self._blocks: list[Block] = []
        self._turn = threading.Lock()
        self._next_to_fill = self._next_to_take = 0
        self._change = threading.Condition()
        self._ready: dict[int, tuple[T, Block, NDArray[np.uint8]] | BaseException] = {}
        self._doing: dict[str, tuple[int, float, OpenShards]] = {}
        self._closed = False
        self._started = threading.Barrier(threads + 1)
        for _ in range(blocks):
            self._add_block()
        self._threads = [
            threading.Thread(target=self._work, name=f"reader-{number}", daemon=True) for number in range(threads)
        ]
        self._hung = False
        _start_single(self._threads, self._started)

    def take(self) -> T:
        """Return the next batch.

        Raises:
            DataError: What reading it raised, or that it did not come in time.
            StopIteration: After `close`.
        """
        with self._change:
            self._counters.set(ready_batches=len(self._ready))
            if self._next_to_take not in self._ready and all(block.on_loan for block in self._blocks):
                # The consumer holds every batch; waiting for one of them to come back could last for ever.
                self._counters.add(ring_overflows=1)
                self._add_block()
            came = self._change.wait_for(lambda: self._closed or self._next_to_take in self._ready, self._timeout)
            if self._closed:
                raise StopIteration
            if not came:
                self._hung = True
                raise self._late()
            entry = self._ready.pop(self._next_to_take)
        if isinstance(entry, BaseException):
            raise entry
        self._next_to_take += 1
        batch, block, memory = entry
        weakref.finalize(memory, self._give_back, block).atexit = False
        return batch

    def close(self) -> None:
        """Stop the threads; batches on loan stay valid. A thread that hangs in a read is not waited for."""
        with self._change:
            self._closed = True
            self._ready.clear()
            self._change.notify_all()
        for _ in self._threads:
            self._free.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(0.1 if self._hung else None)

    def _add_block(self) -> None:
        block = Block(self._nbytes, pinned=self._pinned)
        self._blocks.append(block)
        self._free.put(block)

    def _give_back(self, block: Block) -> None:
        # Called wherever the last reference dies, even within the collector: only what is reentrant may happen here.
        block.on_loan = False
        self._free.put(block)

    def _is_surplus(self, block: Block) -> bool:
        """Drop a block that is more than was planned, unless the consumer has nothing else to wait for."""
        with self._change:
            others = [other for other in self._blocks if other is not block]
            needed = not self._ready and all(other.on_loan for other in others)
            if needed or len(others) < self._planned:
                return False
            self._blocks = others
            return True

    def _work(self) -> None:
        # This thread's copies shall not start a team of threads of their own. Asking first makes torch take over the
        # process' setting, which would otherwise happen later and undo this.
        torch.get_num_threads()
        torch.set_num_threads(1)
        self._started.wait()
        files, name = self._open_shards(), threading.current_thread().name
        try:
            while True:
                # Whoever has the turn waits for memory, so that memory goes to batches in their order.
                with self._turn:
                    block = self._free.get()
                    if block is None or self._closed:
                        return
                    if self._is_surplus(block):
                        continue
                    number = self._next_to_fill
                    self._next_to_fill += 1
                self._doing[name] = (number, time.monotonic(), files)
                memory = block.view()
                try:
                    entry = (self._fill(number, memory, files), block, memory)
                    block.on_loan = True
                except BaseException as error:
                    entry = error
                # A name that lives on here would keep the batch on loan.
                del memory
                self._doing.pop(name)
                with self._change:
                    self._ready[number] = entry
                    failed = isinstance(entry, BaseException)
                    del entry
                    self._change.notify_all()
                if failed:
                    return
        finally:
            self._doing.pop(name, None)
            files.close()

    def _late(self) -> DataError:
        now = time.monotonic()
        doing = [
            f"{name} has been at batch {number} for {now - since:.0f} s, last read: {files.last_read}"
            for name, (number, since, files) in sorted(self._doing.items())
        ]
        lent = sum(block.on_loan for block in self._blocks)
        state = "; ".join(doing) or "no thread reads"
        rule = (
            f"no batch came within {self._timeout:g} s: waiting for batch {self._next_to_take}, {lent} of "
            f"{len(self._blocks)} blocks are filled or in use; {state}"
        )
        fix = "look at the disk or network that holds the shards, or raise data.reader.timeout"
        return DataError(Problem("data.reader.timeout", self._timeout, rule, fix))


def _start_single(threads: list[threading.Thread], started: threading.Barrier) -> None:
    """Start threads that give themselves one thread of torch's, and leave the others' number as it was."""
    number = torch.get_num_threads()
    for thread in threads:
        thread.start()
    started.wait()
    # What a thread sets is also what threads that start later get.
    torch.set_num_threads(number)
