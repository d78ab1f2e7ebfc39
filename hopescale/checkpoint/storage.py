"""DCP storage without pickle: raw tensor bytes in one file a rank, and their places in JSON.

PyTorch's file storage keeps its metadata as a pickle and its tensors as torch.save archives. Here a checkpoint holds
`rank-00000.bin` (contiguous little-endian tensor bytes, 64-byte aligned) and `tensors.json`; loading can only ever
produce tensors of the listed dtypes and shapes.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from hopescale.errors import CheckpointError, Problem

TENSORS_FILE = "tensors.json"
ALIGNMENT = 64
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float64, torch.bfloat16, torch.int64)}


@dataclass(frozen=True)
class Piece:
    """Where one box of a tensor lies: at `start` of the tensor, at byte `begin` of `file`."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    begin: int
    num_bytes: int


class RawWriter(StorageWriter):
    """Writes the pieces a rank owns into one file of a fresh folder."""

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__()
        self.folder, self.file = folder, f"rank-{rank:05d}.bin"

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing to reset: a writer serves one save."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: the checkpoint manager makes the folder."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuse entries that are not tensors; those belong in the manifest."""
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                raise TypeError(f"{item.index.fqn} is not a tensor; put it into RunState")
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Keep the plans: every rank writes a file of its own."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's pieces one after the other and sync the file."""
        results = []
        with (self.folder / self.file).open("xb") as stream:
            for item in plan.items:
                tensor = cast(Tensor, planner.resolve_data(item)).detach().cpu().contiguous()
                stream.write(bytes(-stream.tell() % ALIGNMENT))
                piece = Piece(
                    start=tuple(item.index.offset or (0,) * tensor.ndim),
                    shape=tuple(tensor.shape),
                    file=self.file,
                    begin=stream.tell(),
                    num_bytes=tensor.nbytes,
                )
                stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
                results.append(WriteResult(item.index, tensor.nbytes, piece))
            stream.flush()
            os.fsync(stream.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the list of tensors (the first rank only, after all ranks have written)."""
        listed: dict[str, dict[str, Any]] = {}
        for name, entry in metadata.state_dict_metadata.items():
            entry = cast(TensorStorageMetadata, entry)
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            listed[name] = {"dtype": dtype, "shape": list(entry.size), "pieces": []}
        for result in (r for rank in results for r in rank):
            listed[result.index.fqn]["pieces"].append(vars(result.storage_data))
        with (self.folder / TENSORS_FILE).open("x") as stream:
            json.dump(listed, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """Only writers made explicitly are used."""
        return False


class RawReader(StorageReader):
    """Reads what `RawWriter` wrote, on any number of ranks."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.dtypes: dict[str, torch.dtype] = {}
        self.pieces: dict[MetadataIndex, Piece] = {}

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing to reset: a reader serves one load."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Parse the list of tensors.

        Raises:
            CheckpointError: an entry with an unknown dtype, or whose sizes do not agree with each other.
        """
        entries: dict[str, Any] = {}
        for name, (dtype, shape, pieces) in _parse_list(self.folder).items():
            self.dtypes[name] = dtype
            self.pieces |= {MetadataIndex(name, piece.start): piece for piece in pieces}
            chunks = [ChunkStorageMetadata(torch.Size(p.start), torch.Size(p.shape)) for p in pieces]
            entries[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), chunks)
        return Metadata(entries, storage_data=self.pieces)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: pieces were listed by `read_metadata`, the first rank's by its broadcast copy."""
        self.pieces = metadata.storage_data
        self.dtypes = {
            name: cast(TensorStorageMetadata, entry).properties.dtype
            for name, entry in metadata.state_dict_metadata.items()
        }

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Keep the plan."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Keep the plans: every rank reads what it needs."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the asked boxes into place."""
        for request in plan.items:
            target = planner.resolve_tensor(request).detach()
            target.copy_(self._read(request))
            planner.commit_tensor(request, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, request: ReadItem) -> Tensor:
        """The asked box of a piece, whose bytes are in memory once and gone before the next one's."""
        piece = self.pieces[request.storage_index]
        stored = torch.empty(piece.shape, dtype=self.dtypes[request.storage_index.fqn])
        left = stored.reshape(-1).view(torch.uint8).numpy().data
        with (self.folder / piece.file).open("rb", buffering=0) as stream:
            stream.seek(piece.begin)
            while left.nbytes:
                count = stream.readinto(left)
                if not count:
                    raise EOFError(f"{stream.name} became shorter: {left.nbytes} bytes of a piece are missing")
                left = left[count:]
        for dim, (start, length) in enumerate(zip(request.storage_offsets, request.lengths, strict=True)):
            stored = stored.narrow(dim, start, length)
        return stored

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """Only readers made explicitly are used."""
        return False


def _parse_list(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], list[Piece]]]:
    path = folder / TENSORS_FILE
    try:
        raw = json.loads(path.read_text())
        return {name: _parse_entry(folder, entry) for name, entry in raw.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        rule = f"is not a list of tensors and of pieces that fill each of them ({error!r})"
        raise CheckpointError(Problem("checkpoint", path, rule, "use another checkpoint")) from error


def _parse_entry(folder: Path, entry: dict[str, Any]) -> tuple[torch.dtype, tuple[int, ...], list[Piece]]:
    dtype, shape = DTYPES[entry["dtype"]], _sizes(entry["shape"])
    pieces = [_parse_piece(folder, dtype, shape, piece) for piece in entry["pieces"]]
    if _overlap(pieces) or sum(math.prod(p.shape) for p in pieces) != math.prod(shape):
        raise ValueError(f"pieces that do not fill {list(shape)} exactly once")
    return dtype, shape, pieces


def _parse_piece(folder: Path, dtype: torch.dtype, whole: tuple[int, ...], raw: dict[str, Any]) -> Piece:
    start, shape, (begin, num_bytes) = (
        _sizes(raw["start"]),
        _sizes(raw["shape"]),
        _sizes([raw["begin"], raw["num_bytes"]]),
    )
    path = folder / raw["file"]
    plain = raw["file"] == path.name and path.is_file() and not path.is_symlink()
    inside = all(s + n <= w for s, n, w in zip(start, shape, whole, strict=True))
    fits = math.prod(shape) * dtype.itemsize == num_bytes
    if not (plain and inside and fits and begin + num_bytes <= path.stat().st_size):
        raise ValueError(f"a piece that does not fit its tensor or its file: {raw}")
    return Piece(start, shape, raw["file"], begin, num_bytes)


def _overlap(pieces: list[Piece]) -> bool:
    """Whether two of the boxes share an element."""
    filled = [p for p in pieces if math.prod(p.shape)]
    if not filled:
        return False
    starts = np.array([p.start for p in filled])
    ends = starts + np.array([p.shape for p in filled])
    shared = np.maximum(starts[:, None], starts) < np.minimum(ends[:, None], ends)
    return int(shared.all(axis=-1).sum()) > len(filled)


def _sizes(values: list[Any]) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values} are not sizes")
    return tuple(values)
