"""A folder of small shards, stores that copy them to a node, and processes that use such stores, for tests."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from data_pipeline.reader.fetching import LocalFiles
from data_pipeline.reader.node_folder import NodeFolder
from data_pipeline.reader.staging import StagedShards
from data_pipeline.schema import Manifest, ShardEntry
from tests.small_dataset import write_dataset

SIZE = 5000
NUM_SHARDS = 8
fork = multiprocessing.get_context("fork")


@dataclass
class Files:
    """Eight shards of the same size, and a manifest that lists them."""

    folder: Path
    manifest: Manifest

    def path(self, shard: int) -> Path:
        return self.folder / self.manifest.shards[shard].name

    def damage(self, shard: int) -> None:
        content = bytearray(self.path(shard).read_bytes())
        content[SIZE // 2] ^= 1
        self.path(shard).write_bytes(content)


class Watched(LocalFiles):
    """Notes each read in a file that all processes share, and can hold readers up within one."""

    def __init__(self, folder: Path, log: Path, middle: Callable[[], object] = lambda: None) -> None:
        super().__init__(folder)
        self._log, self._middle = log, middle

    def chunks(self, name: str, nbytes: int) -> Generator[memoryview, None, None]:
        with self._log.open("a") as log:
            log.write(f"{name}\n")
        for chunk in super().chunks(name, nbytes):
            yield chunk[: len(chunk) // 2]
            self._middle()
            yield chunk[len(chunk) // 2 :]


def make_files(folder: Path) -> Files:
    """Write shards of random bytes."""
    folder.mkdir()
    entries = []
    for number in range(NUM_SHARDS):
        content = random.Random(number).randbytes(SIZE)
        (folder / f"{number}.tar").write_bytes(content)
        entries.append(ShardEntry(f"{number}.tar", SIZE, 1, hashlib.sha256(content).hexdigest()))
    return Files(folder, replace(_any_manifest(), shards=tuple(entries)))


@cache
def _any_manifest() -> Manifest:
    with tempfile.TemporaryDirectory() as folder:
        return write_dataset(Path(folder), clips=1, heldout=0)


@contextmanager
def opened(
    files: Files, node: Path, *, room: int | None = None, source: LocalFiles | None = None, ahead: int = 0
) -> Iterator[StagedShards]:
    """A store with room for some shards, which copies nothing ahead unless told otherwise."""
    folder = NodeFolder(node, None if room is None else room * SIZE)
    store = StagedShards(files.manifest, source or LocalFiles(files.folder), folder, ahead=ahead)
    try:
        yield store
    finally:
        store.close()


def read(store: StagedShards, shard: int) -> bytes:
    with os.fdopen(store.open(shard), "rb") as file:
        return file.read()


def on_node(files: Files, node: Path) -> list[int]:
    numbers = {entry.sha256: number for number, entry in enumerate(files.manifest.shards)}
    return sorted(numbers[path.stem] for path in copies(node).glob("*.tar"))


def copies(node: Path) -> Path:
    return node / f"hopescale-{os.getuid()}" / "shards"


def copy_of(files: Files, node: Path, shard: int) -> Path:
    return copies(node) / f"{files.manifest.shards[shard].sha256}.tar"


def start(*targets: Callable[[], None]) -> list[Any]:
    """Run functions in processes of their own; a function that raises ends with an exit code."""
    processes = [fork.Process(target=target) for target in targets]
    for process in processes:
        process.start()
    return processes


def finish(processes: Sequence[Any]) -> None:
    for process in processes:
        process.join(20)
        assert process.exitcode == 0


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
