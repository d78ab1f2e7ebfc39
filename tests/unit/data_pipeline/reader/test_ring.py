from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from data_pipeline.errors import DataError
from data_pipeline.reader.counters import Counters
from data_pipeline.reader.ring import Ring


class NoShards:
    """Stands where a thread's open files would: these batches come from no file."""

    last_read = "shard 3 at byte 512"

    def close(self) -> None: ...


def _fill(number: int, memory: np.ndarray, files: object) -> torch.Tensor:
    memory[:] = number % 251
    return torch.from_numpy(memory)


@pytest.fixture
def make_ring() -> Iterator:
    rings = []

    def make(fill=_fill, blocks: int = 3, threads: int = 2, timeout: float = 20.0) -> Ring:
        ring = Ring(
            fill,
            NoShards,  # pyright: ignore[reportArgumentType]
            nbytes=4096,
            blocks=blocks,
            threads=threads,
            timeout=timeout,
            counters=Counters(),
        )
        rings.append(ring)
        return ring

    yield make
    for ring in rings:
        ring.close()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("blocks", [1, 3])
def test_batches_come_in_order_however_long_each_takes(make_ring, threads: int, blocks: int) -> None:
    def uneven(number: int, memory: np.ndarray, files: object) -> torch.Tensor:
        time.sleep(0.002 * (number % 3 == 0))
        return _fill(number, memory, files)

    ring = make_ring(uneven, blocks=blocks, threads=threads)
    for number in range(60):
        batch = ring.take()
        assert set(batch.tolist()) == {number % 251}
        del batch


def test_no_more_is_read_ahead_than_there_are_blocks(make_ring) -> None:
    started = []

    def counted(number: int, memory: np.ndarray, files: object) -> torch.Tensor:
        started.append(number)
        return _fill(number, memory, files)

    ring = make_ring(counted, blocks=3)
    batch = ring.take()
    time.sleep(0.1)
    assert len(started) == 3
    del batch
    time.sleep(0.1)
    assert len(started) == 4


def test_a_part_of_a_batch_keeps_all_of_it(make_ring) -> None:
    ring = make_ring(blocks=2, threads=1)
    part = ring.take()[5:6].numpy()
    for _ in range(10):
        ring.take()
    assert part[0] == 0
    assert ring._counters.stats().ring_overflows == 0


def test_memory_taken_because_all_was_kept_goes_back(make_ring) -> None:
    ring = make_ring(blocks=2, threads=1)
    kept = [ring.take() for _ in range(6)]
    assert [int(batch[0]) for batch in kept] == list(range(6))
    assert ring._counters.stats().ring_overflows >= 3
    del kept
    gc.collect()
    ring.take()
    assert len(ring._blocks) <= 3


def test_an_error_comes_in_its_place(make_ring) -> None:
    def failing(number: int, memory: np.ndarray, files: object) -> torch.Tensor:
        if number == 3:
            raise ValueError("clip 3")
        return _fill(number, memory, files)

    ring = make_ring(failing)
    assert [int(ring.take()[0]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="clip 3"):
        ring.take()


def test_a_read_that_hangs_is_named_in_time(make_ring) -> None:
    release = threading.Event()

    def hanging(number: int, memory: np.ndarray, files: object) -> torch.Tensor:
        if number == 1:
            release.wait(10)
        return _fill(number, memory, files)

    ring = make_ring(hanging, timeout=0.2)
    ring.take()
    with pytest.raises(DataError, match="batch 1 for 0 s, last read: shard 3 at byte 512") as caught:
        ring.take()
    assert "data.reader.timeout" in str(caught.value)
    release.set()


def test_a_closed_ring_gives_nothing_more_and_takes_nothing_back_by_force(make_ring) -> None:
    ring = make_ring()
    kept = ring.take()
    ring.close()
    with pytest.raises(StopIteration):
        ring.take()
    assert int(kept[0]) == 0
    ring.close()
