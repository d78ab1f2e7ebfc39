from __future__ import annotations

import sys
from pathlib import Path

import pytest

from data_pipeline.errors import MissingExtra
from hopescale.metrics.sinks.tensorboard import TensorboardSink


def test_scalars_are_called_by_kind_and_key(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sink = TensorboardSink(tmp_path)
    sink.write(5, "train", {"loss": 0.5}, 123.0)
    sink.write(5, "eval", {"skill_far": 0.25}, 123.0)
    sink.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "eval/skill_far"}
    (scalar,) = events.Scalars("train/loss")
    assert (scalar.step, scalar.value, scalar.wall_time) == (5, 0.5, 123.0)


def test_resuming_hides_points_after_the_checkpoint(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = TensorboardSink(tmp_path)
    for step in (1, 2, 3):
        first.write(step, "train", {"loss": 1.0}, float(step))
    first.close()
    second = TensorboardSink(tmp_path, start_step=2)
    second.write(3, "train", {"loss": 9.0}, 10.0)
    second.close()
    scalars = accumulator.EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(scalar.step, scalar.value) for scalar in scalars] == [(1, 1.0), (2, 1.0), (3, 9.0)]


def test_without_tensorboard_the_error_says_what_to_install(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtra, match=r"hopescale\[tensorboard\]"):
        TensorboardSink(tmp_path)
