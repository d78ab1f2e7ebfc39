from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from pathlib import Path

import pytest

from hopescale.errors import CheckpointError, ConfigError, Problem
from hopescale.metrics.sinks.discovery import DiscoveryEntry, labels

MISTAKE = Problem("a", 1, "is wrong", "mend it")


def enter(
    folder: Path,
    target: str = "h:1",
    *,
    cluster: str = "c",
    run: str = "/runs/r",
    job: str | None = None,
    incarnation: int = 0,
    node_rank: int = 0,
) -> DiscoveryEntry:
    named = labels(cluster, Path(run), "n", job)
    return DiscoveryEntry(folder, target, named, run=Path(run), incarnation=incarnation, node_rank=node_rank)


def listed(folder: Path) -> list[tuple[str, str]]:
    """Run and target of each entry."""
    entries = [json.loads(path.read_text())[0] for path in sorted(folder.iterdir())]
    return [(entry["labels"]["run"], *entry["targets"]) for entry in entries]


def test_an_entry_is_what_file_sd_reads(tmp_path: Path) -> None:
    earlier = os.umask(0o077)
    try:
        entry = enter(
            tmp_path, "10.0.0.5:9177", cluster="east", run="/runs/phase5", job="42", incarnation=2, node_rank=3
        )
    finally:
        os.umask(earlier)
    assert json.loads(entry.path.read_text()) == [
        {
            "targets": ["10.0.0.5:9177"],
            "labels": {"cluster": "east", "run": "phase5", "node": "n", "slurm_job_id": "42"},
        }
    ]
    assert stat.S_IMODE(entry.path.stat().st_mode) == 0o644
    # The job script looks for its own by this.
    assert entry.path.match("east-phase5-*-job42-start000002-3.json")
    # Prometheus must never read half of one.
    assert list(entry.path.parent.iterdir()) == [entry.path]


@pytest.mark.parametrize(
    ("error", "has_begun", "stays"),
    [
        (None, True, False),
        (None, False, False),
        (ConfigError(MISTAKE), True, True),
        (ConfigError(MISTAKE), False, False),
        (CheckpointError(MISTAKE), False, True),
        (RuntimeError("connection closed by peer"), False, True),
        (RuntimeError("connection closed by peer"), True, True),
    ],
)
def test_what_ends_in_order_takes_its_entry_along_and_what_fails_leaves_it_unless_it_was_refused(
    tmp_path: Path, error: Exception | None, has_begun: bool, stays: bool
) -> None:
    with suppress(type(error) if error else ValueError), enter(tmp_path) as entry:
        assert entry.path.is_file()
        entry.run_has_begun = has_begun
        if error is not None:
            raise error
    assert entry.path.is_file() == stays


def test_nodes_and_runs_do_not_share_an_entry(tmp_path: Path) -> None:
    paths = {
        enter(tmp_path, f"h:{index}", cluster=cluster, run=run, job=job, node_rank=node_rank).path
        for index, (cluster, run, job, node_rank) in enumerate(
            (cluster, run, job, node_rank)
            for cluster in ("a", "a-b")
            for run in ("/home/alice/x", "/home/bob/x", "/home/alice/b-x")
            for job in (None, "7")
            for node_rank in (0, 1)
        )
    }
    assert len(paths) == len(list(tmp_path.iterdir())) == 24


def test_a_start_removes_what_earlier_ones_have_left_and_an_earlier_one_nothing_of_it(tmp_path: Path) -> None:
    with enter(tmp_path, "h:1", job="42"):
        enter(tmp_path, "h:2", job="42", node_rank=1)
        enter(tmp_path, "h:3", run="/elsewhere/r", job="42")
        later = enter(tmp_path, "h:4", job="43", incarnation=1)
        assert sorted(listed(tmp_path)) == [("r", "h:3"), ("r", "h:4")]
    assert later.path.is_file()


def test_whoever_was_at_an_address_before_is_gone(tmp_path: Path) -> None:
    (tmp_path / "by-hand.json").write_text('[{"targets": ["h:1"], "labels": {"job": "other"}}]')
    (tmp_path / "torn.json").write_text("[{")
    dead, far = enter(tmp_path, "h:1", run="/runs/dead"), enter(tmp_path, "h:1", cluster="d", run="/runs/far")
    here = enter(tmp_path, "h:1", run="/runs/here")
    assert not dead.path.exists()
    assert far.path.exists()
    assert here.path.exists()
    assert (tmp_path / "by-hand.json").exists()
    assert (tmp_path / "torn.json").exists()


@pytest.mark.parametrize("run", ["a b", "a\nb", "é"])
def test_names_that_no_file_should_have_are_made_harmless(tmp_path: Path, run: str) -> None:
    entry = enter(tmp_path, run=f"/runs/{run}")
    assert entry.path.parent == tmp_path
    assert entry.path.name.isascii()
    assert json.loads(entry.path.read_text())[0]["labels"]["run"] == run
