"""The clips of the data benchmark, and what measuring has in common in every interpreter: numpy and torch alone."""

from __future__ import annotations

import gc
import resource
import shutil
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import numpy as np
import torch

FRAMES, PATCHES, CHANNELS, ACTION_DIM = 8, 256, 1024, 2
TOKENS = FRAMES * PATCHES
BATCH = 8
PAGE = 4096

Arrays = dict[str, np.ndarray]


def clip_key(number: int) -> str:
    """Return the key of a clip."""
    return f"clip_{number:05d}"


def clip_arrays(number: int) -> Arrays:
    """Return f16 features `[2048, 1024]` and f32 actions `[8, 2]`, the same for a number in every process."""
    random = np.random.default_rng(number)
    bits = random.integers(0, 1 << 16, (TOKENS, CHANNELS), np.uint16)
    # Without the highest bit of the exponent every pattern is a number below 2.
    bits &= 0xBFFF
    return {"features": bits.view(np.float16), "actions": random.standard_normal((FRAMES, ACTION_DIM), np.float32)}


def npy_path(folder: Path, number: int, field: str) -> Path:
    """Return where a field of a clip lies in a folder of .npy files."""
    return folder / f"{clip_key(number)}{'' if field == 'features' else f'_{field}'}.npy"


@cache
def clips_in_memory(folder: str, count: int) -> list[Arrays]:
    """Return the first clips of a folder of .npy files; the writers' sources.

    They are read, not made: what a process has allocated before decides how fast it gets memory later.
    """
    fields = ("features", "actions")
    return [{name: np.load(npy_path(Path(folder), number, name)) for name in fields} for number in range(count)]


def payload_bytes(count: int) -> int:
    """Return the bytes of the values of some clips."""
    return count * (TOKENS * CHANNELS * 2 + FRAMES * ACTION_DIM * 4)


def made_once(folder: Path, build: Callable[[Path], object]) -> Path:
    """Return `folder`, which `build` fills if it is absent; under its name it is always complete."""
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        build(unfinished)
        unfinished.rename(folder)
    return folder


def touch(features: torch.Tensor) -> int:
    """Read one byte of each page of a batch, as the least a consumer can do; return the number of clips."""
    features.view(torch.uint8).view(-1)[::PAGE].sum()
    return len(features)


def consumed(batches: Iterable[torch.Tensor], clips: int) -> None:
    """Touch every batch.

    Raises:
        RuntimeError: There were more or fewer clips: the time would be that of something else.
    """
    got = sum(map(touch, batches))
    if got != clips:
        raise RuntimeError(f"{got} clips came instead of {clips}")


def cost(run: Callable[[], object], first: Callable[[], object] | None = None) -> dict[str, float]:
    """Return wall-clock seconds of a run, and processor seconds of all its threads and of children that ended.

    Args:
        run: What is measured.
        first: Runs before it, without a pause in which something could be made ahead, and does not count.
    """
    gc.collect()
    if first is not None:
        first()
    before, started = processor_seconds(), time.perf_counter()
    run()
    return {"seconds": time.perf_counter() - started, "cpu": processor_seconds() - before}


def processor_seconds() -> float:
    """Return processor seconds of this process and of its children that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
