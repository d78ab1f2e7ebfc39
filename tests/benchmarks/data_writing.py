"""What the data benchmark measures of the sharder, and what it is compared with: the same bytes just written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data_pipeline.checksum import best_checksum
from data_pipeline.shard.run import shard
from data_pipeline.shard.tar import ShardWriter
from data_pipeline.sources.base import ArraySpec, Listing, SourceClip, SourceProvenance
from tests.benchmarks.data_clips import (
    CHANNELS,
    FRAMES,
    PATCHES,
    Arrays,
    clip_arrays,
    clip_key,
    clips_in_memory,
    cost,
    made_once,
    npy_path,
)
from tests.benchmarks.data_worker import Result


class ClipsInMemory:
    """A source whose clips need no reading."""

    kind = "memory"
    provenance = SourceProvenance(encoder="random", encode_mode="per-frame", action_alignment="first")

    def __init__(self, clips: Sequence[Arrays]) -> None:
        self._clips = {clip_key(number): _framed(arrays) for number, arrays in enumerate(clips)}

    def listing(self) -> Listing:
        return Listing([self._listed(key, arrays) for key, arrays in self._clips.items()])

    def read(self, clip: SourceClip) -> dict[str, np.ndarray]:
        return self._clips[clip.key]

    def _listed(self, key: str, arrays: Arrays) -> SourceClip:
        specs = {name: ArraySpec(array.dtype.name, array.shape) for name, array in arrays.items()}
        return SourceClip(key, "base", "train", specs, "", key)


class MadeClips(ClipsInMemory):
    """A source that makes each clip when it is read, so that a data set may be larger than memory."""

    def __init__(self, count: int) -> None:
        super().__init__([])
        self._count = count

    def listing(self) -> Listing:
        like = _framed(clip_arrays(0))
        return Listing([self._listed(clip_key(number), like) for number in range(self._count)])

    def read(self, clip: SourceClip) -> dict[str, np.ndarray]:
        return _framed(clip_arrays(int(clip.key.rpartition("_")[2])))


def make_shards(folder: str, clips: int) -> Result:
    """Make the data set that everything reads, in two shards at least."""
    half = min(128, clips // 2)
    made_once(Path(folder), lambda out: shard(MadeClips(clips), out, clips_per_shard=half, statistics="sample"))
    return {}


def make_npy(folder: str, clips: int) -> Result:
    """Make a folder with two .npy files a clip."""

    def build(out: Path) -> None:
        for number in range(clips):
            for name, array in _framed(clip_arrays(number)).items():
                np.save(npy_path(out, number, name), array)

    made_once(Path(folder), build)
    return {}


def plain_write(scratch: str, folder: str, clips: int) -> Result:
    """Write the values of all clips to one file, clip by clip: what no writer can do without."""
    sources = clips_in_memory(folder, clips)

    def write(out: Path) -> None:
        descriptor = os.open(out / "values", os.O_WRONLY | os.O_CREAT)
        try:
            for arrays in sources:
                views = [array.reshape(-1).view(np.uint8).data for array in arrays.values()]
                if os.writev(descriptor, views) != sum(view.nbytes for view in views):
                    raise OSError("the file system took only a part of a clip")
        finally:
            os.close(descriptor)

    return _written(scratch, write)


def core(scratch: str, folder: str, clips: int) -> Result:
    """Write one aligned tar with checksums of the fields, and nothing else that the sharder does."""
    sources = [_framed(arrays) for arrays in clips_in_memory(folder, clips)]

    def write(out: Path) -> None:
        writer = ShardWriter(out / "train-000000.tar", best_checksum(), sha256=False)
        for number, arrays in enumerate(sources):
            writer.add(clip_key(number), arrays, json.dumps({"key": clip_key(number)}).encode())
        writer.finish()

    return _written(scratch, write)


def sharder(scratch: str, folder: str, clips: int) -> Result:
    """Write a data set as configured: finite values checked, checksums, sha256, statistics over an eighth, index."""
    source = ClipsInMemory(clips_in_memory(folder, clips))
    return _written(scratch, lambda out: shard(source, out / "data", statistics="sample"))


def copy(scratch: str, folder: str, clips: int) -> Result:
    """Copy a folder of .npy files with cp, all of it.

    Raises:
        RuntimeError: It holds another number of clips.
    """
    if len(list(Path(folder).iterdir())) != 2 * clips:
        raise RuntimeError(f"{folder} does not hold {clips} clips")
    return _written(scratch, lambda out: subprocess.run(["cp", "-r", folder, str(out / "copy")], check=True))


def from_npy(
    scratch: str, folder: str, clips: int, *, workers: int = 1, cores: int | None = None, shards: int = 1
) -> Result:
    """Write a data set from .npy files.

    Args:
        scratch: Folder on a file system in memory.
        folder: Of `make_npy`.
        clips: In it.
        workers: Processes.
        cores: Processor cores that one worker may use; None leaves all.
        shards: Of the data set.

    Raises:
        RuntimeError: There are fewer cores.
    """
    size = -(-clips // shards)
    with _on_cores(cores):
        return _written(
            scratch,
            lambda out: shard(
                Path(folder),
                out / "data",
                clips_per_shard=size,
                statistics="sample",
                workers=workers,
                kind="npy",
                provenance={"action_alignment": "first"},
            ),
        )


def _framed(arrays: Arrays) -> Arrays:
    return arrays | {"features": arrays["features"].reshape(FRAMES, PATCHES, CHANNELS)}


def _written(scratch: str, write: Callable[[Path], object]) -> Result:
    out = Path(tempfile.mkdtemp(prefix="hopescale-benchmark-", dir=scratch))
    try:
        return cost(lambda: write(out))
    finally:
        shutil.rmtree(out)


@contextmanager
def _on_cores(count: int | None) -> Iterator[None]:
    every = os.sched_getaffinity(0)
    if count is not None and len(every) < max(count, 2):
        raise RuntimeError("it needs two processor cores")
    try:
        # Threads started from here on inherit it.
        os.sched_setaffinity(0, every if count is None else sorted(every)[:count])
        yield
    finally:
        os.sched_setaffinity(0, every)
