from __future__ import annotations

import io

from hopescale.metrics.sinks.console import ConsoleSink

VALUES = {"loss": 0.12345, "learning_rate": 3e-4, "grad_norm": 1.5, "clips_per_second": 31.25, "data_wait_ratio": 0.031}


def test_a_job_gets_plain_lines_with_loss_speed_and_time_left():
    stream = io.StringIO()
    sink = ConsoleSink(100, stream=stream)
    sink.write(10, "train", VALUES, 1000.0)
    sink.write(20, "train", VALUES, 1030.0)
    sink.write(20, "eval", {"skill_far": 0.5, "identity_ratio_far": 0.5}, 1031.0)
    sink.close()
    first, second, third = stream.getvalue().splitlines()
    assert first == "step 10/100  loss 0.1235  lr 3.00e-04  grad 1.5  clips/s 31.2  wait 3%  eta ?"
    assert second.endswith("eta 0:04:00")
    assert third == "eval at step 20  skill_far 0.5000"
    assert "\x1b" not in stream.getvalue()


def test_checkpoints_are_not_shown():
    stream = io.StringIO()
    ConsoleSink(100, stream=stream).write(1, "checkpoint", {"checkpoint_seconds": 1.0}, 0.0)
    assert stream.getvalue() == ""


def test_missing_numbers_are_left_out():
    stream = io.StringIO()
    ConsoleSink(100, stream=stream).write(1, "train", {}, 0.0)
    assert stream.getvalue() == "step 1/100  eta ?\n"


def test_a_terminal_gets_a_bar_that_starts_where_the_run_resumed():
    stream = io.StringIO()
    sink = ConsoleSink(100, start_step=40, stream=stream, interactive=True)
    sink.write(50, "train", VALUES, 0.0)
    sink.write(50, "eval", {"skill_far": 0.5}, 0.0)
    sink.close()
    shown = stream.getvalue()
    assert "50/100" in shown
    assert "40/100" in shown
    assert "0.1235" in shown
    assert "eval at step 50  skill_far 0.5000" in shown
