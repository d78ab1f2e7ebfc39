"""A parameter of which every rank holds one range of its numbers, as ZeRO cuts it; what a DTensor is to M3 and DCP."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


@dataclass(frozen=True)
class FlatRanges:
    """Who holds which numbers of one parameter.

    Attributes:
        shape: Of the whole parameter.
        ranges: Of each rank of the group, (start, stop) in the row-major order of the whole.
        group: The ranks.
        rank: This one's place in it.
    """

    shape: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]
    group: dist.ProcessGroup
    rank: int

    @property
    def own(self) -> tuple[int, int]:
        """This rank's (start, stop)."""
        return self.ranges[self.rank]


class FlatPiece(Tensor):
    """A tensor of the whole parameter's shape that holds this rank's numbers alone, flat, in `piece`.

    It takes part in no arithmetic: whoever computes takes `piece`, which may be a view of a larger buffer.
    """

    piece: Tensor
    spec: FlatRanges

    @staticmethod
    def __new__(cls, piece: Tensor, spec: FlatRanges) -> FlatPiece:
        """Wrap numbers without a copy.

        Raises:
            ValueError: they are not as many as the rank's range has.
        """
        start, stop = spec.own
        if piece.ndim != 1 or piece.numel() != stop - start:
            raise ValueError(f"numbers {start} to {stop} of {spec.shape} are given as {tuple(piece.shape)}")
        made = Tensor._make_wrapper_subclass(cls, spec.shape, dtype=piece.dtype, device=piece.device)
        made.piece, made.spec = piece, spec
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        start, stop = self.spec.own
        return f"FlatPiece({start}..{stop} of {list(self.spec.shape)}, {self.piece})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Detach, and make tensors of the same ranges: what an optimizer's state and a checkpoint need."""
        kwargs = kwargs or {}
        first = args[0]
        if func is torch.ops.aten.detach.default:
            return cls(first.piece.detach(), first.spec)
        if func in (torch.ops.aten.zeros_like.default, torch.ops.aten.empty_like.default):
            made = {name: kwargs[name] for name in ("dtype", "device") if kwargs.get(name) is not None}
            return cls(torch.zeros_like(first.piece, **made), first.spec)
        if func is torch.ops.aten._to_copy.default:
            made = {name: kwargs[name] for name in ("dtype", "device") if kwargs.get(name) is not None}
            return cls(first.piece.to(**made), first.spec)
        raise NotImplementedError(f"{func} of a FlatPiece: compute with its piece")

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        """What this rank saves: a box a chunk (DCP's protocol of checkpointable objects)."""
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets, number),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for number, chunk in enumerate(self.__create_chunk_list__())
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """The boxes that this rank's range consists of."""
        return [
            ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
            for box in range_boxes(self.spec.shape, *self.spec.own)
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """This rank's numbers in one of its boxes, as a view."""
        start, _ = self.spec.own
        for box in range_boxes(self.spec.shape, *self.spec.own):
            if index.offset is None or tuple(index.offset) == box.offsets:
                first = box.first - start
                return self.piece[first : first + math.prod(box.sizes)].view(box.sizes)
        raise ValueError(f"{index} is none of this rank's boxes of {self.spec.own}")


class Cut(NamedTuple):
    """A parameter's numbers in the flat buffers of ranks."""

    ranges: tuple[tuple[int, int], ...]
    """Rank -> numbers (start, stop) of the parameter that it holds; equal where it holds none."""
    offsets: tuple[int, ...]
    """Rank -> where they begin in its buffer."""


def cut(first: int, numel: int, part: int, ranks: int) -> Cut:
    """Numbers `first` to `first + numel` of a row of which rank r holds those from r part to (r + 1) part."""
    bounds = [(rank * part - first, (rank + 1) * part - first) for rank in range(ranks)]
    ranges = tuple((min(max(low, 0), numel), min(max(high, 0), numel)) for low, high in bounds)
    return Cut(
        ranges,
        tuple(max(-low, 0) if stop > start else 0 for (low, _), (start, stop) in zip(bounds, ranges, strict=True)),
    )


def check_cover(name: str, shape: Sequence[int], ranges: Sequence[tuple[int, int]]) -> None:
    """Check that ranges (start, stop) hold every number of a parameter once.

    Raises:
        ValueError: they leave gaps or overlap.
    """
    held = sorted((start, stop) for start, stop in ranges if stop > start)
    ends = [0, *(stop for _, stop in held)]
    if [start for start, _ in held] != ends[:-1] or ends[-1] != math.prod(shape):
        raise ValueError(f"parameter {name} of {math.prod(shape)} numbers is cut into {held}: gaps or overlaps")


@dataclass(frozen=True)
class RangeBox:
    """A box of a row-major array whose numbers follow each other without a gap.

    Attributes:
        first: Place of its first number.
        offsets: Of the box, one a dim.
        sizes: Of the box, one a dim.
    """

    first: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def range_boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[RangeBox]:
    """Yield the boxes that the numbers start to stop of a row-major array consist of, at most two a dim."""
    if stop <= start:
        return
    if not shape:
        yield RangeBox(0, (), ())
        return
    inner = math.prod(shape[1:])
    if not inner:
        return
    first, last = start // inner, (stop - 1) // inner
    if first == last and (start % inner or stop % inner):
        yield from _inside(shape, first, start, stop)
        return
    if start % inner:
        yield from _inside(shape, first, start, (first + 1) * inner)
        first += 1
    whole = stop // inner
    if whole > first:
        yield RangeBox(first * inner, (first, *([0] * (len(shape) - 1))), (whole - first, *shape[1:]))
    if stop % inner:
        yield from _inside(shape, whole, whole * inner, stop)


def _inside(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[RangeBox]:
    """Boxes of a range that lies within one index of the first dim."""
    before = row * math.prod(shape[1:])
    for box in range_boxes(shape[1:], start - before, stop - before):
        yield RangeBox(before + box.first, (row, *box.offsets), (1, *box.sizes))
