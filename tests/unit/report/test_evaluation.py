from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UserError
from hopescale.report.evaluation import load_run, read_metrics


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("report/evaluation.npz", "hopescale eval"),
        ("result.json", "hopescale eval"),
        ("metrics.jsonl", "hopescale train"),
        ("config.yaml", "hopescale train"),
    ],
)
def test_a_missing_file_is_named_with_the_command_that_makes_it(
    make_run: Callable[..., Path], name: str, command: str
) -> None:
    run = make_run()
    (run / name).unlink()
    with pytest.raises(UserError) as raised:
        load_run(run)
    assert str(run / name) in str(raised.value)
    assert command in str(raised.value)


def test_all_missing_files_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        load_run(tmp_path)
    assert len(raised.value.problems) == 4


@pytest.mark.parametrize("name", ["rollout_error", "sample_prediction", "grid", "sample_frames", "surprise_blocks"])
def test_arrays_whose_shapes_disagree_are_refused(make_run: Callable[..., Path], name: str) -> None:
    wrong = np.array([3, 5]) if name == "grid" else np.zeros((1, 1))
    with pytest.raises(UserError, match="consistent"):
        load_run(make_run(**{name: wrong}))


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04broken"])
def test_a_broken_archive_is_a_user_error(make_run: Callable[..., Path], content: bytes) -> None:
    run = make_run()
    (run / "report" / "evaluation.npz").write_bytes(content)
    with pytest.raises(UserError, match="hopescale eval"):
        load_run(run)


def test_pickled_objects_are_never_loaded(make_run: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="pickled"):
        load_run(make_run(surprise=np.array([{"a": 1}], dtype=object)))


def test_a_resumed_run_keeps_the_later_line_of_a_repeated_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "step": step, "loss": loss}) for step, loss in [(1, 3.0), (2, 2.0), (2, 1.0)]]
    path.write_text("\n".join([*lines, '{"kind": "tra', "[1]", "null", ""]))
    records, unreadable = read_metrics(path)
    assert [record["loss"] for record in records] == [3.0, 1.0]
    assert unreadable == 3
