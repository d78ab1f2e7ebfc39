from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from data_pipeline.errors import UserError
from hopescale.cli import app
from hopescale.dashboards.answers import load
from hopescale.dashboards.prometheus_api import Series
from hopescale.report import dashboard
from hopescale.report.dashboard import write_dashboard
from tests.dashboard_answers import TIMES, layout_of, matrix

URL = "http://127.0.0.1:9090"


class Prometheus:
    """What is asked of it, and what it answers: a series for every query, of the runs it knows."""

    def __init__(self, known: tuple[str, ...], scraped: bool = True) -> None:
        self.url, self.known, self.scraped = URL, known, scraped
        self.asked: list[tuple[str, float, float, float]] = []

    def label_values(self, label: str, selector: str) -> list[str]:
        assert (label, selector) == ("run", "hopescale_step")
        return list(self.known)

    def query(self, promql: str, time: float) -> list[Series]:
        assert promql == 'hopescale_step{run=~"small"}[180s]'
        assert time == TIMES[-1] + 60
        return [Series({"run": "small"}, TIMES, TIMES)] if self.scraped else []

    def query_range_answer(self, promql: str, start: float, end: float, step: float) -> Mapping[str, Any]:
        assert "$" not in promql
        self.asked.append((promql, start, end, step))
        return matrix([({"run": "small"}, [1.0] * 61)])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    lines = [{"kind": "train", "step": n, "time": at} for n, at in enumerate((TIMES[0], TIMES[-1]))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def answering(monkeypatch: pytest.MonkeyPatch, prometheus: Prometheus) -> Prometheus:
    monkeypatch.setattr(dashboard, "PrometheusApi", lambda url: prometheus)
    return prometheus


def test_picture_and_answers_of_the_time_that_was_scraped(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prometheus = answering(monkeypatch, Prometheus(("other", "small")))
    picture, kept = write_dashboard(run, URL)
    assert (picture, kept) == (run / "report" / "dashboard.png", run / "report" / "dashboard.json")
    assert picture.read_bytes().startswith(b"\x89PNG")
    whole = [asked for asked in prometheus.asked if asked[1:] == (TIMES[0], TIMES[-1], 1.0)]
    # What looks back over all the time, and tables, are asked once, for the last moment.
    once = [asked for asked in prometheus.asked if asked[1:] == (TIMES[-1], TIMES[-1], 1.0)]
    assert len(whole) + len(once) == len(prometheus.asked)
    last_step = "time() - min by (cluster, run) (last_over_time(hopescale_last_step_timestamp_seconds"
    assert {promql.partition("{")[0] for promql, *_ in once} == {
        "(hopescale_planned_steps",
        "hopescale_run_info",
        last_step,
    }

    before = picture.read_bytes()
    picture.unlink()
    assert write_dashboard(run, str(kept)) == (picture, kept)
    assert picture.read_bytes() == before


def test_another_dashboard_has_files_of_its_own(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, Prometheus(("small",)))
    picture, kept = write_dashboard(run, URL, board="nodes")
    assert (picture.name, kept.name) == ("dashboard-nodes.png", "dashboard-nodes.json")
    load(kept, layout_of("nodes"))
    with pytest.raises(UserError, match=r"holds no answer to .* queries of the dashboard 'overview'"):
        write_dashboard(run, str(kept))


def test_a_run_may_have_another_name_in_prometheus(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, Prometheus(("small",)))
    other = run.rename(run.with_name("folder"))
    with pytest.raises(UserError, match=r"run=folder: .* knows no run of this name; it has small"):
        write_dashboard(other, URL)
    write_dashboard(other, URL, board="nodes", run_label="small")


def test_a_prometheus_without_runs_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, Prometheus(()))
    with pytest.raises(UserError, match="it has no run, or its targets have no label run"):
        write_dashboard(run, URL)
    assert not (run / "report").exists()


def test_a_prometheus_that_did_not_look_at_the_time_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, Prometheus(("small",), scraped=False))
    with pytest.raises(UserError, match="nothing of it from 2023-11-14 22:13:20 to 2023-11-14 22:14:20 UTC"):
        write_dashboard(run, URL)


def test_nobody_at_the_address_is_said(run: Path, free_port: int) -> None:
    with pytest.raises(UserError, match="no Prometheus answers there"):
        write_dashboard(run, f"http://127.0.0.1:{free_port}")


def test_a_folder_without_steps_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl.*name the folder of a run"):
        write_dashboard(tmp_path, URL)


def test_an_unknown_dashboard_is_named_with_the_others(run: Path) -> None:
    with pytest.raises(UserError, match="did you mean nodes"):
        write_dashboard(run, URL, board="node")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "span": {}, "answers": {}}'])
def test_a_file_that_holds_no_answers_is_named(run: Path, content: str) -> None:
    (run / "answers.json").write_text(content)
    with pytest.raises(UserError, match="must be a file of answers that an earlier report has saved"):
        write_dashboard(run, str(run / "answers.json"))


def test_a_file_that_is_not_there_is_named(run: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        write_dashboard(run, "127.0.0.1:9090")


@pytest.mark.parametrize(("option", "value"), [("--board", "nodes"), ("--run-label", "small")])
def test_options_of_the_dashboard_are_refused_without_it(run: Path, option: str, value: str) -> None:
    refused = CliRunner().invoke(app, ["report", str(run), option, value])
    assert isinstance(refused.exception, UserError)
    assert f"{option[2:].replace('-', '_')}={value}: is ignored without --dashboard" in str(refused.exception)
