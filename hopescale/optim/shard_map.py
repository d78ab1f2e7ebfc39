"""Where the pieces of every matrix lie: which rank of a team holds which part of it.

A matrix is (parameter, leading index); the leading dims of a parameter are a batch of matrices. Ranks that hold the
same piece are replicas of one slot: with FSDP2 a slot is a place on the sharded axes of the mesh, with ZeRO every rank
is one. A piece is a list of boxes. FSDP2 makes one of it; a flat range of ZeRO cuts a matrix into at most three (the
end of a row, whole rows, the start of a row), so packing and placing know boxes alone. Nothing here needs a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from .flat_piece import FlatPiece, check_cover


class Box(NamedTuple):
    """A rectangle of one matrix, contiguous in the flat local tensor of the rank that holds it."""

    offset: int
    """Where it begins in the local tensor."""
    top: int
    bottom: int
    left: int
    right: int

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return (self.bottom - self.top) * (self.right - self.left)


Piece = tuple[Box, ...]
"""What one slot holds of one matrix; may be empty."""


@dataclass(frozen=True)
class Team:
    """The ranks that hold a set of parameters together, by their place in the process group."""

    slots: tuple[int, ...]
    """Slot of each rank; ranks of one slot hold the same pieces."""
    replicas: tuple[int, ...]
    """Replica of each rank; the ranks of one replica hold every matrix once between them."""

    @classmethod
    def of_one(cls) -> Team:
        """A rank on its own."""
        return cls((0,), (0,))

    @classmethod
    def of_copies(cls, size: int) -> Team:
        """Ranks that all hold everything."""
        return cls((0,) * size, tuple(range(size)))

    @classmethod
    def of_shards(cls, size: int, copies: int = 1) -> Team:
        """Ranks in `copies` replicas of `size` slots, slots varying fastest (FSDP2 for one copy, HSDP for more)."""
        return cls(tuple(range(size)) * copies, tuple(r for r in range(copies) for _ in range(size)))

    @property
    def size(self) -> int:
        """Ranks."""
        return len(self.slots)

    @cached_property
    def num_slots(self) -> int:
        """Slots of a replica."""
        return max(self.slots) + 1

    @cached_property
    def num_replicas(self) -> int:
        """Replicas."""
        return max(self.replicas) + 1

    @cached_property
    def rank(self) -> dict[tuple[int, int], int]:
        """Rank at (replica, slot)."""
        return {place: rank for rank, place in enumerate(zip(self.replicas, self.slots, strict=True))}


@dataclass(frozen=True)
class Layout:
    """How one parameter lies over the slots of a team."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    pieces: tuple[tuple[Piece, ...], ...]
    """Slot -> matrix -> piece."""

    @property
    def rows(self) -> int:
        """Of each matrix."""
        return self.shape[-2]

    @property
    def columns(self) -> int:
        """Of each matrix."""
        return self.shape[-1]

    @property
    def count(self) -> int:
        """Matrices."""
        return math.prod(self.shape[:-2])

    @cached_property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """Slot -> matrix -> numbers."""
        return tuple(tuple(sum(box.numel for box in piece) for piece in slot) for slot in self.pieces)

    @cached_property
    def is_whole(self) -> bool:
        """Whether every matrix lies in one slot."""
        whole = self.rows * self.columns
        return all(size in (0, whole) for slot in self.sizes for size in slot)

    @cached_property
    def cut_side(self) -> Literal["rows", "columns"] | None:
        """The side that is cut, if it is the longer one alone, so that Gram matrices of pieces add up; else None.

        Every piece is then one box that has all of the other side. Of a square either side will do.
        """
        boxes = [piece for slot in self.pieces for piece in slot if piece]
        if self.rows >= self.columns and all(len(p) == 1 and p[0].right - p[0].left == self.columns for p in boxes):
            return "rows"
        if self.columns >= self.rows and all(len(p) == 1 and p[0].bottom - p[0].top == self.rows for p in boxes):
            return "columns"
        return None


def team_of(parameter: Tensor, group_ranks: Sequence[int]) -> Team:
    """The team of a sharded parameter: a slot is a place on the mesh axes that shard it, a replica on the others.

    Args:
        parameter: with its mesh, or its ranges.
        group_ranks: global ranks of the process group that its collectives are to use, in order.

    Raises:
        ValueError: the group is not the ranks of the mesh.
    """
    if isinstance(parameter, FlatPiece):
        return Team.of_shards(len(group_ranks))
    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh.mesh
    if sorted(mesh.flatten().tolist()) != sorted(group_ranks):
        raise ValueError(
            f"parameters lie on ranks {sorted(mesh.flatten().tolist())}, but M3's process group is of ranks "
            f"{sorted(group_ranks)}; give M3 the group of the parameters' ranks"
        )
    sharded = [isinstance(placement, Shard) for placement in parameter.placements]
    places = {int(mesh[tuple(place)]): place for place in torch.ones_like(mesh).nonzero().tolist()}
    slots, replicas = [], []
    for rank in group_ranks:
        slot = replica = 0
        for axis, (at, is_sharded) in enumerate(zip(places[rank], sharded, strict=True)):
            if is_sharded:
                slot = slot * mesh.shape[axis] + at
            else:
                replica = replica * mesh.shape[axis] + at
        slots.append(slot)
        replicas.append(replica)
    return Team(tuple(slots), tuple(replicas))


