"""Copies to a GPU beside its work: a side stream takes the next step over while the current one is computed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from queue import Queue

import torch
from torch import Tensor

from data_pipeline.batch import ClipBatch


class AheadOnDevice:
    """Keeps one step's micro-batches on a GPU ahead of the one in use.

    The host's memory of a step is let go only when its copy has ended, so that the ring cannot fill it again before.
    """

    def __init__(self, read: Callable[[], list[ClipBatch]], device: torch.device) -> None:
        """Start copying.

        Args:
            read: Returns the micro-batches of the next step, in pinned memory.
            device: A CUDA device.
        """
        self._read, self._device = read, device
        self._stream = torch.cuda.Stream(device)
        self._queue: Queue[tuple[list[ClipBatch], torch.cuda.Event] | BaseException] = Queue(maxsize=1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="to-device", daemon=True)
        self._thread.start()

    def take(self) -> list[ClipBatch]:
        """Return the next step's micro-batches; work queued on the current stream from now on waits for their copies.

        Raises:
            DataError: What reading them raised.
            StopIteration: There are no more.
        """
        entry = self._queue.get()
        if isinstance(entry, BaseException):
            raise entry
        micro, copied = entry
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        for tensor in _on_device(micro):
            # Allocated on the side stream: its memory must not be given away while this stream still reads it.
            tensor.record_stream(current)
        return micro

    def close(self) -> None:
        """Stop; the thread ends with the step it is at."""
        self._closed.set()
        while self._thread.is_alive():
            while not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join(0.05)

    def _work(self) -> None:
        torch.cuda.set_device(self._device)
        try:
            while not self._closed.is_set():
                step = self._read()
                with torch.cuda.stream(self._stream):
                    micro = [clips.to(self._device) for clips in step]
                    copied = torch.cuda.Event()
                    copied.record()
                copied.synchronize()
                # Its memory goes back to the ring.
                del step
                self._queue.put((micro, copied))
        except BaseException as error:
            self._queue.put(error)


def _on_device(micro: list[ClipBatch]) -> Iterator[Tensor]:
    for clips in micro:
        for field in fields(clips):
            value = getattr(clips, field.name)
            if isinstance(value, Tensor) and value.is_cuda:
                yield value
