from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data_pipeline.batch import ClipBatch
from data_pipeline.errors import DataError
from data_pipeline.reader import device as device_module
from data_pipeline.reader.batches import GlobalBatches
from data_pipeline.reader.clips import ClipReader
from data_pipeline.reader.fill import BadClip
from data_pipeline.reader.ring import Block
from data_pipeline.schema import DataConfig


class Stream:
    """Stands in for a stream: there is no GPU, so what is tested is the order of things on the host."""

    def __init__(self, device: object = None) -> None: ...

    def wait_event(self, event: object) -> None: ...


class Event:
    def record(self) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """First positions of the micro-batches that were copied, in order."""
    cuda = SimpleNamespace(
        Stream=Stream,
        Event=Event,
        current_stream=lambda device: Stream(),
        set_device=lambda device: None,
        stream=lambda stream: nullcontext(),
    )
    monkeypatch.setattr(device_module, "torch", SimpleNamespace(cuda=cuda))
    order: list[int] = []
    to, make = ClipBatch.to, Block.__init__

    def onto(self: ClipBatch, device: torch.device) -> ClipBatch:
        order.append(int(self.positions[0]))
        return to(self, "cpu")

    monkeypatch.setattr(ClipBatch, "to", onto)
    monkeypatch.setattr(Block, "__init__", lambda self, nbytes, *, pinned: make(self, nbytes, pinned=False))
    return order


def _batches(reader: ClipReader) -> GlobalBatches:
    return GlobalBatches(reader, global_batch=4, rank=0, world_size=1, micro_batch=2, device="cuda")


def _settled(copied: list[int]) -> int:
    time.sleep(0.3)
    return len(copied)


def test_one_step_is_copied_ahead_and_no_more(reader: ClipReader, copied: list[int]) -> None:
    batches, plain = _batches(reader), GlobalBatches(reader, global_batch=4, rank=0, world_size=1, micro_batch=2)
    for taken in range(1, 5):
        step, expected = next(batches), next(plain)
        assert step.position == expected.position
        for mine, theirs in zip(step.micro, expected.micro, strict=True):
            assert mine.keys == theirs.keys
            assert torch.equal(mine.features, theirs.features)
        assert _settled(copied) == 2 * (taken + 1)
        assert batches.state_dict() == plain.state_dict()
    assert batches.stats().copy_seconds > 0
    batches.close()
    plain.close()


def test_the_end_is_told_and_not_waited_for(reader: ClipReader, copied: list[int]) -> None:
    batches = _batches(reader)
    next(batches)
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)
    assert not any(thread.name == "to-device" for thread in threading.enumerate())


def test_an_error_comes_once_and_then_the_end(
    dataset: Path, copied: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = ClipReader(DataConfig(path=str(dataset)), split="train", seed=5)
    batches = _batches(reader)
    next(batches)
    monkeypatch.setattr(reader.fields, "verify", _refuse)
    # What was read ahead is still good.
    with pytest.raises(DataError, match="no good"):
        _drain(batches)
    with pytest.raises(StopIteration):
        next(batches)


def _drain(batches: GlobalBatches) -> None:
    for _ in range(20):
        next(batches)


def _refuse(row: int, name: str, content: object) -> None:
    raise BadClip("no good", kind="checksum")
