from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hopescale.metrics.catalog import OF_THE_RUN, UnknownMetric
from hopescale.metrics.recorder import Recorder
from hopescale.metrics.sinks.rank_file import RankFile, read_rank_file
from hopescale.metrics.throughput import Window


class ListSink:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.records: list[tuple[int, str, dict[str, float], float]] = []
        self.closed = False

    def write(self, step: int, kind: str, values: Mapping[str, float], time: float) -> None:
        self.records.append((step, kind, dict(values), time))

    def close(self) -> None:
        self.closed = True


class Ranks:
    """Several recorders in threads of one process with a true sum over them; counts the collectives."""

    def __init__(self, world_size: int, **options) -> None:
        self.sink = ListSink()
        self.calls = [0] * world_size
        self._world_size = world_size
        self._barrier = threading.Barrier(world_size)
        self._parts: dict[int, torch.Tensor] = {}
        self.recorders = [
            Recorder(
                [self.sink] if rank == 0 else [],
                rank=rank,
                world_size=world_size,
                all_reduce=lambda tensor, rank=rank: self._sum(rank, tensor),
                rank_file=None,
                **options,
            )
            for rank in range(world_size)
        ]

    def _sum(self, rank: int, tensor: torch.Tensor) -> None:
        self.calls[rank] += 1
        self._parts[rank] = tensor.clone()
        self._barrier.wait(timeout=10)
        tensor.copy_(torch.stack([self._parts[other] for other in range(self._world_size)]).sum(0))
        self._barrier.wait(timeout=10)

    def flush(self, step: int, kind: str = "train") -> list[dict[str, float]]:
        results: list[dict[str, float]] = [{} for _ in range(self._world_size)]

        def run(rank: int) -> None:
            results[rank] = self.recorders[rank].flush(step, kind)

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(self._world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def single(**options) -> Recorder:
    arguments = {"rank": 0, "world_size": 1, "all_reduce": None, "rank_file": None} | options
    return Recorder([], **arguments)


def test_means_weigh_every_clip_the_same_when_ranks_hold_different_counts():
    ranks = Ranks(2)
    ranks.recorders[0].add("loss", torch.tensor(3.0), 1)
    ranks.recorders[1].add("loss", torch.tensor(3.0), torch.tensor(3))
    result = ranks.flush(1)[0]
    assert result["loss"] == 1.5
    mean_of_means = (3.0 / 1 + 3.0 / 3) / 2
    assert result["loss"] != mean_of_means


def test_one_collective_per_flush_whatever_was_recorded():
    ranks = Ranks(2, labels={"group": ("a", "b")})
    for recorder in ranks.recorders:
        recorder.add("loss", 1.0)
        recorder.add("grad_norm", torch.tensor(2.0), group="b")
        recorder.set("reader_bytes_total", 5)
        recorder.observe_rank("step_seconds", 0.5)
    ranks.recorders[1].add("memory_surprise", torch.tensor(4.0))
    result = ranks.flush(7)[0]
    assert ranks.calls == [1, 1]
    assert result["memory_surprise"] == 4.0
    assert result["reader_bytes_total"] == 10.0
    assert result["grad_norm_b"] == 2.0
    ranks.flush(8)
    assert ranks.calls == [2, 2]


def test_evaluation_needs_no_collective_and_leaves_training_sums_alone():
    ranks = Ranks(2)
    for recorder in ranks.recorders:
        recorder.add("loss", 2.0)
        recorder.set("skill", 0.25, kind="one_step")
    assert ranks.flush(5, "eval")[0] == {"skill_one_step": 0.25}
    assert ranks.calls == [0, 0]
    result = ranks.flush(10)[0]
    assert result["loss"] == 2.0
    assert "skill_one_step" not in result
    assert [(step, kind) for step, kind, _, _ in ranks.sink.records] == [(5, "eval"), (10, "train")]


def test_global_numbers_are_rank_zeros_and_ranks_numbers_are_averaged_in_the_record():
    ranks = Ranks(2)
    for rank, recorder in enumerate(ranks.recorders):
        recorder.set("clips_total", 64 + rank)
        recorder.observe_rank("memory_bytes", 100.0 * (rank + 1))
    results = ranks.flush(1)
    assert results[0]["clips_total"] == 64
    assert results[0]["memory_bytes"] == 150.0
    assert "clips_total" not in results[1]


def test_every_rank_gets_the_same_reduced_numbers():
    ranks = Ranks(3)
    for rank, recorder in enumerate(ranks.recorders):
        recorder.add("loss", torch.tensor(0.1 * (rank + 1)), rank + 1)
        recorder.add("memory_surprise", 0.3 + rank, 7)
    first, *others = ranks.flush(1)
    assert first.keys() >= {"loss", "memory_surprise"}
    assert all(other == {key: first[key] for key in other} for other in others)
    assert all(other.keys() == first.keys() for other in others)
    assert ranks.calls == [1, 1, 1]


def test_a_checkpoint_is_published_at_once_without_a_collective(tmp_path: Path):
    ranks = Ranks(2)
    ranks.recorders[0]._rank_file = RankFile(tmp_path, 0)
    for recorder in ranks.recorders:
        recorder.add("loss", 2.0)
        recorder.set("last_checkpoint_step", 5)
    ranks.flush(5, "checkpoint")
    assert ranks.calls == [0, 0]
    assert [record[:3] for record in ranks.sink.records] == [(5, "checkpoint", {"last_checkpoint_step": 5.0})]
    record = read_rank_file(tmp_path / "rank-00000.bin")
    assert record is not None
    assert ["last_checkpoint_step", {}, 5.0] in record["samples"]
    assert "last_checkpoint_step" not in ranks.flush(6)[0]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(-1000, 1000), st.integers(1, 50)), min_size=1, max_size=20))
