"""The panel of a metric that no one has made one for: everything follows from its row of the catalog."""

from __future__ import annotations

from hopescale.dashboards.panel import Panel, Query
from hopescale.metrics.metric import Metric

TIMESTAMP = "_timestamp_seconds"
GAUGES = {"": "short", "bytes": "bytes", "flops/s": "flops", "ratio": "percentunit", "seconds": "s"}
"""Grafana unit by the catalog's; what is counted is shown as it is."""
FLOWS = {"bytes": "binBps", "clips": "suffix:clips/s", "seconds": "suffix:s/s", "steps": "suffix:steps/s"}
"""Grafana unit of the rate of what goes on all the time; other counters count events."""


_SPELLING = {"cms": "CMS", "flops": "FLOPs", "grad": "gradient", "longterm": "long-term", "param": "parameter"}


def panel_of(metric: Metric) -> Panel:
    """A metric's panel.

    Gauges are drawn as they are and moments as the time since them; of counters, what flows is drawn as its rate, and
    events by their number in each interval. Information is a table of its labels.
    """
    legend = " ".join(["{{run}}", *(_label(name) for name in metric.labels)])
    if metric.record == "info":
        return _panel(metric, metric.name, "short", legend="{{run}}", kind="table", width=24, height=5)
    if metric.key.endswith(TIMESTAMP):
        moment = _words(metric.key.removesuffix(TIMESTAMP))
        return _panel(metric, f"time() - {metric.name}", "s", legend=legend, title=f"Time since {moment}", low=0)
    if metric.kind == "counter" and metric.unit in FLOWS:
        return _panel(metric, rate(metric), FLOWS[metric.unit], legend=legend, low=0)
    if metric.kind == "counter":
        promql = f"increase({metric.name}[$__rate_interval])"
        return _panel(metric, promql, "locale", legend=legend, kind="bars", low=0)
    counted = f"suffix:{metric.unit}" if metric.unit.endswith("/s") else "locale"
    return _panel(metric, metric.name, GAUGES.get(metric.unit, counted), legend=legend)


def rate(metric: Metric) -> str:
    """A counter's rate, without a number where a resume sets it back: all that it counts would be taken for new."""
    series = f"{metric.name}[$__rate_interval]"
    return f"rate({series}) unless resets({series}) > 0" if metric.rewinds else f"rate({series})"


def _panel(metric: Metric, promql: str, unit: str, *, legend: str, title: str = "", **more) -> Panel:
    title = title or _words(metric.key.removesuffix("_total"))
    title = title[0].upper() + title[1:]
    return Panel(title, metric.help, unit, (Query(promql, legend),), **more)


def _words(key: str) -> str:
    return " ".join(_SPELLING.get(word, word) for word in key.split("_"))


def _label(name: str) -> str:
    """Numbers say what they number; names speak for themselves. A rank is looked for on its node."""
    node = "{{node}} " if name == "rank" else ""
    return f"{node}{name} {{{{{name}}}}}" if name in ("rank", "frame", "level") else f"{{{{{name}}}}}"
