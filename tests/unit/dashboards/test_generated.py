from __future__ import annotations

from typing import Any

import pytest

from hopescale.dashboards.generated import panel_of
from hopescale.metrics.metric import Metric


def metric(**fields: Any) -> Metric:
    row: dict[str, Any] = {"key": "tide", "reduction": "global", "help": "How high."}
    return Metric(**row | fields)


@pytest.mark.parametrize(
    ("row", "kind", "unit", "promql"),
    [
        ({"unit": ""}, "lines", "short", "hopescale_tide"),
        ({"unit": "steps"}, "lines", "locale", "hopescale_tide"),
        ({"unit": "clips/s"}, "lines", "suffix:clips/s", "hopescale_tide"),
        ({"unit": "flops/s"}, "lines", "flops", "hopescale_tide"),
        ({"key": "tide_ratio", "unit": "ratio"}, "lines", "percentunit", "hopescale_tide_ratio"),
        ({"key": "tide_bytes", "unit": "bytes"}, "lines", "bytes", "hopescale_tide_bytes"),
        ({"key": "tide_seconds", "unit": "seconds"}, "lines", "s", "hopescale_tide_seconds"),
        (
            {"key": "tide_timestamp_seconds", "unit": "seconds"},
            "lines",
            "s",
            "time() - hopescale_tide_timestamp_seconds",
        ),
        (
            {"key": "tide_bytes_total", "unit": "bytes", "kind": "counter"},
            "lines",
            "binBps",
            "rate(hopescale_tide_bytes_total[$__rate_interval])",
        ),
        (
            {"key": "tide_total", "unit": "clips", "kind": "counter"},
            "lines",
            "suffix:clips/s",
            "rate(hopescale_tide_total[$__rate_interval])",
        ),
        (
            {"key": "tide_total", "unit": "errors", "kind": "counter"},
            "bars",
            "locale",
            "increase(hopescale_tide_total[$__rate_interval])",
        ),
        (
            {"key": "tide_total", "unit": "clips", "kind": "counter", "rewinds": True},
            "lines",
            "suffix:clips/s",
            "rate(hopescale_tide_total[$__rate_interval]) unless resets(hopescale_tide_total[$__rate_interval]) > 0",
        ),
        ({"record": "info", "labels": ("version",)}, "table", "short", "hopescale_tide"),
    ],
)
def test_kind_unit_and_query_follow_from_the_row(row: dict[str, Any], kind: str, unit: str, promql: str) -> None:
    panel = panel_of(metric(**row))
    (query,) = panel.queries
    assert (panel.kind, panel.unit, query.promql) == (kind, unit, promql)
    assert panel.description == "How high."


@pytest.mark.parametrize(
    ("labels", "legend"),
    [
        ((), "{{run}}"),
        (("group",), "{{run}} {{group}}"),
        (("level",), "{{run}} level {{level}}"),
        (("rank",), "{{run}} {{node}} rank {{rank}}"),
    ],
)
def test_labels_are_the_legend(labels: tuple[str, ...], legend: str) -> None:
    assert panel_of(metric(labels=labels)).queries[0].legend == legend


@pytest.mark.parametrize(
    ("key", "title"),
    [
        ("cms_tide_total", "CMS tide"),
        ("param_norm", "Parameter norm"),
        ("last_tide_timestamp_seconds", "Time since last tide"),
    ],
)
def test_the_title_is_the_key_in_words(key: str, title: str) -> None:
    assert panel_of(metric(key=key)).title == title