def test_any_split_into_micro_batches_gives_the_mean_over_clips(parts):
    recorder = single()
    for total, count in parts:
        recorder.add("loss", torch.tensor(float(total), requires_grad=True), count)
    result = recorder.flush(1)
    assert result["loss"] == pytest.approx(sum(t for t, _ in parts) / sum(c for _, c in parts))


def test_recording_keeps_no_graph_and_flush_starts_afresh():
    recorder = single()
    weight = torch.ones((), requires_grad=True)
    recorder.add("loss", weight * 2)
    assert all(not sums.requires_grad for sums in recorder._on_device.values())
    recorder.flush(1)
    recorder.add("loss", weight * 4)
    result = recorder.flush(2)
    assert result["loss"] == 4.0
    third = recorder.flush(3)
    assert "loss" not in third


def test_adding_does_not_read_the_device():
    recorder = single(device="meta")
    recorder.add("loss", torch.ones((), device="meta"), torch.ones((), device="meta"))
    recorder.add_each("memory_drift", torch.ones(5, device="meta"), [1.0] * 5)


def test_numbers_without_a_count_are_left_out():
    recorder = single()
    recorder.add("loss_jump", torch.tensor(0.0), 0)
    result = recorder.flush(1)
    assert "loss_jump" not in result


def test_labels_appear_in_keys_and_the_overall_number_has_none():
    recorder = single(labels={"group": ("matrices", "rest")})
    recorder.set("learning_rate", 0.1)
    recorder.set("learning_rate", 0.2, group="rest")
    result = recorder.flush(1)
    assert result["learning_rate"] == 0.1
    assert result["learning_rate_rest"] == 0.2


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda r: r.add("los", 1.0), "nearest known: 'loss'"),
        (lambda r: r.set("clips", 1.0), "clips_total"),
        (lambda r: r.observe_rank("memory_byte", 1.0), "memory_bytes"),
        (lambda r: r.add("grad_norm", 1.0, group="matrix"), "nearest known: 'matrices'"),
        (lambda r: r.set("skill", 1.0, kind="two_step"), "one_step"),
        (lambda r: r.set("skill", 1.0), "has the labels"),
        (lambda r: r.set("clips_total", 1.0, rank="3"), "has the labels"),
    ],
)
def test_unknown_names_are_errors_with_a_hint(call, hint):
    with pytest.raises(UnknownMetric, match=hint):
        call(single(labels={"group": ("matrices", "rest")}))


