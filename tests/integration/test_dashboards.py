"""Dashboards over a real run of two ranks that a real Prometheus scrapes: none is empty, and no number is another."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hopescale.dashboards.prometheus_api import Series
from hopescale.dashboards.variables import Span
from tests.dashboard_lint import DASHBOARDS, panels_of
from tests.live_prometheus import LivePrometheus, scraping
from tests.user_process import ENVIRONMENT

pytestmark = [
    pytest.mark.integration,
    pytest.mark.requires("2ranks", "prometheus", "prometheus-server"),
]

LABELS = {"cluster": "here", "run": "small", "node": "n1"}
ALL_HAS_HAPPENED = (
    "count_over_time(hopescale_action_sensitivity[10m]) >= 8",
    "count_over_time(hopescale_last_checkpoint_step[10m]) >= 8",
    "changes(hopescale_last_checkpoint_step[10m]) >= 2",
)
"""Figures that a run has last were scraped often enough, so that it can be stopped."""
SETTINGS = [
    # Shards of one group at a time in a folder that holds three: copies are fetched and removed.
    "data=staged",
    "data.order_shards=1",
    "data.staging.max_bytes=60000",
    "model.encoder_dim=16",
    "model.grid=[2,3]",
    "model.frames=5",
    "model.width=24",
    "model.block_pattern=[H]",
    "model.memory.heads=2",
    "model.attention.heads=2",
    # What only some runs have: long-term memories, all parts of the objective, a phase that waits for a plateau.
    "model.longterm={}",
    "objective.jump_horizons=2",
    "objective.rollout.weight=0.5",
    "objective.auxiliary_weight=0.1",
    "objective.curriculum=[{plateau:{patience:1000000},jump_weight:0.5}]",
    "train.global_batch=4",
    "train.steps=1000000",
    "train.eval_every=3",
    "checkpoint.every=4",
    "checkpoint.keep=2",
    "metrics.every=1",
    "metrics.port=0",
    "metrics.tensorboard=false",
]
PANELS = [
    pytest.param(target["expr"], id=f"{name.removeprefix('hopescale-')}-{panel['title']}-{target['refId']}")
    for name, dashboard in DASHBOARDS.items()
    for panel in panels_of(dashboard)
    for target in panel["targets"]
]


@dataclass(frozen=True)
class Watched:
    """A run that was scraped and has ended."""

    folder: Path
    prometheus: LivePrometheus
    span: Span

    def filled(self, promql: str) -> list[Series]:
        """Series of a query that have something to show."""
        span = self.span
        series = self.prometheus.query_range(span.substitute(promql), span.start, span.end, span.step)
        return [one for one in series if sum(map(math.isfinite, one.values)) >= 3]


@pytest.fixture(scope="module")
def watched(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    root = tmp_path_factory.mktemp("watched")
    folder = root / LABELS["run"]
    # Its launcher ends with the test, and ends the ranks.
    command = ["setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "hopescale.train", *SETTINGS]
    command += [f"data.path={small_data}", f"data.staging.folder={root / 'copies'}", f"run.dir={folder}"]
    output = root / "output"
    with output.open("w") as out:
        run = subprocess.Popen(command, env=ENVIRONMENT, stdout=out, stderr=out)
    try:
        with LivePrometheus(root / "prometheus", {"scrape_configs": []}) as prometheus:

            def still_runs() -> None:
                assert run.poll() is None, output.read_text()[-3000:]

            def endpoint() -> str | None:
                still_runs()
                path = folder / "metrics-endpoint.json"
                return "{host}:{port}".format(**json.loads(path.read_text())) if path.exists() else None

            address = prometheus.until(endpoint, within=120, what="the run serves its metrics")
            prometheus.configure(scraping({address: LABELS}))

            def has_all_happened() -> bool:
                still_runs()
                return all(prometheus.query(wanted) for wanted in ALL_HAS_HAPPENED)

            prometheus.until(has_all_happened, within=300, what="it was evaluated and saved")
            (folder / "stop").touch()
            run.wait(120)
            (scraped,) = prometheus.query("hopescale_step[10m]")
            span = Span(scraped.times[0], scraped.times[-1], 1, 1, {"run": [LABELS["run"]]})
            yield Watched(folder, prometheus, span)
    finally:
        run.terminate()
        run.wait(120)


@pytest.mark.parametrize("promql", PANELS)
def test_every_panel_has_numbers(watched: Watched, promql: str) -> None:
    assert watched.filled(promql), promql


def test_checkpoints_and_starts_are_marked(watched: Watched) -> None:
    for mark in DASHBOARDS["hopescale-overview"]["annotations"]["list"]:
        assert watched.filled(mark["expr"]), mark["name"]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_variable_offers_what_there_is(watched: Watched, name: str) -> None:
    expected = {label: [value] for label, value in LABELS.items()} | {"rank": ["0", "1"]}
    for variable in DASHBOARDS[name]["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"])
            assert asked is not None
            selector, label = watched.span.substitute(asked.group(1)), asked.group(2)
            assert watched.prometheus.label_values(label, selector) == expected[variable["name"]]


def test_what_was_scraped_is_what_the_run_wrote_down(watched: Watched) -> None:
    lines = [json.loads(line) for line in (watched.folder / "metrics.jsonl").read_text().splitlines()]
    written = {line["step"]: line for line in lines if line["kind"] == "train"}
    (steps,) = watched.prometheus.query("hopescale_step[10m]")
    step_at = dict(zip(steps.times, steps.values, strict=True))
    for key in ("loss", "clips_per_second", "data_wait_seconds", "data_wait_ratio"):
        (scraped,) = watched.prometheus.query(f"hopescale_{key}[10m]")
        compared = {step_at[time]: value for time, value in zip(scraped.times, scraped.values, strict=True)}
        assert len(compared) >= 3
        for step, value in compared.items():
            assert value == pytest.approx(written[step][key], rel=1e-6, abs=1e-12), (key, step)


@pytest.mark.requires("demo")
def test_a_dashboard_is_drawn_from_what_prometheus_has(watched: Watched, hopescale, tmp_path: Path) -> None:
    drawn = hopescale("report", str(watched.folder), "--dashboard", watched.prometheus.url, "--json")
    assert drawn.returncode == 0, drawn.stderr
    paths = json.loads(drawn.stdout.splitlines()[-1])
    picture = watched.folder / "report" / "dashboard.png"
    assert paths == {"dashboard": str(picture), "answers": str(picture.with_suffix(".json"))}
    first = picture.read_bytes()
    assert first.startswith(b"\x89PNG")

    again = hopescale("report", str(watched.folder), "--dashboard", paths["answers"])
    assert again.returncode == 0, again.stderr
    assert picture.read_bytes() == first

    shutil.copytree(watched.folder, tmp_path / "another")
    unknown = hopescale("report", str(tmp_path / "another"), "--dashboard", watched.prometheus.url)
    assert unknown.returncode == 2
    assert f"knows no run of this name; it has {LABELS['run']}" in unknown.stderr
