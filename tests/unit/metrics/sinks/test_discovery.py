from __future__ import annotations

import json
import stat
from contextlib import suppress
from pathlib import Path

import pytest

from hopescale.errors import ConfigError, Problem
from hopescale.metrics.sinks.discovery import DiscoveryEntry, labels

NAMED = {"cluster": "c", "run": "r", "node": "n"}


def test_an_entry_is_what_file_sd_reads(tmp_path: Path) -> None:
    named = labels("east", Path("runs/phase5"), "n1", "42")
    entry = DiscoveryEntry(tmp_path / "targets", "10.0.0.5:9177", named, 3)
    assert entry.path == tmp_path / "targets" / "east-phase5-job42-3.json"
    assert json.loads(entry.path.read_text()) == [
        {
            "targets": ["10.0.0.5:9177"],
            "labels": {"cluster": "east", "run": "phase5", "node": "n1", "slurm_job_id": "42"},
        }
    ]
    assert stat.S_IMODE(entry.path.stat().st_mode) == 0o644
    # Prometheus must never read half of one.
    assert list(entry.path.parent.iterdir()) == [entry.path]


@pytest.mark.parametrize(
    ("error", "stays"),
    [
        (None, False),
        (ConfigError(Problem("a", 1, "is wrong", "mend it")), False),
        (RuntimeError("connection closed by peer"), True),
        (KeyboardInterrupt(), True),
    ],
)
def test_what_ends_in_order_takes_its_entry_along_and_a_crash_leaves_it(
    tmp_path: Path, error: BaseException | None, stays: bool
) -> None:
    with suppress(type(error) if error else ValueError), DiscoveryEntry(tmp_path, "h:1", NAMED, 0) as entry:
        assert entry.path.is_file()
        if error is not None:
            raise error
    assert entry.path.is_file() == stays


def test_nodes_and_runs_do_not_share_an_entry(tmp_path: Path) -> None:
    paths = {
        DiscoveryEntry(tmp_path, "h:1", labels(cluster, Path(run), "n", job), node_rank).path
        for cluster in ("a", "b")
        for run in ("x", "y")
        for job in (None, "7")
        for node_rank in (0, 1)
    }
    assert len(paths) == 16


@pytest.mark.parametrize("run", ["a b", "a/../b", "a\nb", "é"])
def test_names_that_no_file_should_have_are_made_harmless(tmp_path: Path, run: str) -> None:
    entry = DiscoveryEntry(tmp_path, "h:1", NAMED | {"run": run}, 0)
    assert entry.path.parent == tmp_path
    assert json.loads(entry.path.read_text())[0]["labels"]["run"] == run