@pytest.mark.parametrize(
    "call",
    [
        lambda r: r.add("clips_total", 1.0),
        lambda r: r.add("step_seconds", 1.0),
        lambda r: r.set("step_seconds", 1.0),
        lambda r: r.observe_rank("loss", 1.0),
        lambda r: r.add("loss", torch.ones(2)),
        lambda r: r.flush(1, "training"),
        lambda r: r.set("run_info", 1, version="a b", torch="1", config_hash="1", incarnation="1"),
    ],
)
def test_numbers_recorded_in_the_wrong_way_are_errors(call):
    with pytest.raises(ValueError):
        call(single())


def test_several_ranks_need_a_collective_and_label_values_are_bounded():
    with pytest.raises(ValueError, match="all_reduce"):
        single(world_size=2)
    for name, most in OF_THE_RUN.items():
        single(labels={name: [f"v{i}" for i in range(most)]})
        with pytest.raises(ValueError, match=f"label {name} takes at most {most}"):
            single(labels={name: [f"v{i}" for i in range(most + 1)]})
    with pytest.raises(ValueError, match="label group"):
        single(labels={"group": ["a b"]})
    with pytest.raises(ValueError, match="label clip takes at most 0"):
        single(labels={"clip": ["one"]})


def test_figures_of_a_label_can_be_added_at_once():
    one, many = (single(labels={"frame": ("0", "2", "4")}) for _ in range(2))
    totals, counts = torch.tensor([1.0, 6.0]), [2.0, 4.0]
    for frame, total, count in zip("02", totals, counts, strict=True):
        one.add("memory_surprise", total, count, frame=frame)
    many.add_each("memory_surprise", totals, counts)
    result = many.flush(1)
    assert result == one.flush(1) | {"last_step_timestamp_seconds": result["last_step_timestamp_seconds"]}
    assert (result["memory_surprise_0"], result["memory_surprise_2"]) == (0.5, 1.5)
    assert "memory_surprise_4" not in result
    assert "memory_surprise" not in result


def test_a_label_value_without_a_count_is_left_out():
    recorder = single()
    recorder.add_each("memory_drift", torch.arange(5.0), [0, 0, 0, 2, 2])
    result = recorder.flush(1)
    assert {key: value for key, value in result.items() if key.startswith("memory_drift")} == {
        "memory_drift_alpha": 1.5,
        "memory_drift_main": 2.0,
    }


@pytest.mark.parametrize(
    ("key", "totals", "counts"),
    [
        ("memory_drift", torch.ones(6), [1.0] * 6),
        ("memory_drift", torch.ones(5), [1.0] * 4),
        ("memory_surprise", torch.ones(1), [1.0]),
        ("learning_rate", torch.ones(1), [1.0]),
    ],
)
def test_figures_that_do_not_fit_the_label_are_errors(key, totals, counts):
    with pytest.raises(ValueError):
        single(labels={"group": ("a",)}).add_each(key, totals, counts)


def test_norms_are_roots_of_sums_over_ranks():
    ranks = Ranks(2, labels={"group": ("a",)})
    for recorder, square in zip(ranks.recorders, (9.0, 16.0), strict=True):
        recorder.add("param_norm", torch.tensor(square), 1 / 2, group="a")
        recorder.add("update_ratio", torch.tensor(square), torch.tensor(50.0), group="a")
    result = ranks.flush(1)[0]
    assert result["param_norm_a"] == 5.0
    assert result["update_ratio_a"] == 0.5
    assert ranks.calls == [1, 1]


