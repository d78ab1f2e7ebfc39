"""Several worker processes on one data set."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from data_pipeline.errors import DataError
from data_pipeline.shard import shard
from data_pipeline.sources.base import SourceClip
from data_pipeline.stats import SharderStats
from tests.clip_sources import MemorySource, memory_source

REPO_ROOT = Path(__file__).resolve().parents[4]


@dataclass
class DeadlySource(MemorySource):
    """Ends the process that reads one of its clips."""

    deadly: str = ""

    def read(self, clip: SourceClip) -> dict[str, np.ndarray]:
        if clip.key == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(clip)


@dataclass
class FaultySource(MemorySource):
    """Has a mistake in its program."""

    def read(self, clip: SourceClip) -> dict[str, np.ndarray]:
        raise ZeroDivisionError(clip.key)


def _as(kind: type[MemorySource], source: MemorySource, **more: object) -> MemorySource:
    return kind(source.clips, source.arrays, source.provenance, **more)  # pyright: ignore[reportArgumentType]


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_workers_write_the_bytes_of_one_and_tell_what_they_do(tmp_path: Path) -> None:
    source = memory_source(17, dtype="float32")
    seen: list[SharderStats] = []
    done: list[int] = []
    for workers in (1, 2):
        shard(
            source,
            tmp_path / str(workers),
            clips_per_shard=3,
            dtype="int8",
            workers=workers,
            report=seen.append,
            progress=lambda count, total: done.append(count),
        )
    assert _files(tmp_path / "1") == _files(tmp_path / "2")
    assert done == [*range(1, 18), *range(1, 18)]
    assert (seen[-1].clips, seen[-1].shards, seen[-1].bad) == (17, 6, 0)
    assert seen[-1].bytes == sum(path.stat().st_size for path in (tmp_path / "2" / "shards").iterdir())


def test_errors_of_workers_reach_the_user_and_end_the_others(tmp_path: Path) -> None:
    source = memory_source(12)
    broken = replace(source, unreadable=frozenset({source.clips[5].key}))
    with pytest.raises(DataError, match="the file ends too early"):
        shard(broken, tmp_path / "a", clips_per_shard=2, workers=2)
    with pytest.raises(DataError, match=r"a worker ended with exit code -9 while it wrote train-00000\d"):
        shard(_as(DeadlySource, source, deadly=source.clips[3].key), tmp_path / "c", clips_per_shard=2, workers=2)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        shard(_as(FaultySource, source), tmp_path / "b", clips_per_shard=2, workers=2)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".lock")]
    servers = [child for child in psutil.Process().children() if "forkserver" in " ".join(child.cmdline())]
    assert servers
    assert not [worker for server in servers for worker in server.children()]
    assert shard(source, tmp_path / "a", clips_per_shard=2, workers=2).num_clips == 12


def test_workers_end_with_their_sharder_and_the_next_one_goes_on(tmp_path: Path) -> None:
    program = (
        "import sys; from dataclasses import replace; from pathlib import Path\n"
        "from data_pipeline.shard import shard; from tests.clip_sources import memory_source\n"
        "if __name__ == '__main__':\n"
        "    print('started', flush=True)\n"
        "    shard(replace(memory_source(60), seconds=0.05), Path(sys.argv[1]), clips_per_shard=6, workers=2,\n"
        "          progress=lambda done, total: print(done, flush=True))\n"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT)}
    with subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "out")], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() not in ("14", ""):
            pass
        process.kill()
    manifest = shard(memory_source(60), tmp_path / "out", clips_per_shard=6)
    assert manifest.num_clips == 60
    shard(memory_source(60), tmp_path / "whole", clips_per_shard=6)
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")
