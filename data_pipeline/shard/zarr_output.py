"""Data sets as one zarr v3 group, for analysis: arrays `[clips, ...]`, a chunk a clip, a file for each shard of clips.

Shard files follow the specification of the `sharding_indexed` codec of zarr v3 (inner codec `bytes`, index at the end,
with crc32c) and are streamed: zarr's own writer would hold a whole shard in memory. Metadata and small arrays are
zarr's.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.cache import sync_path
from data_pipeline.checksum import ChecksumName, checksum_function
from data_pipeline.dataset.group_files import GROUP
from data_pipeline.dataset.manifest import SHARD_FOLDER
from data_pipeline.dtypes import STORED_TYPES
from data_pipeline.errors import missing_extra
from data_pipeline.schema import SPLITS
from data_pipeline.shard.journal import WrittenClip, WrittenFile
from data_pipeline.shard.plan import Plan
from data_pipeline.shard.stream import HashedFile
from data_pipeline.shard.tar import Payload, measured

_ABSENT = (1 << 64) - 1
_EVERY_CHUNK = {"write_empty_chunks": True}
"""So that a chunk that is not there is a chunk that was lost."""


def array_shape(plan: Plan, name: str) -> tuple[int, ...]:
    """Return the shape of one clip's chunk of a field, padded to the longest clip."""
    rows = {"actions": plan.rows, "extrinsics": plan.frames - 1, "features_scale": None}.get(name, plan.frames)
    return (*(() if rows is None else (rows,)), *plan.fields[name].shape)


class ZarrShardWriter:
    """Writes one shard of clips of every field: `add` clips in order, then `finish`."""

    def __init__(self, out: Path, plan: Plan, number: int) -> None:
        """Start a shard.

        Args:
            out: Folder of the data set.
            plan: Of the data set.
            number: Of the shard.
        """
        self.num_clips = 0
        self._checksum_name: ChecksumName = plan.checksum
        self._checksum = checksum_function(plan.checksum)
        self._size = plan.settings.clips_per_shard
        self._first = number * self._size
        self._chunks = {
            name: math.prod(array_shape(plan, name)) * STORED_TYPES[planned.stored].itemsize
            for name, planned in plan.fields.items()
        }
        self._index = {name: [(_ABSENT, _ABSENT)] * self._size for name in plan.fields}
        self._paths = {name: _shard_file(plan, name, number) for name in plan.fields}
        self._files: dict[str, HashedFile] = {}
        folder, shard = out / SHARD_FOLDER, plan.shards[number].name
        for name, path in self._paths.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            # Beside the group: a reader that lists it meets complete files only.
            self._files[name] = HashedFile(folder / path, folder / f"{shard}.{name}.tmp")

    def add(self, arrays: Mapping[str, np.ndarray], place: int) -> dict[str, Payload]:
        """Append one clip.

        Args:
            arrays: As for `ShardWriter.add`.
            place: Of the clip in its shard.

        Returns:
            Bytes and checksums of each field; the offset is the clip's row in the arrays.
        """
        payloads: dict[str, Payload] = {}
        for name, array in arrays.items():
            values, file = array.reshape(-1).view(np.uint8), self._files[name]
            payloads[name] = measured(self._checksum_name, self._checksum, self._first + place, name, array)
            self._index[name][place] = (file.num_bytes, self._chunks[name])
            file.write([values, bytes(self._chunks[name] - len(values))])
        self.num_clips += 1
        return payloads

    def finish(self) -> dict[str, WrittenFile]:
        """Complete every file under its final name, and return them by path below the folder of the shards."""
        import google_crc32c

        written: dict[str, WrittenFile] = {}
        for name, file in self._files.items():
            index = np.array(self._index[name], "<u8").tobytes()
            file.write([index + google_crc32c.value(index).to_bytes(4, "little")])
            sha256 = file.finish()
            written[self._paths[name]] = WrittenFile(file.num_bytes, sha256)
        return written

    def discard(self) -> None:
        """Remove an unfinished shard."""
        for file in self._files.values():
            file.discard()


def write_group(out: Path, plan: Plan, clips: Mapping[int, WrittenClip]) -> None:
    """Write the metadata of the group and its small arrays, and make all of it safe against a power cut.

    Args:
        out: Folder of the data set.
        plan: Of the data set.
        clips: By row of the arrays; rows of clips that were left out keep zeros, and their length is 0.

    Raises:
        MissingExtra: zarr is not installed.
    """
    folder, temporary = out / SHARD_FOLDER / GROUP, out / SHARD_FOLDER / f"{GROUP}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write_small(_zarr(), temporary, plan, clips)
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                target = folder / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                sync_path(path)
                path.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    # From the bottom up, so that what has a name is there: chunks were written into folders nobody has synced yet.
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            sync_path(path)
    sync_path(folder)
    sync_path(folder.parent)


def _write_small(zarr: Any, folder: Path, plan: Plan, clips: Mapping[int, WrittenClip]) -> None:
    group = zarr.open_group(folder, mode="w", zarr_format=3)
    group.attrs.update(
        {
            "partitions": list(plan.partitions),
            "splits": list(SPLITS),
            "checksum": plan.checksum,
            "action_alignment": plan.action_alignment,
            "encode_mode": plan.provenance.encode_mode,
            "encoder": plan.provenance.encoder,
        }
    )
    rows, each = plan.num_clips, plan.settings.clips_per_shard
    for name, planned in plan.fields.items():
        shape, kind = array_shape(plan, name), STORED_TYPES[planned.stored]
        group.create_array(
            name,
            shape=(rows, *shape),
            chunks=(1, *shape),
            shards=(each, *shape),
            dtype=kind.numpy,
            compressors=None,
            filters=None,
            fill_value=0,
            attributes={"stored_type": kind.name},
        )
    columns: dict[str, np.ndarray] = {
        "length": np.zeros(rows, np.int32),
        "partition": np.zeros(rows, np.int16),
        "rows": np.zeros(rows, np.int32),
        "split": np.zeros(rows, np.int8),
    }
    keys = np.array([""] * rows, dtype=object)
    for row, clip in clips.items():
        keys[row] = clip.key
        columns["length"][row], columns["rows"][row] = clip.length, clip.rows
        columns["partition"][row], columns["split"][row] = clip.partition, SPLITS.index(clip.split)
    for name, column in columns.items():
        group.create_array(name, data=column, chunks=(rows,), compressors=None, config=_EVERY_CHUNK)
    group.create_array("key", shape=(rows,), chunks=(rows,), dtype=str, compressors=None, config=_EVERY_CHUNK)[:] = keys


def require_zarr() -> None:
    """Check that zarr is installed before hours of work depend on it.

    Raises:
        MissingExtra: It is not.
    """
    _zarr()


def _zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise missing_extra("zarr", "zarr", "data sets of format=zarr") from error
    return zarr


def _shard_file(plan: Plan, name: str, number: int) -> str:
    zeros = "/0" * len(array_shape(plan, name))
    return f"{GROUP}/{name}/c/{number}{zeros}"
