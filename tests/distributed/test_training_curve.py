"""The curve of a run depends on its configuration, not on how it is spread over ranks, jobs and micro-batches."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.requires("2ranks")]

STEPS = 20
BATCH = (
    # Rate and momentum decide how fast rounding grows, 1e-7 of the loss after a step: with one time scale to 4e-5 after
    # 20 steps, at twice the rate to 1e-4, whether matrices are gathered or not.
    "optimizer=m3_k2",
    "optimizer.lr=6e-3",
    "train.global_batch=6",
    "model.drop_path=0.1",
    f"train.steps={STEPS}",
    "checkpoint.every=0",
    "objective.auxiliary_weight=0.1",
    # Divided by less, the rounding of the memories' first gradients (1e-8) moves some figures by hundredths in 20 steps
    # of random clips, and a mistake in reducing them could hide behind it.
    "optimizer.adam.eps=1e-6",
)


def relative_difference(curve: list[float], reference: list[float]) -> float:
    assert len(curve) == len(reference) == STEPS
    return max(abs(a - b) / abs(b) for a, b in zip(curve, reference, strict=True))


def figures(folder: Path) -> dict[str, float]:
    """What the last record tells of memories, levels and parameter groups."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["kind"] == "train"][-1]
    inside = ("loss_auxiliary", "memory_", "cms_", "param_norm", "update_ratio", "dead_fraction")
    return {key: value for key, value in last.items() if key.startswith(inside) and key != "memory_bytes"}


def test_the_loss_curve_and_all_figures_are_the_same_on_1_2_and_4_ranks_and_in_any_micro_batches(train) -> None:
    alone = train(1, "alone", *BATCH)
    assert alone.code == 0, alone.output
    assert len(set(alone.losses)) == STEPS
    expected = figures(alone.folder)
    assert {"loss_auxiliary", "memory_drift_main", "update_ratio_titan", "cms_output_ratio_0"} <= expected.keys()
    for name, num_ranks, more in (
        ("two-ranks", 2, ()),
        ("four-uneven-ranks", 4, ()),
        ("micro-batches", 1, ("train.micro_batch=3",)),
    ):
        run = train(num_ranks, name, *BATCH, *more, fresh=num_ranks > 1)
        assert run.code == 0, run.output
        assert relative_difference(run.losses, alone.losses) < 1e-5, name
        assert figures(run.folder) == pytest.approx(expected, rel=1e-2), name


@pytest.mark.slow
def test_compiled_blocks_give_the_same_curve(train) -> None:
    batch = ("train.global_batch=4", "train.steps=3", "checkpoint.every=0")
    plain, compiled = train(2, "plain", *batch), train(2, "compiled", *batch, "parallel.compile=true")
    assert compiled.code == 0, compiled.output
    assert max(abs(a - b) / abs(b) for a, b in zip(compiled.losses, plain.losses, strict=True)) < 1e-6


def checkpoint_digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("rank-*.bin")}


def test_a_run_stopped_and_resumed_equals_the_uninterrupted_one_bit_for_bit(train) -> None:
    batch = ("train.global_batch=5", "train.steps=10", "model.drop_path=0.1")
    whole = train(2, "whole", *batch)
    first = train(2, "stopped", *batch, "train.stop_after=5")
    assert (whole.code, first.code) == (0, 1), first.output
    assert first.status == {"state": "preempted", "code": 75, "step": 5, "incarnation": 0}
    second = train(2, "stopped", *batch)
    assert second.code == 0, second.output
    assert second.status == {"state": "finished", "code": 0, "step": 10, "incarnation": 1}

    assert second.losses == whole.losses
    last = "checkpoints/step-000000010"
    assert checkpoint_digests(second.folder / last) == checkpoint_digests(whole.folder / last)
    manifests = [json.loads((run.folder / last / "MANIFEST.json").read_text()) for run in (second, whole)]
    assert manifests[0]["state"] == manifests[1]["state"]
    assert manifests[0]["optimizer_steps"] == manifests[1]["optimizer_steps"]


def test_a_run_goes_on_with_another_number_of_ranks(train) -> None:
    batch = ("train.global_batch=4", "train.steps=8", "checkpoint.every=4")
    whole = train(2, "whole", *batch)
    first = train(2, "moved", *batch, "train.stop_after=4")
    second = train(1, "moved", *batch)
    assert second.code == 0, first.output + second.output
    differences = [abs(a - b) / abs(b) for a, b in zip(second.losses, whole.losses, strict=True)]
    assert max(differences) < 1e-5


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(train) -> None:
    batch = ("train.global_batch=2", "checkpoint.every=2")
    first = train(1, "damaged", *batch, "train.steps=4")
    assert first.code == 0, first.output
    newest = first.folder / "checkpoints/step-000000004/rank-00000.bin"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(bytes(content))
    second = train(1, "damaged", *batch, "train.steps=4")
    assert second.code == 0, second.output
    assert (first.folder / "checkpoints/step-000000004.damaged").is_dir()
    assert "resumed from" in second.output
    assert "step-000000002" in second.output


def test_a_run_whose_weights_overflow_ends_on_all_ranks_and_says_so(train) -> None:
    run = train(2, "overflow", "train.global_batch=2", "train.steps=1000", "optimizer.lr=1e30", "optimizer=adamw")
    assert run.code == 1
    assert run.status["code"] == 72
    assert run.output.count("error: optimizer.lr=1e+30: 10 steps in a row") == 1


def test_a_clip_that_one_rank_cannot_read_ends_all_ranks_with_one_explanation(
    train, demo_shaped_data: Path, tmp_path: Path
) -> None:
    data = tmp_path / "damaged-data"
    shutil.copytree(demo_shaped_data, data)
    for shard in (data / "shards").glob("train-*.tar"):
        content = bytearray(shard.read_bytes())
        # Past the headers, in the features of the last clip: ranks reach it at different steps, or one never does.
        content[-len(content) // 40] ^= 1
        shard.write_bytes(bytes(content))
    run = train(2, "unreadable", "train.global_batch=2", "train.steps=100", f"data.path={data}")
    assert run.code == 1
    assert (run.status["state"], run.status["code"]) == ("failed", 2)
    assert run.output.count("error: data.path: clip") == 1
    assert "crc32" in run.output
    # torchrun adds a traceback of its own; none may go through ours.
    assert "hopescale/train.py" not in run.output


def test_the_same_command_goes_on_where_its_last_job_stopped(train) -> None:
    command = ("train.global_batch=2", "train.steps=5", "train.stop_after=2")
    assert [train(1, "jobs", *command).status["step"] for _ in range(3)] == [2, 4, 5]
