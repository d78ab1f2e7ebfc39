from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from hopescale.checkpoint.manager import load_tensors
from hopescale.checkpoint.storage import RawWriter
from hopescale.optim.flat_piece import FlatPiece, FlatRanges, range_boxes
from hopescale.optim.shard_map import layout_of
from hopescale.optim.state import _in_host_memory, local

NO_GROUP = cast(Any, None)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=4)))
    bounds = draw(st.lists(st.integers(0, math.prod(shape)), min_size=2, max_size=2))
    return shape, min(bounds), max(bounds)


@given(ranges())
def test_boxes_hold_the_numbers_of_a_range_once_and_in_order(given_range: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = given_range
    numbers, found = np.arange(math.prod(shape)).reshape(shape), []
    boxes = list(range_boxes(shape, start, stop))
    for box in boxes:
        place = tuple(slice(low, low + size) for low, size in zip(box.offsets, box.sizes, strict=True))
        part = numbers[place].reshape(-1).tolist()
        assert part[0] == box.first
        found += part
    assert found == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def piece(numbers: torch.Tensor, shape: tuple[int, ...], start: int, stop: int) -> FlatPiece:
    everyone = ((0, start), (start, stop), (stop, math.prod(shape)))
    return FlatPiece(numbers[start:stop], FlatRanges(shape, everyone, NO_GROUP, 1))


def test_a_piece_looks_like_the_parameter_and_holds_a_view_of_its_numbers() -> None:
    numbers = torch.arange(24.0)
    held = piece(numbers, (2, 3, 4), 5, 17)
    assert (held.shape, held.numel(), local(held).tolist()) == ((2, 3, 4), 24, list(range(5, 17)))
    local(held)[0] = -1
    assert numbers[5] == -1
    zeros = torch.zeros_like(held, dtype=torch.float64)
    assert isinstance(zeros, FlatPiece)
    assert (zeros.dtype, zeros.piece.tolist()) == (torch.float64, [0.0] * 12)
    assert layout_of("w", held).sizes == ((5, 0), (7, 5), (0, 7))
    with pytest.raises(NotImplementedError, match="compute with its piece"):
        torch.add(held, 1)
    with pytest.raises(ValueError, match="numbers 5 to 17"):
        FlatPiece(numbers[:3], held.spec)


def test_state_that_waits_in_host_memory_stays_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    held = piece(torch.arange(12.0), (3, 4), 2, 8)
    # As on a GPU, where it is copied into pinned memory.
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    waiting = _in_host_memory(held)
    assert isinstance(waiting, FlatPiece)
    assert (waiting.spec, waiting.piece.tolist()) == (held.spec, held.piece.tolist())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@given(ranges())
def test_what_a_whole_tensor_saved_is_loaded_into_a_piece(
    tmp_path_factory: pytest.TempPathFactory, given_range: tuple[tuple[int, ...], int, int]
) -> None:
    shape, start, stop = given_range
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    numbers = torch.arange(float(math.prod(shape)))
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.save({"w": numbers.view(shape)}, storage_writer=RawWriter(folder, 0), planner=planner, no_dist=True)
    loaded = piece(torch.full_like(numbers, -1), shape, start, stop)
    load_tensors(folder, {"w": loaded})
    assert torch.equal(loaded.piece, numbers[start:stop])
