"""Copies to a GPU beside its work: a side stream takes the next step over while the current one is computed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from queue import Empty, Queue

import torch
from torch import Tensor

from data_pipeline.batch import ClipBatch, StepBatches
from data_pipeline.reader.counters import Counters


class AheadOnDevice:
    """Keeps one step's micro-batches on a GPU ahead of the one in use.

    The host's memory of a step is let go only when its copy has ended, so that the ring cannot fill it again before.
    """

    def __init__(self, read: Callable[[], StepBatches], device: torch.device, counters: Counters) -> None:
        """Start copying.

        Args:
            read: Returns the next step, in pinned memory.
            device: A CUDA device.
            counters: What has been done.
        """
        self._read, self._device, self._counters = read, device, counters
        self._stream = torch.cuda.Stream(device)
        self._queue: Queue[tuple[StepBatches, torch.cuda.Event] | BaseException] = Queue()
        # One step beside the one in use, and not a third one on its way.
        self._wanted = threading.Semaphore(1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="to-device", daemon=True)
        self._thread.start()

    def take(self) -> StepBatches:
        """Return the next step; work queued on the current stream from now on waits for its copies.

        Raises:
            DataError: What reading it raised.
            StopIteration: There are no more.
        """
        entry = None
        while entry is None:
            if self._closed.is_set():
                raise StopIteration
            with suppress(Empty):
                entry = self._queue.get(timeout=0.1)
        if isinstance(entry, BaseException):
            self._closed.set()
            raise entry
        self._wanted.release()
        step, copied = entry
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        for tensor in _on_device(step.micro):
            # Allocated on the side stream: its memory must not be given away while this stream still reads it.
            tensor.record_stream(current)
        return step

    def close(self) -> None:
        """Stop; the thread ends with the step it is at, once the ring it reads from is closed."""
        self._closed.set()
        self._wanted.release()
        self._thread.join()

    def _work(self) -> None:
        torch.cuda.set_device(self._device)
        try:
            while True:
                self._wanted.acquire()
                if self._closed.is_set():
                    return
                step = self._read()
                started = time.monotonic()
                with torch.cuda.stream(self._stream):
                    on_device = step.to(self._device)
                    copied = torch.cuda.Event()
                    copied.record()
                copied.synchronize()
                self._counters.add(copy_seconds=time.monotonic() - started)
                # Its memory goes back to the ring.
                del step
                self._queue.put((on_device, copied))
        except BaseException as error:
            self._queue.put(error)


def _on_device(micro: list[ClipBatch]) -> Iterator[Tensor]:
    for clips in micro:
        for field in fields(clips):
            value = getattr(clips, field.name)
            if isinstance(value, Tensor) and value.is_cuda:
                yield value
