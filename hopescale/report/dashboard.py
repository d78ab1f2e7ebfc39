"""Draws a dashboard of a run from what a Prometheus has of it, where there is no Grafana or to keep a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

from data_pipeline.errors import Problem, UserError, nearest
from hopescale.dashboards.answers import Answers, ask, load
from hopescale.dashboards.compose import Layout, compose
from hopescale.dashboards.prometheus_api import PrometheusApi
from hopescale.dashboards.variables import Span
from hopescale.report.dashboard_picture import draw
from hopescale.report.evaluation import read_metrics
from hopescale.report.files import png, write_whole

POINTS = 500
"""At most so many are asked for each series: the widest panel has no more pixels worth telling apart."""
SPARE_SECONDS = 60.0
"""Clocks of a run and of its Prometheus may differ, and the last scrape comes after the last log step."""
USUAL_SCRAPE_SECONDS = 15.0


def write_dashboard(
    run: Path, source: str, *, board: str = "overview", run_label: str | None = None
) -> tuple[Path, Path]:
    """Write RUN/report/dashboard.png and the answers it is drawn from, dashboard.json.

    Args:
        run: run folder; metrics.jsonl says which time to ask for.
        source: address of a Prometheus, or a file of saved answers.
        board: the dashboard's name, as its file is called without `hopescale-`. Of others than the overview the name is
            part of the names of both files.
        run_label: the run's name in Prometheus; that of its folder when None.

    Returns:
        The picture and the answers.

    Raises:
        UserError: no such dashboard, no Prometheus, nothing of the run there, or no file of answers.
        MissingExtra: matplotlib is not installed.
    """
    layout = _layout(board)
    if source.startswith(("http://", "https://")):
        answers = _ask(PrometheusApi(source), layout, run, run_label or run.resolve().name)
    else:
        answers = load(Path(source), layout)
    image = png(draw(layout, answers))
    folder = run / "report"
    folder.mkdir(exist_ok=True)
    stem = "dashboard" if board == "overview" else f"dashboard-{board}"
    picture, kept = folder / f"{stem}.png", folder / f"{stem}.json"
    write_whole(picture, image)
    answers.save(kept)
    return picture, kept


def _layout(name: str) -> Layout:
    layouts = {layout.board.uid.removeprefix("hopescale-"): layout for layout in compose()}
    if name not in layouts:
        raise UserError(Problem("board", name, "must be one of the dashboards", nearest(name, layouts)))
    return layouts[name]


def _ask(api: PrometheusApi, layout: Layout, run: Path, name: str) -> Answers:
    """The answers for the time in which Prometheus has seen the run."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        rule = "the dashboard shows the time of the steps in this file"
        raise UserError(Problem("run", path, rule, "name the folder of a run that has logged a step"))
    moments = [record["time"] for record in read_metrics(path)[0] if isinstance(record.get("time"), int | float)]
    known = api.label_values("run", "hopescale_step")
    if name not in known or not moments:
        seen = f"it has {', '.join(known)}" if known else "it has no run, or its targets have no label run"
        rule = f"{api.url} knows no run of this name; {seen}"
        raise UserError(Problem("run", name, rule, "name it by --run-label, or let that Prometheus scrape the run"))
    first, last = min(moments), max(moments)
    selector = Span(first, last, 1, 1, {"run": [name]}).substitute('hopescale_step{run=~"$run"}')
    seconds = round(last - first + 2 * SPARE_SECONDS)
    scrapes = [one.times for one in api.query(f"{selector}[{seconds}s]", last + SPARE_SECONDS)]
    if not scrapes:
        start, end = (f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S}" for at in (first, last))
        rule = f"{api.url} knows the run, but has nothing of it from {start} to {end} UTC, when it trained"
        raise UserError(Problem("run", name, rule, "name the Prometheus that scraped it then"))
    return ask(api, layout, _span(scrapes, name))


def _span(scrapes: Sequence[Sequence[float]], name: str) -> Span:
    """From the first scrape to the last, as finely as there are scrapes or points."""
    apart = [later - earlier for times in scrapes for earlier, later in pairwise(times)]
    interval = round(statistics.median(apart), 3) if apart else USUAL_SCRAPE_SECONDS
    end = max(times[-1] for times in scrapes)
    start = min(*(times[0] for times in scrapes), end - 4 * interval)
    return Span(start, end, max(interval, (end - start) / POINTS), interval, {"run": [name]})