def test_rank_zero_alone_exports_numbers_of_the_whole_job(tmp_path: Path):
    ranks = Ranks(2)
    for rank, recorder in enumerate(ranks.recorders):
        recorder._rank_file = RankFile(tmp_path, rank)
        recorder.add("loss", 2.0 + rank)
        recorder.set("learning_rate", 0.5)
        recorder.observe_rank("step_seconds", 1.0 + rank)
        recorder.set("run_info", 1, version="1", torch="2.13.0+cpu", config_hash="ab", incarnation="0")
    ranks.flush(12)
    files = [read_rank_file(tmp_path / f"rank-0000{rank}.bin") for rank in range(2)]
    samples = [{(key, *labels.values()): value for key, labels, value in (file or {})["samples"]} for file in files]
    assert samples[0]["loss",] == 2.5
    assert samples[0]["step",] == 12
    assert samples[0]["learning_rate", "all"] == 0.5
    assert samples[0]["step_seconds", "0"] == 1.0
    assert samples[0]["run_info", "1", "2.13.0+cpu", "ab", "0"] == 1
    assert set(samples[1]) == {("step_seconds", "1"), ("last_step_timestamp_seconds", "1")}
    assert samples[1]["step_seconds", "1"] == 2.0


def test_exported_numbers_survive_flushes_that_do_not_mention_them(tmp_path: Path):
    recorder = single(rank_file=RankFile(tmp_path, 0))
    recorder.set("skill", 0.5, kind="far")
    recorder.flush(1, "eval")
    recorder.add("loss", 1.0)
    recorder.flush(2)
    record = read_rank_file(tmp_path / "rank-00000.bin")
    assert record is not None
    assert ["skill", {"kind": "far"}, 0.5] in record["samples"]


def test_identity_is_exported_before_the_first_step_and_is_no_record(tmp_path: Path):
    sink = ListSink()
    recorder = Recorder([sink], rank=0, world_size=1, all_reduce=None, rank_file=RankFile(tmp_path, 0))
    recorder.set("run_info", 1, version="1", torch="2", config_hash="3", incarnation="4")
    assert "run_info" in json.dumps(read_rank_file(tmp_path / "rank-00000.bin"))
    recorder.flush(1)
    assert not any(key.startswith("run_info") for key in sink.records[0][2])
    recorder.close()
    assert sink.closed


def test_counters_are_exported_before_the_first_step_so_that_what_comes_then_is_a_rise(tmp_path: Path):
    sink = ListSink()
    recorder = Recorder([sink], rank=0, world_size=1, all_reduce=None, rank_file=RankFile(tmp_path, 0))
    recorder.set("nonfinite_steps_total", 0)
    recorder.announce()
    record = read_rank_file(tmp_path / "rank-00000.bin")
    assert record is not None
    assert record["samples"] == [["nonfinite_steps_total", {}, 0.0]]
    assert not sink.records
    recorder.set("nonfinite_steps_total", 3)
    assert recorder.flush(1)["nonfinite_steps_total"] == 3


def test_window_and_reader_statistics_reach_the_record():
    @dataclass(frozen=True)
    class Stats:
        clips_read: int = 10
        read_seconds: float = 2.5

    recorder = single()
    recorder.record_window(Window(steps=4, clips=32, seconds=8.0, wait_seconds=2.0))
    recorder.record_reader(Stats())
    result = recorder.flush(4)
    assert result["step_seconds"] == 2.0
    assert result["data_wait_seconds"] == 0.5
    assert result["data_wait_ratio"] == 0.25
    assert result["clips_per_second"] == 4.0
    assert (result["reader_clips_total"], result["reader_read_seconds_total"]) == (10, 2.5)


def test_reader_statistic_without_a_metric_is_an_error():
    @dataclass(frozen=True)
    class Stats:
        clip_read: int = 0

    with pytest.raises(UnknownMetric, match="nearest known: 'clips_read'"):
        single().record_reader(Stats())


def test_a_sink_on_a_full_disk_does_not_stop_the_others(caplog):
    class FullDisk(ListSink):
        def write(self, step, kind, values, time):
            raise OSError(28, "No space left on device")

    good = ListSink()
    recorder = Recorder([FullDisk(), good], rank=0, world_size=1, all_reduce=None, rank_file=None)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            recorder.flush(step)
    assert [record[0] for record in good.records] == [1, 2, 3]
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
