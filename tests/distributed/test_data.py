from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.reader.batches import global_order
from data_pipeline.reader.clips import ClipReader
from data_pipeline.schema import DataConfig
from tests.small_dataset import write_dataset

PROGRAM = Path(__file__).with_name("data_program.py")
CLIPS, BATCH, STEPS = 24, 5, 14
pytestmark = [pytest.mark.distributed, pytest.mark.requires("2ranks")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of the shapes that experiment=demo expects: 24 to train on, in shards of 5."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, clips=12, heldout=2, frames=8, tokens=64, channels=112, clips_per_shard=5)
    return folder


@pytest.fixture
def run(torchrun, tmp_path: Path, data: Path) -> Callable:
    """Train: run(2, "name", "never", "train.steps=3") returns the ended launcher."""

    def start(num_ranks: int, name: str, kill: str, *overrides: str, path: Path = data):
        record = tmp_path / f"{name}-record" / f"{len(list(tmp_path.glob(f'{name}-record/*'))):03d}"
        record.mkdir(parents=True)
        settings = ["experiment=demo", f"data.path={path}", f"run.dir={tmp_path / name}", "metrics.port=0"]
        settings += [f"train.global_batch={BATCH}", f"train.steps={STEPS}", "train.eval_every=0", "checkpoint.every=2"]
        settings += ["metrics.tensorboard=false", *overrides]
        return torchrun(num_ranks, PROGRAM, str(record), kill, *settings, timeout=200)

    return start


def _assert_killed(ended: subprocess.CompletedProcess[str]) -> None:
    """That a rank was killed, and that nothing else went wrong."""
    assert ended.returncode != 0
    assert "Signal 9 (SIGKILL)" in ended.stderr, ended.stderr[-3000:]


def _handed_out(record: Path) -> list[list[tuple[int, str]]]:
    """Clips of each run, over its ranks, step by step in the order of their positions."""
    runs: dict[str, dict[int, list[tuple[int, str]]]] = {}
    for path in sorted(record.glob("*/*")):
        steps = runs.setdefault(path.parent.name, {})
        for line in path.read_text().splitlines():
            first, clips = json.loads(line)
            steps.setdefault(first, []).extend((position, key) for position, key in clips)
    return [[pair for first in sorted(steps) for pair in sorted(steps[first])] for _, steps in sorted(runs.items())]


def _kept(runs: list[list[tuple[int, str]]]) -> list[tuple[int, str]]:
    """What counts of several runs: each goes on from where a checkpoint was, whatever its predecessor did after it."""
    kept: list[tuple[int, str]] = []
    for clips in runs:
        kept = [pair for pair in kept if not clips or pair[0] < clips[0][0]] + clips
    return kept


def test_killed_runs_go_on_with_exactly_the_clips_that_are_left(run: Callable, tmp_path: Path, data: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    # Ranks, and the batch at which one of them dies: early, then within the first epoch.
    chain = [(2, 1, 3), (4, 3, 4), (1, 2, 3)]
    for ranks, least, most in chain:
        kill = f"{chance.randrange(ranks)}:{chance.randint(least, most)}:{chance.choice(['data', 'step', 'save'])}"
        if kill.endswith("save"):
            # Checkpoints are written after every second step of the whole run, and a run starts behind one.
            kill = f"{kill.split(':')[0]}:{2 * chance.randint(1, most // 2)}:save"
        print(f"{ranks} ranks, kill {kill}")
        _assert_killed(run(ranks, "killed", kill))
    # One more, which dies beyond the end of the first epoch wherever the others have come to.
    committed = (tmp_path / "killed" / "checkpoints").glob("step-" + 9 * "[0-9]")
    reached = max((int(folder.name.removeprefix("step-")) for folder in committed), default=0)
    _assert_killed(run(2, "killed", f"0:{max(CLIPS // BATCH + 2 - reached, 1)}:step"))
    ended = run(2, "killed", "never")
    assert ended.returncode == 0, ended.stderr[-3000:]

    runs = _handed_out(tmp_path / "killed-record")
    assert runs[-2][-1][0] >= CLIPS > runs[0][-1][0]
    reader = ClipReader(DataConfig(path=str(data)), split="train", seed=0)
    positions, keys = zip(*_kept(runs), strict=True)
    assert positions == tuple(range(BATCH * STEPS))
    rows = global_order(reader, BATCH).at(0, BATCH * STEPS).rows
    assert list(keys) == [reader.keys[row] for row in rows]
    for epoch in range(BATCH * STEPS // CLIPS):
        assert sorted(keys[epoch * CLIPS : (epoch + 1) * CLIPS]) == sorted(reader.keys)
    last = json.loads((tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == STEPS


def test_one_bad_clip_ends_all_ranks_with_its_name(run: Callable, tmp_path: Path, data: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    offset = int(np.load(copy / "index" / "features_offset.npy")[6])
    with (copy / "shards" / "train-000001.tar").open("r+b") as file:
        file.seek(offset + 100)
        file.write(b"\xff\xff\xff\xff")
    ended = run(2, "bad", "never", path=copy)
    assert ended.returncode != 0
    status = json.loads((tmp_path / "bad" / "status.json").read_text())
    assert (status["state"], status["code"]) == ("failed", 2)
    assert "base-train-00006" in ended.stderr
    assert "train-000001.tar" in ended.stderr
    assert "Traceback" not in ended.stderr.split("train-000001.tar")[0][-2000:]

    ended = run(2, "masked", "never", "data.reader.on_bad_clip=mask", "data.reader.max_bad_fraction=0.1", path=copy)
    assert ended.returncode == 0, ended.stderr[-3000:]
    records = [
        json.loads(line)
        for path in (tmp_path / "masked" / "logs").glob("bad-clips-*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert {record["key"] for record in records} == {"base-train-00006"}
    logged = [json.loads(line) for line in (tmp_path / "masked" / "metrics.jsonl").read_text().splitlines()]
    totals = [line["reader_bad_clips_total_checksum"] for line in logged if "reader_bad_clips_total_checksum" in line]
    assert totals[-1] >= 2


def test_ranks_that_hold_other_data_are_refused_before_the_first_step(torchrun, tmp_path: Path, data: Path) -> None:
    write_dataset(tmp_path / "other", clips=12, heldout=2, frames=8, tokens=64, channels=112, seed=1)
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "from hopescale.parallel.process_group import end_process\n"
        "from hopescale.train import main\n"
        "path = sys.argv[1 + int(os.environ['RANK'])]\n"
        "end_process(main([f'data.path={path}', *sys.argv[3:]]))\n"
    )
    arguments = [str(data), str(tmp_path / "other"), "experiment=demo", f"run.dir={tmp_path / 'run'}"]
    ended = torchrun(2, program, *arguments, "metrics.port=0", "metrics.tensorboard=false", timeout=100)
    assert ended.returncode != 0
    assert "must be the same on every rank" in ended.stderr
    assert "data=" in ended.stderr
