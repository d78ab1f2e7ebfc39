"""Every engine trains as the whole model in one process does, and goes on from the checkpoints of every other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.requires("2ranks", "deepspeed")]

PROGRAM = Path(__file__).parent / "engines_program.py"
SHARD_ALL = "parallel.zero_optimization.stage3_param_persistence_threshold=0"
WHOLE_BATCH, STORED = "train.micro_batch=5", "parallel.recompute=none"
OF_TWO = [
    "parallel=ddp +rollout",
    f"parallel=fsdp parallel.prefetch=1 {STORED}",
    f"optimizer=adamw parallel=fsdp parallel.reshard_after_forward=false {WHOLE_BATCH}",
    f"parallel=deepspeed_zero0 {WHOLE_BATCH} +rollout",
    f"optimizer=adamw parallel=deepspeed_zero1 {WHOLE_BATCH}",
    f"parallel=deepspeed_zero1 {STORED}",
    "parallel=deepspeed_zero2",
    f"parallel=deepspeed_zero3 {WHOLE_BATCH} {STORED} +longterm",
    "optimizer=adamw parallel=deepspeed_zero3",
    f"optimizer=adamw parallel=deepspeed_zero2 parallel.offload_optimizer=true {WHOLE_BATCH} {STORED}",
    # Two copies of one shard.
    "parallel=hsdp",
]
"""Each pair of engine, optimizer, accumulation and recompute at least once; `--full` takes them all."""
OTHERS = [
    f"parallel=fsdp parallel.precision=bf16 {STORED}",
    "parallel=deepspeed_zero2 parallel.precision=bf16",
    "parallel=deepspeed_zero2 +online +rollout",
    "parallel=deepspeed_zero1 +periods +rollout",
    f"parallel=deepspeed_zero3 +rollout {STORED}",
]
"""Other precisions, models and objectives."""
FP32, BF16 = (1e-6, 1e-4, 1e-5, 1e-2), (1e-4, 1e-2, 5e-2, 0.5)
"""Most relative errors of losses, norms, tensors and what parameters moved by; a weight's gradient in bf16 is rounded
once a micro-batch, and 1 is a parameter that does not move."""
OF_FOUR = [
    "parallel=hsdp +rollout",
    f"optimizer=adamw parallel=fsdp parallel.shard=2 {WHOLE_BATCH} {STORED}",
    "parallel=fsdp +rollout",
]


def run(torchrun: Any, num_ranks: int, out: Path, cells: list[str], timeout: float = 400) -> dict[str, Any]:
    """Train cells, check what holds for all of them, and return what was seen."""
    ended = torchrun(num_ranks, PROGRAM, str(out), *cells, timeout=timeout, fresh=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    seen = json.loads(out.read_text())
    for cell, found in seen.items():
        losses, norms, tensors, moves = BF16 if "bf16" in cell else FP32
        assert found["losses"] < losses, cell
        assert found["norms"] < norms, cell
        assert found["moves"] < moves, cell
        assert {n: e for n, e in found["errors"].items() if not e < tensors} == {}, cell
        assert found["names"] == [], cell
        # What slow levels, groups and memories wait with is empty at the start and after each firing.
        waiting = ("buffer_", "period_sum", "waiting/")
        assert [name for name in found["never_moved"] if not any(part in name for part in waiting)] == [], cell
        stage = next((n for n in range(4) if f"deepspeed_zero{n}" in cell), None)
        assert found["zero"] == stage, cell
        shards = 1 if "ddp" in cell or stage == 0 else num_ranks // (2 if "hsdp" in cell or "shard=2" in cell else 1)
        # Of parameters and optimizer state; flat ranges and uneven dims leave a rank a little more or less.
        assert 0.9 / shards <= found["local_share"] <= 1.1 / shards, cell
        # Norms and biases, where they are not to be sharded too.
        in_model = found["kept_share"] if stage == 3 else 1 if stage is not None else 1 / shards
        assert found["model_share"] == pytest.approx(in_model, rel=0.1), cell
        assert found["kept_share"] < 0.1, cell
    return seen


def test_engines_on_two_ranks_train_as_one_process_and_go_on_from_each_other(torchrun, tmp_path: Path) -> None:
    saved = [str(tmp_path / f"seen-{number}") for number in range(len(OF_TWO))]
    crossed = [
        f"parallel=deepspeed_zero2 < {saved[1]}",
        f"parallel=fsdp < {saved[6]}",
        f"parallel=deepspeed_zero3 {SHARD_ALL} {STORED} < {saved[6]}",
        f"optimizer=adamw parallel=ddp < {saved[8]}",
    ]
    seen = run(torchrun, 2, tmp_path / "seen.json", [*OF_TWO, *crossed, *OTHERS])
    for copies in ("parallel=ddp +rollout", "parallel=hsdp"):
        assert seen[copies]["placements"] == ["(Replicate(),)"]
    # Any number of ranks goes on from what two have left.
    alone = [f"parallel=fsdp +longterm < {saved[7]}", f"parallel=deepspeed_zero2 {WHOLE_BATCH}"]
    run(torchrun, 1, tmp_path / "one.json", alone)
    seen = run(torchrun, 4, tmp_path / "four.json", [*OF_FOUR, f"parallel=deepspeed_zero3 < {saved[1]}"])
    assert all(text.startswith("(Replicate(), Shard") for text in seen["parallel=hsdp +rollout"]["placements"])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["m3", "adamw"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_combination(torchrun, tmp_path: Path, num_ranks: int, optimizer: str) -> None:
    engines = ["ddp", "fsdp", "hsdp", *(f"deepspeed_zero{n}" for n in range(4))]
    cells = [
        f"optimizer={optimizer} parallel={engine} {batch} parallel.recompute={recompute} +rollout"
        for engine in engines
        for batch in ("train.micro_batch=1", WHOLE_BATCH)
        for recompute in ("none", "block")
    ]
    run(torchrun, num_ranks, tmp_path / "seen.json", cells, timeout=1200)
