"""What the data benchmark measures of order and resumption, on an index of a million clips over a few small shards."""

from __future__ import annotations

import hashlib
import time
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.cache import write_bytes
from data_pipeline.dataset.index import FIELD_COLUMNS, FRAME_COLUMN, INDEX_FOLDER, KEYS_FILE, save_array
from data_pipeline.dataset.manifest import write_manifest
from data_pipeline.order import epoch_order, uid
from data_pipeline.reader.batches import GlobalBatches
from data_pipeline.reader.clips import ClipReader
from data_pipeline.schema import DataConfig
from tests.benchmarks.data_clips import made_once
from tests.benchmarks.data_worker import Result
from tests.small_dataset import write_dataset

REAL_CLIPS = 64
GLOBAL_BATCH, MICRO_BATCH = 64, 8
FAR_EPOCH = 10_000


def make_index(folder: str, rows: int) -> Result:
    """Make a data set whose index has so many rows, a multiple of 64, over shards of 64 clips."""
    made_once(Path(folder), lambda out: _write_index(out, rows))
    return {}


def resume(folder: str, epoch: int, share: float) -> Result:
    """Load a state as a new process would and take the first step; seconds with and without opening the data set.

    Args:
        folder: Of `make_index`.
        epoch: Epochs before the position.
        share: Of the epoch before the position.
    """
    started = time.perf_counter()
    reader = ClipReader(DataConfig(path=folder), split="train", seed=0)
    position = int((epoch + share) * reader.num_clips) // GLOBAL_BATCH * GLOBAL_BATCH
    batches = GlobalBatches(reader, global_batch=GLOBAL_BATCH, rank=0, world_size=1, micro_batch=MICRO_BATCH)
    opened = time.perf_counter()
    with closing(batches):
        batches.load_state_dict(batches.state_dict() | {"position": position})
        step = next(batches)
        ended = time.perf_counter()
    if step.position != position:
        raise RuntimeError(f"the first step is at {step.position} instead of {position}")
    return {"seconds": ended - opened, "with_opening": ended - started}


def order(rows: int, epoch: int) -> Result:
    """Compute the order of an epoch."""
    uids = _uids(rows)
    started = time.perf_counter()
    epoch_order(uids, 0, epoch)
    return {"seconds": time.perf_counter() - started}


@cache
def _uids(rows: int) -> NDArray[np.uint64]:
    return np.random.default_rng(rows).integers(0, 1 << 64, rows, np.uint64)


def _write_index(out: Path, rows: int) -> None:
    if rows % REAL_CLIPS:
        raise ValueError(f"{rows} rows are no multiple of {REAL_CLIPS}")
    small = write_dataset(out, clips=REAL_CLIPS, heldout=0, partitions=("base",), frames=8, clips_per_shard=16)
    times = rows // REAL_CLIPS
    keys = [f"clip_{number:08d}" for number in range(rows)]
    columns = {
        "uid": np.array([uid(key) for key in keys], np.uint64),
        "key_end": np.cumsum([len(key) + 1 for key in keys], dtype=np.int64) - 1,
    }
    kept = ["shard", "length", "partition", "split", "rows"]
    kept += [f"{name}_{part}" for name in small.dtypes for part in FIELD_COLUMNS]
    for column in kept:
        columns[column] = np.repeat(_column(out, column), times)
    columns[FRAME_COLUMN] = np.repeat(_column(out, FRAME_COLUMN).reshape(REAL_CLIPS, -1), times, axis=0).reshape(-1)
    files = dict(small.files)
    for column, values in columns.items():
        name = f"{INDEX_FOLDER}/{column}.npy"
        files[name] = save_array(out / name, values)
    text = "".join(f"{key}\n" for key in keys).encode("ascii")
    write_bytes(out / KEYS_FILE, text)
    files[KEYS_FILE] = hashlib.sha256(text).hexdigest()
    shards = tuple(replace(entry, num_clips=entry.num_clips * times) for entry in small.shards)
    partitions = {"base": {"train": rows, "heldout": 0}}
    write_manifest(out, replace(small, num_clips=rows, shards=shards, partitions=partitions, files=files))


def _column(out: Path, name: str) -> np.ndarray:
    return np.load(out / INDEX_FOLDER / f"{name}.npy", allow_pickle=False)
