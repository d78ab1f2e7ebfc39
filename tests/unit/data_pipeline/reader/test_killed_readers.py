"""Readers that are killed at any moment and gone on with by others, of other sizes: no clip is lost or seen twice."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest

from data_pipeline.reader.batches import GlobalBatches, global_order
from data_pipeline.reader.clips import ClipReader
from data_pipeline.schema import DataConfig
from tests.small_dataset import write_dataset

TRIALS, STEPS, BATCH = 100, 12, 5


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder, clips=9, lengths=(3, 4), clips_per_shard=5)
    return folder


def _read_on(dataset: Path, state: dict | None, chance: random.Random, pipe: int) -> NoReturn:
    """In a process of its own: read to the end, and tell each step's clips and the place behind it."""
    world = chance.randint(1, 5)
    reading = {"threads": chance.randint(1, 3), "batches": chance.randint(1, 4), "checksums": chance.random() < 0.5}
    reader = ClipReader(DataConfig.model_validate({"path": str(dataset), "reader": reading}), split="train", seed=3)
    micro = chance.randint(1, 5)
    ranks = [
        GlobalBatches(reader, global_batch=BATCH, rank=rank, world_size=world, micro_batch=micro)
        for rank in range(world)
    ]
    for batches in ranks:
        if state is not None:
            batches.load_state_dict(state)
    while ranks[0].state_dict()["position"] < STEPS * BATCH:
        clips = [
            key
            for batches in ranks
            for batch in next(batches).micro
            for key, weight in zip(batch.keys, batch.weights.tolist(), strict=True)
            if weight
        ]
        os.write(pipe, (json.dumps([clips, ranks[0].state_dict()]) + "\n").encode())
        time.sleep(chance.random() * 0.002)
    os._exit(0)


def _killed_after(seconds: float, read: int, child: int) -> bytes:
    """What the child told before it ended or was killed."""
    told, deadline = b"", time.monotonic() + seconds
    while True:
        ready, _, _ = select.select([read], [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            os.kill(child, signal.SIGKILL)
            deadline = time.monotonic() + 60
            continue
        more = os.read(read, 1 << 16)
        if not more:
            return told
        told += more


def test_a_hundred_killed_readers_hand_out_every_clip_once(dataset: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}", file=sys.stderr)
    chance = random.Random(seed)
    reader = ClipReader(DataConfig(path=str(dataset)), split="train", seed=3)
    expected = [reader.keys[row] for row in global_order(reader, BATCH).at(0, STEPS * BATCH).rows]
    state, found, kills, ends = None, [], 0, 0
    for trial in range(TRIALS):
        read, write = os.pipe()
        own = random.Random(chance.getrandbits(32))
        child = os.fork()
        if child == 0:
            os.close(read)
            _read_on(dataset, state, own, write)
        os.close(write)
        # On a busy machine no reader would come to its end in so short a time: every tenth is let go on.
        told = _killed_after(chance.random() * 0.06 if trial % 10 else 60, read, child)
        os.close(read)
        status = os.waitpid(child, 0)[1]
        kills += os.WIFSIGNALED(status)
        for line in told.splitlines(keepends=True):
            if line.endswith(b"\n"):
                clips, state = json.loads(line)
                found += clips
        assert found == expected[: len(found)]
        assert len(found) == (state["position"] if state else 0)
        if len(found) == len(expected):
            ends, state, found = ends + 1, None, []
    assert kills >= TRIALS // 4
    assert ends >= 1
