from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest

from hopescale.dashboards.boards import BOARDS
from hopescale.dashboards.compose import Heading, Layout, PlacedPanel, compose, filtered, metrics_of
from hopescale.dashboards.generated import panel_of
from hopescale.metrics import catalog
from hopescale.metrics.catalog import CATALOG, markdown_table
from hopescale.metrics.metric import Dashboard, Metric
from hopescale.metrics.sinks import prometheus_sidecar
from hopescale.metrics.sinks.prometheus_sidecar import build_registry
from hopescale.metrics.sinks.rank_file import RankFile


def only(layouts: tuple[Layout, ...], dashboard: Dashboard) -> Layout:
    return next(layout for layout in layouts if layout.board.dashboard == dashboard)


@pytest.mark.requires("prometheus")
@pytest.mark.parametrize("dashboard", get_args(Dashboard))
def test_a_metric_added_to_the_catalog_is_in_endpoint_table_and_dashboard_by_itself(
    dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = Metric(
        key="tides_total", kind="counter", unit="tides", reduction="global", help="Tides.", dashboard=dashboard
    )
    longer = (*CATALOG, new)
    for module in (catalog, prometheus_sidecar):
        monkeypatch.setattr(module, "CATALOG", longer)

    from prometheus_client import generate_latest

    RankFile(tmp_path, 0).write([("tides_total", {}, 2.0)], time=0.0)
    assert b"hopescale_tides_total 2.0" in generate_latest(build_registry(tmp_path))
    assert f"| `hopescale_tides_total` | counter | tides | global | {dashboard} | Tides. |" in markdown_table(longer)
    *_, heading, last = only(compose(longer), dashboard).items
    assert isinstance(heading, Heading)
    assert heading.title == "Everything else"
    assert isinstance(last, PlacedPanel)
    assert (last.panel.title, last.panel.description, last.panel.kind) == ("Tides", "Tides.", "bars")
    assert metrics_of(last.panel.queries[0].promql) == {"hopescale_tides_total"}


def test_a_metric_that_a_section_takes_stands_in_it() -> None:
    new = Metric(key="cms_tide", reduction="mean", help="Tide.", dashboard="optimizer and memories")
    *_, before, last = only(compose((*CATALOG, new)), "optimizer and memories").panels
    assert (before.panel.title, last.panel.title) == ("CMS parameter steps", "CMS tide")


def test_every_metric_has_a_panel_of_its_own_or_one_made_by_hand() -> None:
    for layout in compose():
        queries = [query.promql for placed in layout.panels for query in placed.panel.queries]
        titles = [placed.panel.title for placed in layout.panels]
        for metric in CATALOG:
            if metric.dashboard == layout.board.dashboard:
                assert any(metric.name in metrics_of(query) for query in queries)
                assert titles.count(panel_of(metric).title) <= 1
        by_hand = {panel.title for section in layout.board.sections for panel in section.panels}
        assert by_hand <= set(titles)


def test_no_section_is_empty_and_none_is_left_over() -> None:
    for layout in compose():
        are_headings = [isinstance(item, Heading) for item in layout.items]
        assert (True, True) not in pairwise([*are_headings, True])
        assert "Everything else" not in [item.title for item in layout.items if isinstance(item, Heading)]


def test_what_sections_take_is_in_the_catalog() -> None:
    for board in BOARDS:
        keys = [metric.key for metric in CATALOG if metric.dashboard == board.dashboard]
        for section in board.sections:
            assert [start for start in section.takes if not any(key.startswith(start) for key in keys)] == []


@pytest.mark.parametrize(
    ("promql", "filters", "expected"),
    [
        ("hopescale_step", ["run"], 'hopescale_step{run=~"$run"}'),
        ('hopescale_skill{kind="far"}', ["run"], 'hopescale_skill{run=~"$run", kind="far"}'),
        ("rate(hopescale_clips_total[$__range])", ["run"], 'rate(hopescale_clips_total{run=~"$run"}[$__range])'),
        ("max by (run) (hopescale_memory_bytes)", ["rank"], 'max by (run) (hopescale_memory_bytes{rank=~"$rank"})'),
        ("hopescale_loss", ["run", "rank"], 'hopescale_loss{run=~"$run"}'),
        ('up{job="hopescale"}', ["run", "rank"], 'up{run=~"$run", job="hopescale"}'),
        ('hopescale_run_info{version="up"}', ["run"], 'hopescale_run_info{run=~"$run", version="up"}'),
        ("hopescale_loss - hopescale_loss", ["run"], 'hopescale_loss{run=~"$run"} - hopescale_loss{run=~"$run"}'),
    ],
)
def test_filters_are_added_to_every_metric_that_has_their_labels(promql, filters, expected) -> None:
    assert filtered(promql, filters) == expected


def widths(layout: Layout) -> list[int]:
    return [placed.panel.width or 0 for placed in layout.panels]


def test_lines_are_full_where_panels_have_no_width_of_their_own() -> None:
    extra = tuple(Metric(key=f"tide_{n}", reduction="mean", help="Tide.", dashboard="data") for n in range(7))
    layout = only(compose((*CATALOG, *extra)), "data")
    assert widths(layout)[-7:] == [8, 8, 8, 12, 12, 12, 12]
