"""The committed dashboards, what must hold for each, and reading of PromQL that goes as far as that needs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hopescale.dashboards.compose import metrics_of
from hopescale.metrics.catalog import CATALOG

FOLDER = Path(__file__).resolve().parents[1] / "ops" / "grafana" / "dashboards"
DASHBOARDS: dict[str, dict[str, Any]] = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*"))}
"""By uid."""

BY_NAME = {metric.name: metric for metric in CATALOG}
OF_PROMETHEUS = {"up"}
"""Prometheus records by itself whether a target answered."""
TARGET_LABELS = {"cluster", "job", "node", "run"}
SOURCE = {"type": "prometheus", "uid": "${datasource}"}

_WINDOW = re.compile(r"\[([^\]]*)\]")
_ALLOWED_WINDOWS = {"$__rate_interval", "$__range", "$__range:$__interval"}
_OF_TOTALS = {"rate", "irate", "increase"}
_OF_REWOUND = {"rate", "resets", "sum_over_time"}
_WORD_BEFORE = re.compile(r"(\w+)\s*$")


def panels_of(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All panels but the headings."""
    for panel in dashboard["panels"]:
        if panel["type"] != "row":
            yield panel
        yield from panel.get("panels", ())


def queries_of(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(panel's title, PromQL) of every target."""
    for panel in panels_of(dashboard):
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def functions_around(promql: str, position: int) -> list[str]:
    """Names of the functions whose brackets a place lies in, from outside to inside."""
    around: list[str] = []
    before = re.sub(r'"(?:[^"\\]|\\.)*"', lambda text: "_" * len(text.group()), promql)[:position]
    for index, character in enumerate(before):
        if character == "(":
            word = _WORD_BEFORE.search(before[:index])
            around.append(word.group(1) if word else "")
        elif character == ")":
            around.pop()
    return around


def source_is_chosen(dashboard: dict[str, Any]) -> Iterator[str]:
    """Nothing names a data source of its own."""
    owners = [*panels_of(dashboard), *(target for panel in panels_of(dashboard) for target in panel["targets"])]
    owners += dashboard["annotations"]["list"]
    variables = dashboard["templating"]["list"]
    owners += [variable for variable in variables if variable["type"] == "query"]
    yield from (f"{owner.get('title', owner)}" for owner in owners if owner.get("datasource") != SOURCE)
    if not any(variable["type"] == "datasource" and variable["name"] == "datasource" for variable in variables):
        yield "no variable datasource"


def panels_are_complete(dashboard: dict[str, Any]) -> Iterator[str]:
    """Title, description, unit and a query."""
    for panel in panels_of(dashboard):
        given = {
            "title": panel.get("title"),
            "description": panel.get("description"),
            "unit": panel["fieldConfig"]["defaults"].get("unit"),
            "targets": panel.get("targets") and all(target.get("expr") for target in panel["targets"]),
        }
        yield from (f"{panel.get('title')}: no {name}" for name, value in given.items() if not value)


def counters_are_rates(dashboard: dict[str, Any]) -> Iterator[str]:
    """A running total is looked at through functions of totals only, and what is no total never.

    None of these may take a total that a resume sets back for a new one from 0.
    """
    for title, promql in queries_of(dashboard):
        for name in metrics_of(promql) & set(BY_NAME):
            metric = BY_NAME[name]
            functions = _OF_REWOUND if metric.rewinds else _OF_TOTALS
            around = [functions_around(promql, match.start()) for match in re.finditer(rf"\b{name}\b", promql)]
            for names in around:
                if (metric.kind == "counter") != bool((_OF_TOTALS | _OF_REWOUND) & set(names)):
                    yield f"{title}: {name} in {promql}"
                elif metric.kind == "counter" and not functions & set(names):
                    yield f"{title}: a resume {'sets' if metric.rewinds else 'does not set'} {name} back in {promql}"
            used = set().union(*around)
            if metric.rewinds and "rate" in used and "resets" not in used:
                yield f"{title}: a resume sets {name} back in {promql}"


def windows_follow_the_time_shown(dashboard: dict[str, Any]) -> Iterator[str]:
    """No window of a fixed length."""
    for title, promql in queries_of(dashboard):
        yield from (f"{title}: [{w}]" for w in _WINDOW.findall(promql) if w not in _ALLOWED_WINDOWS)


def numbers_are_measured(dashboard: dict[str, Any]) -> Iterator[str]:
    """Nothing is shown that was not measured."""
    for title, promql in queries_of(dashboard):
        if re.search(r"\b(vector|absent|absent_over_time)\s*\(", promql) or not metrics_of(promql):
            yield f"{title}: {promql}"


def metrics_are_known(dashboard: dict[str, Any]) -> Iterator[str]:
    """Every name is one of the catalog."""
    for title, promql in queries_of(dashboard):
        yield from (f"{title}: {name}" for name in metrics_of(promql) - set(BY_NAME) - OF_PROMETHEUS)


def queries_are_filtered(dashboard: dict[str, Any]) -> Iterator[str]:
    """Every metric by every variable whose label it has, and by no variable that there is not."""
    names = [variable["name"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    if names[:2] != ["cluster", "run"]:
        yield "variables cluster and run come first"
    asked = [(title, promql, names) for title, promql in queries_of(dashboard)]
    # Marks are of the whole run, whose figures only one of its nodes has.
    asked += [(mark["name"], mark["expr"], names[:2]) for mark in dashboard["annotations"]["list"]]
    for title, promql, filters in asked:
        for name in metrics_of(promql):
            labels = TARGET_LABELS | set(BY_NAME[name].labels if name in BY_NAME else ())
            wanted = "{" + ", ".join(f'{label}=~"${label}"' for label in filters if label in labels)
            if re.search(rf"\b{name}\b(?!{re.escape(wanted)})", promql):
                yield f"{title}: {name} in {promql}"
        unknown = set(re.findall(r"\$(\w+)", promql)) - set(filters) - {"__rate_interval", "__range", "__interval"}
        yield from (f"{title}: ${name}" for name in unknown)


def legends_have_their_labels(dashboard: dict[str, Any]) -> Iterator[str]:
    """A legend names labels that a series of its query can have."""
    for panel in panels_of(dashboard):
        for target in panel["targets"]:
            known = set(TARGET_LABELS)
            for name in metrics_of(target["expr"]) & set(BY_NAME):
                known |= set(BY_NAME[name].labels)
            used = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            yield from (f"{panel['title']}: {{{{{label}}}}}" for label in used - known)


def panels_lie_on_the_grid(dashboard: dict[str, Any]) -> Iterator[str]:
    """Inside 24 columns, nothing on top of something else."""
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        if place["x"] < 0 or place["w"] < 1 or place["h"] < 1 or place["x"] + place["w"] > 24:
            yield f"{panel['title']}: {place}"
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                if (x, y) in taken:
                    yield f"{panel['title']} on top of {taken[x, y]}"
                    return
                taken[x, y] = panel["title"]


def names_are_unique(dashboard: dict[str, Any]) -> Iterator[str]:
    """Numbers and titles of panels, and letters of queries."""
    everything = dashboard["panels"]
    for what in ("id", "title"):
        values = [panel[what] for panel in everything if what == "id" or panel["type"] != "row"]
        yield from (f"{what} {value}" for value in values if values.count(value) > 1)
    for panel in panels_of(dashboard):
        letters = [target["refId"] for target in panel["targets"]]
        yield from (f"{panel['title']}: {letter}" for letter in letters if letters.count(letter) > 1)


RULES = (
    source_is_chosen,
    panels_are_complete,
    counters_are_rates,
    windows_follow_the_time_shown,
    numbers_are_measured,
    metrics_are_known,
    queries_are_filtered,
    legends_have_their_labels,
    panels_lie_on_the_grid,
    names_are_unique,
)
