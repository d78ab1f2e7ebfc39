"""The benchmark's processes in the interpreter of the rivals: no import from hopescale or its data pipeline.

`python -m tests.benchmarks.data_rivals --versions` prints what is installed, and fails if something is not.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from tests.benchmarks.data_clips import (
    ACTION_DIM,
    BATCH,
    CHANNELS,
    FRAMES,
    TOKENS,
    Arrays,
    clip_arrays,
    clip_key,
    clips_in_memory,
    consumed,
    cost,
    made_once,
)
from tests.benchmarks.data_worker import Result, serve

SHARD_CLIPS = 128
SHARD_BYTES = 512 << 20
_DEFINED: list[torch.library.Library] = []
MODULES = {"webdataset": "webdataset", "litdata": "litdata", "mosaicml-streaming": "streaming", "zarr": "zarr"}


def versions() -> Result:
    """Return the version of each rival that can be imported, and why the others cannot."""
    installed, absent = {}, {}
    for name in MODULES:
        try:
            _module(name)
            installed[name] = version(name)
        except Exception as error:  # a library that is there may still fail in any way of its own
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return {"installed": installed, "absent": absent}


def make(library: str, folder: str, clips: int) -> Result:
    """Write clips with a rival's own writer, uncompressed, in files of about half a GiB, for reading."""
    made_once(Path(folder), lambda out: _WRITERS[library](out, map(clip_arrays, range(clips)), clips))
    return {}


def write(library: str, scratch: str, folder: str, clips: int) -> Result:
    """Write clips of a folder of .npy files, which are in memory then, in the same way."""
    sources = clips_in_memory(folder, clips)
    _module(library)
    out = Path(tempfile.mkdtemp(prefix="hopescale-benchmark-", dir=scratch))
    try:
        return cost(lambda: _WRITERS[library](out, sources, clips))
    finally:
        shutil.rmtree(out)


def read(library: str, folder: str, clips: int, workers: int) -> Result:
    """Read one epoch through the loader that the rival's documentation recommends, in the order of its files."""
    loader = _loader(library, folder, workers)
    return cost(lambda: consumed((_features_of(batch) for batch in loader), clips))


@cache
def _module(name: str) -> Any:
    if name != "mosaicml-streaming":
        return importlib.import_module(MODULES[name])
    try:
        return importlib.import_module("streaming")
    except RuntimeError:
        # It needs torchvision for data sets of images. The one on PyPI is built for CUDA: beside a torch for the CPU it
        # lacks operators that its own import asks for and that nothing here calls.
        for half in [module for module in sys.modules if module.split(".")[0] in ("streaming", "torchvision")]:
            del sys.modules[half]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        # What a library has defined goes when it does.
        _DEFINED.append(library)
        return importlib.import_module("streaming")


def _write_tars(out: Path, sources: Iterable[Arrays], clips: int) -> None:
    # Half of them in a file where there are few, for each of two workers needs one.
    count = min(SHARD_CLIPS, -(-clips // 2))
    with _module("webdataset").ShardWriter(str(out / "clips-%06d.tar"), maxcount=count, verbose=0) as writer:
        for number, arrays in enumerate(sources):
            named = {f"{name}.npy": array for name, array in arrays.items()}
            writer.write({"__key__": clip_key(number), **named, "meta.json": {"key": clip_key(number)}})


def _write_chunks(out: Path, sources: Iterable[Arrays], clips: int) -> None:
    _module("litdata")
    writer = importlib.import_module("litdata.streaming.writer").BinaryWriter(str(out), chunk_bytes=SHARD_BYTES)
    for number, arrays in enumerate(sources):
        writer[number] = arrays
    writer.done()
    writer.merge(1)


def _write_mds(out: Path, sources: Iterable[Arrays], clips: int) -> None:
    columns = {
        "features": f"ndarray:float16:{TOKENS},{CHANNELS}",
        "actions": f"ndarray:float32:{FRAMES},{ACTION_DIM}",
    }
    # Its writer wants to make the folder itself.
    with _module("mosaicml-streaming").MDSWriter(
        out=str(out / "mds"), columns=columns, size_limit=SHARD_BYTES
    ) as writer:
        for arrays in sources:
            writer.write(arrays)


def _write_zarr(out: Path, sources: Iterable[Arrays], clips: int) -> None:
    group = _module("zarr").create_group(str(out / "clips.zarr"))
    shapes = {"features": (TOKENS, CHANNELS), "actions": (FRAMES, ACTION_DIM)}
    types = {"features": "float16", "actions": "float32"}
    arrays = {
        name: group.create_array(
            name, shape=(clips, *shape), chunks=(1, *shape), dtype=types[name], compressors=None, filters=None
        )
        for name, shape in shapes.items()
    }
    for number, clip in enumerate(sources):
        for name, values in clip.items():
            arrays[name][number] = values


@cache
def _loader(library: str, folder: str, workers: int) -> Any:
    # Processes that start anew with every epoch would be counted with it.
    return _LOADERS[library](folder, {"num_workers": workers, "persistent_workers": workers > 0})


def _tars(folder: str, workers: dict[str, Any]) -> Any:
    webdataset = _module("webdataset")
    files = sorted(str(path) for path in Path(folder).rglob("*.tar"))
    clips = webdataset.WebDataset(files, shardshuffle=False).decode()
    batches = clips.to_tuple("features.npy", "actions.npy").batched(BATCH)
    return webdataset.WebLoader(batches, batch_size=None, **workers)


def _chunks(folder: str, workers: dict[str, Any]) -> Any:
    litdata = _module("litdata")
    return litdata.StreamingDataLoader(litdata.StreamingDataset(folder, shuffle=False), batch_size=BATCH, **workers)


def _mds(folder: str, workers: dict[str, Any]) -> Any:
    # It refuses a folder that another process has open.
    own = Path(folder) / f"mds-{workers['num_workers']}"
    if not own.is_symlink():
        os.symlink("mds", own)
    clips = _module("mosaicml-streaming").StreamingDataset(local=str(own), shuffle=False, batch_size=BATCH)
    return DataLoader(clips, batch_size=BATCH, **workers)


def _zarr(folder: str, workers: dict[str, Any]) -> Any:
    return DataLoader(
        _ZarrClips(_module("zarr").open_group(str(Path(folder) / "clips.zarr"), mode="r")), BATCH, **workers
    )


class _ZarrClips(Dataset[tuple[Any, Any]]):
    def __init__(self, group: Any) -> None:
        self._features, self._actions = group["features"], group["actions"]

    def __len__(self) -> int:
        return self._features.shape[0]

    def __getitem__(self, number: int) -> tuple[Any, Any]:
        return self._features[number], self._actions[number]


def _features_of(batch: Any) -> torch.Tensor:
    return torch.as_tensor(batch["features"] if isinstance(batch, dict) else batch[0])


_WRITERS = {"webdataset": _write_tars, "litdata": _write_chunks, "mosaicml-streaming": _write_mds, "zarr": _write_zarr}
_LOADERS = {"webdataset": _tars, "litdata": _chunks, "mosaicml-streaming": _mds, "zarr": _zarr}
JOBS: dict[str, Callable[..., Result]] = {job.__name__: job for job in (make, read, versions, write)}

if __name__ == "__main__":
    if sys.argv[1:] == ["--versions"]:
        found = versions()
        for name, text in {**found["installed"], **found["absent"]}.items():
            print(f"{name} {text}")
        sys.exit(bool(found["absent"]))
    serve(JOBS)
