"""The benchmark of the data pipeline, on so little that only its paths are tested and no figure means anything."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.data_rows import ROWS, Table, holds

REPO_ROOT = Path(__file__).resolve().parents[2]
SCRIPT = REPO_ROOT / "tests" / "benchmarks" / "data.py"
THEIRS = ("webdataset", "litdata", "mosaicml-streaming", "zarr")


@pytest.mark.integration
def test_every_row_has_a_figure_or_says_that_its_rival_is_not_installed(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--folder", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(
        [*command, "--rivals", str(tmp_path / "none")], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = json.loads((tmp_path / "rows.json").read_text())
    assert len(lines) == len(ROWS)
    for line in lines:
        assert list(line) == ["name", "ratio", "range", "must", "stretch", "met", "note"]
        assert line["name"] in done.stdout
        assert line["met"] is None
        if any(name in line["name"] for name in THEIRS):
            assert line["ratio"] is None
            assert line["note"].startswith("not installed: ")
        else:
            assert math.isfinite(line["ratio"])
            assert line["range"][0] <= line["ratio"] <= line["range"][1]
            assert line["note"] == ""


def test_a_row_shows_the_median_of_its_rounds_and_whether_it_is_enough() -> None:
    table = Table(True, {"resume_rows": "9", "order_1": "few", "order_10": "many"})
    for value in (0.7, 0.9, 0.86):
        table.add("ring", value)
        table.add("order-1", 2 - value)
    lines = {line["name"]: line for line in table.lines()}
    ring, order = lines[ROWS["ring"].name], lines["order of few: seconds"]
    assert (ring["ratio"], ring["range"], ring["met"]) == (0.86, [0.7, 0.9], True)
    assert (order["ratio"], order["met"]) == (2 - 0.86, False)


def test_a_row_that_is_not_declared_is_refused() -> None:
    with pytest.raises(KeyError, match="ringg"):
        Table(True, {}).add("ringg", 1.0)


@pytest.mark.parametrize(
    ("value", "target", "expected"),
    [(1.0, ">= 1", True), (0.99, ">= 1", False), (1.3, "<= 1.3", True), (1.31, "<= 1.3", False), (2.0, "< 2", False)],
)
def test_targets_hold_at_their_bound_unless_they_say_below(value: float, target: str, expected: bool) -> None:
    assert holds(value, target) is expected