def layout_of(name: str, parameter: Tensor) -> Layout:
    """Layout of a plain tensor, a DTensor or a flat piece with one matrix at least.

    Raises:
        ValueError: a placement other than Shard and Replicate.
    """
    shape = tuple(parameter.shape)
    if isinstance(parameter, FlatPiece):
        return flat_ranges(name, shape, [(start, stop, 0) for start, stop in parameter.spec.ranges])
    if not isinstance(parameter, DTensor):
        return whole(name, shape)
    for placement in parameter.placements:
        if not (type(placement) is Shard or isinstance(placement, Replicate)):
            raise ValueError(f"parameter {name} has placement {placement}; M3 takes Shard and Replicate")
    axes = [
        (placement.dim % len(shape), size)
        for placement, size in zip(parameter.placements, parameter.device_mesh.shape, strict=True)
        if isinstance(placement, Shard)
    ]
    return sharded(name, shape, axes)


def whole(name: str, shape: tuple[int, ...]) -> Layout:
    """All of a parameter in one slot."""
    return sharded(name, shape, [])


def sharded(name: str, shape: tuple[int, ...], axes: Sequence[tuple[int, int]]) -> Layout:
    """A parameter cut along dims, as DTensor does it: (dim, parts) for each sharded axis of the mesh, outer first.

    A dim is cut into parts of ceil(size / parts), the last ones shorter or empty; a dim cut twice is cut in turn.
    """
    slots = []
    for place in range(math.prod(parts for _, parts in axes)):
        bounds = [(0, size) for size in shape]
        for at, (dim, parts) in zip(_digits(place, [parts for _, parts in axes]), axes, strict=True):
            low, high = bounds[dim]
            step = -(-(high - low) // parts)
            bounds[dim] = (min(low + at * step, high), min(low + (at + 1) * step, high))
        slots.append(_boxes(shape, bounds))
    return Layout(name, shape, tuple(slots))


def _digits(number: int, bases: Sequence[int]) -> list[int]:
    """Digits of a number in mixed bases, the last varying fastest."""
    digits = []
    for base in reversed(bases):
        number, digit = divmod(number, base)
        digits.append(digit)
    return digits[::-1]


def _boxes(shape: tuple[int, ...], bounds: Sequence[tuple[int, int]]) -> tuple[Piece, ...]:
    """Matrix -> piece of the slot that holds these bounds, as one contiguous local tensor."""
    (top, bottom), (left, right) = bounds[-2:]
    size = (bottom - top) * (right - left)
    pieces, held = [], 0
    for number in range(math.prod(shape[:-2])):
        index = _digits(number, shape[:-2])
        if size and all(low <= at < high for at, (low, high) in zip(index, bounds, strict=False)):
            pieces.append((Box(held * size, top, bottom, left, right),))
            held += 1
        else:
            pieces.append(())
    return tuple(pieces)


def flat_ranges(name: str, shape: tuple[int, ...], ranges: Sequence[tuple[int, int, int]]) -> Layout:
    """A parameter cut into contiguous ranges of its row-major numbers, as ZeRO does it.

    Args:
        name: of the parameter.
        shape: of the whole parameter.
        ranges: of each slot (start, stop, offset): numbers start to stop, from `offset` on in the slot's flat tensor.

    Raises:
        ValueError: the ranges do not hold every number once.
    """
    check_cover(name, shape, [(start, stop) for start, stop, _ in ranges])
    rows, columns = shape[-2:]
    slots = []
    for start, stop, offset in ranges:
        pieces = []
        for number in range(math.prod(shape[:-2])):
            first = number * rows * columns
            low, high = max(start - first, 0), min(stop - first, rows * columns)
            pieces.append(_cut(low, high, columns, offset + first + low - start) if low < high else ())
        slots.append(tuple(pieces))
    return Layout(name, shape, tuple(slots))


def _cut(start: int, stop: int, columns: int, offset: int) -> Piece:
    """Boxes of the numbers start to stop of a row-major matrix: the end of a row, whole rows, the start of a row."""
    boxes = []
    at = start
    while at < stop:
        row, column = divmod(at, columns)
        if column or stop - at < columns:
            end = min(stop, (row + 1) * columns)
            box = Box(offset + at - start, row, row + 1, column, column + end - at)
        else:
            end = stop // columns * columns
            box = Box(offset + at - start, row, end // columns, 0, columns)
        boxes.append(box)
        at = end
    return tuple(boxes)
