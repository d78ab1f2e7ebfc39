"""The committed dashboards keep the rules of `tests.dashboard_lint`, and each rule finds what it forbids."""

from __future__ import annotations

import copy
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hopescale.dashboards.compose import compose, metrics_of
from hopescale.dashboards.variables import Span
from hopescale.metrics.catalog import CATALOG
from tests import dashboard_lint as lint
from tests.dashboard_lint import DASHBOARDS, FOLDER, RULES

Document = dict[str, Any]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("name", DASHBOARDS)
def test_dashboards_keep_the_rules(name: str, rule: Callable[[Document], Iterator[str]]) -> None:
    assert list(rule(DASHBOARDS[name])) == []


def test_uids_are_unique() -> None:
    uids = [document["uid"] for document in DASHBOARDS.values()]
    assert sorted(uids) == sorted(DASHBOARDS)
    assert len(set(uids)) == len(uids)


def change(document: Document, title: str, **target: str) -> None:
    """Changes the first query of a panel."""
    panel = next(panel for panel in lint.panels_of(document) if panel["title"] == title)
    panel["targets"][0].update(target)


FILTERS = '{cluster=~"$cluster", run=~"$run"}'


@pytest.mark.parametrize(
    ("rule", "spoil"),
    [
        (lint.source_is_chosen, lambda d: d["panels"][1].update(datasource={"type": "prometheus", "uid": "abc"})),
        (lint.source_is_chosen, lambda d: d["panels"][1]["targets"][0].pop("datasource")),
        (lint.source_is_chosen, lambda d: d["templating"]["list"].pop(0)),
        (lint.panels_are_complete, lambda d: d["panels"][1].update(title="")),
        (lint.panels_are_complete, lambda d: d["panels"][1].pop("description")),
        (lint.panels_are_complete, lambda d: d["panels"][1]["fieldConfig"]["defaults"].pop("unit")),
        (lint.panels_are_complete, lambda d: d["panels"][1].update(targets=[])),
        (lint.counters_are_rates, lambda d: change(d, "Loss", expr=f"hopescale_clips_total{FILTERS}")),
        (lint.counters_are_rates, lambda d: change(d, "Loss", expr=f"sum(hopescale_clips_total{FILTERS})")),
        (lint.counters_are_rates, lambda d: change(d, "Loss", expr=f"rate(hopescale_loss{FILTERS}[$__rate_interval])")),
        (
            lint.counters_are_rates,
            lambda d: change(d, "Loss", expr=f"sum_over_time(hopescale_loss{FILTERS}[$__range])"),
        ),
        (lint.counters_are_rates, lambda d: change(d, "Loss", expr=f"rate(hopescale_clips_total{FILTERS}[$__range])")),
        (
            lint.counters_are_rates,
            lambda d: change(d, "Loss", expr=f"increase(hopescale_clips_total{FILTERS}[$__range])"),
        ),
        (
            lint.counters_are_rates,
            lambda d: change(d, "Loss", expr=f"sum_over_time(hopescale_restarts_total{FILTERS}[$__range])"),
        ),
        (lint.windows_follow_the_time_shown, lambda d: change(d, "Loss", expr="rate(hopescale_clips_total[5m])")),
        (lint.numbers_are_measured, lambda d: change(d, "Loss", expr="hopescale_loss or vector(0)")),
        (lint.numbers_are_measured, lambda d: change(d, "Loss", expr="absent(hopescale_loss)")),
        (lint.numbers_are_measured, lambda d: change(d, "Loss", expr="1 + 1")),
        (lint.metrics_are_known, lambda d: change(d, "Loss", expr=f"hopescale_lost{FILTERS}")),
        (lint.queries_are_filtered, lambda d: change(d, "Loss", expr="hopescale_loss")),
        (lint.queries_are_filtered, lambda d: change(d, "Loss", expr='hopescale_loss{run=~"$run"}')),
        (lint.queries_are_filtered, lambda d: change(d, "Loss", expr=f'hopescale_loss{FILTERS[:-1]}, a="$b"}}')),
        (lint.queries_are_filtered, lambda d: d["annotations"]["list"][0].update(expr="hopescale_step")),
        (lint.legends_have_their_labels, lambda d: change(d, "Loss", legendFormat="{{group}}")),
        (lint.panels_lie_on_the_grid, lambda d: d["panels"][2]["gridPos"].update(x=22)),
        (lint.panels_lie_on_the_grid, lambda d: d["panels"][2]["gridPos"].update(x=1)),
        (lint.names_are_unique, lambda d: d["panels"][2].update(id=2)),
        (lint.names_are_unique, lambda d: d["panels"][2].update(title="Step")),
        (lint.names_are_unique, lambda d: change(d, "Parts of the loss", refId="B")),
    ],
)
def test_each_rule_finds_what_it_forbids(rule, spoil: Callable[[Document], object]) -> None:
    document = copy.deepcopy(DASHBOARDS["hopescale-overview"])
    spoil(document)
    assert list(rule(document))


def test_every_metric_of_the_endpoint_is_on_its_dashboard() -> None:
    shown = {
        layout.board.dashboard: {name for _, promql in lint.queries_of(document) for name in metrics_of(promql)}
        for layout in compose()
        for document in [DASHBOARDS[layout.board.uid]]
    }
    for metric in CATALOG:
        if metric.dashboard is None:
            # Only the sharder's file goes another way than the endpoint.
            assert metric.record == "shard", metric.key
        else:
            assert metric.name in shown[metric.dashboard], metric.key


def expressions(document: Document) -> list[str]:
    """Everything that Prometheus will be asked: queries, annotations, and the series behind variables."""
    found = [promql for _, promql in lint.queries_of(document)]
    found += [annotation["expr"] for annotation in document["annotations"]["list"]]
    for variable in document["templating"]["list"]:
        if variable["type"] == "query":
            selector = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"])
            assert selector is not None
            assert selector.group(2) == variable["name"]
            found.append(selector.group(1))
    return found


@pytest.mark.requires("prometheus-server")
@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_query_is_promql(name: str, tmp_path: Path) -> None:
    span = Span(0, 3600, 15, 15, {"run": ['a.b"c'], "rank": ["0", "1"]})
    rules = [
        {"record": f"panel:{number}", "expr": span.substitute(promql)}
        for number, promql in enumerate(expressions(DASHBOARDS[name]))
    ]
    groups = {"groups": [{"name": "panels", "rules": rules}]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(groups))
    checked = subprocess.run(
        ["promtool", "check", "rules", str(tmp_path / "rules.yml")], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"SUCCESS: {len(rules)} rules found" in checked.stdout


def test_provisioning_names_what_grafana_wants() -> None:
    folder = FOLDER.parent / "provisioning"
    source = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())["datasources"][0]
    assert source["type"] == "prometheus"
    provider = yaml.safe_load((folder / "dashboards" / "hopescale.yaml").read_text())["providers"][0]
    readme = (FOLDER.parent / "README.md").read_text()
    assert provider["type"] == "file"
    assert f"cp -r ops/grafana/dashboards {provider['options']['path']}" in readme
