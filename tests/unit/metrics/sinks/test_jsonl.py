from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hopescale.metrics.sinks.jsonl import JsonlSink


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_record_is_one_object_with_kind_step_and_time(tmp_path: Path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(10, "train", {"loss": 0.5}, 1700000000.1234)
    sink.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"kind": "train", "step": 10, "time": 1700000000.123, "loss": 0.5}
    assert line.endswith("\n")


def test_each_line_is_on_disk_before_write_returns_and_is_one_system_call(tmp_path: Path, monkeypatch):
    sizes = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: sizes.append(len(data)) or write(file, data))
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    for step in range(3):
        sink.write(step, "train", {"loss": 1.0}, 0.0)
        assert steps(tmp_path / "metrics.jsonl")[-1] == step
    assert len(sizes) == 3


def test_numbers_that_are_not_finite_are_null(tmp_path: Path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(1, "train", {"loss": math.nan, "grad_norm": math.inf}, 0.0)
    assert '"loss": null, "grad_norm": null' in (tmp_path / "metrics.jsonl").read_text()


def test_resuming_drops_later_steps_and_continues_the_file(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    first = JsonlSink(path)
    for step in (10, 20, 30, 40):
        first.write(step, "train", {}, 0.0)
    first.write(30, "eval", {"skill_far": 0.1}, 0.0)
    first.close()
    second = JsonlSink(path)
    assert second.truncate_after(30) == 1
    second.write(40, "train", {}, 1.0)
    assert steps(path) == [10, 20, 30, 30, 40]
    assert second.truncate_after(40) == 0
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl"]


@settings(deadline=None, max_examples=40)
@given(cut=st.integers(0, 200))
def test_a_file_torn_anywhere_keeps_its_whole_lines_and_stays_json(tmp_path_factory, cut: int):
    path = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    sink = JsonlSink(path)
    for step in (1, 2, 3):
        sink.write(step, "train", {"loss": 0.25}, 0.0)
    content = path.read_bytes()[:cut]
    path.write_bytes(content)
    whole = content.count(b"\n")
    resumed = JsonlSink(path)
    resumed.write(9, "train", {}, 0.0)
    assert steps(path) == [*[1, 2, 3][:whole], 9]


def test_truncating_drops_lines_that_are_no_record(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo{"step": 3}\n[]\n{"step": 4}\n')
    JsonlSink(path).truncate_after(10)
    assert steps(path) == [1, 4]


def test_a_line_cut_short_by_a_full_disk_is_taken_back(tmp_path: Path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(1, "train", {}, 0.0)
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:5]))
    with pytest.raises(OSError, match="disk full"):
        sink.write(2, "train", {}, 0.0)
    monkeypatch.undo()
    sink.write(3, "train", {}, 0.0)
    assert steps(path) == [1, 3]
