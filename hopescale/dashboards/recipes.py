"""Panels and queries that several dashboards have, or of which one has many alike."""

from __future__ import annotations

from collections.abc import Callable

from hopescale.dashboards.generated import total
from hopescale.dashboards.panel import Colour, Panel, Query
from hopescale.metrics.catalog import by_key
from hopescale.metrics.metric import Metric
from hopescale.metrics.reliability_metrics import TIME_CLASSES

Colours = tuple[tuple[float | None, Colour], ...]

OVER_RANKS = (
    Query("max by (cluster, run) (hopescale_step_seconds)", "{{run}} slowest rank"),
    Query("quantile by (cluster, run) (0.5, hopescale_step_seconds)", "{{run}} median"),
    Query("min by (cluster, run) (hopescale_step_seconds)", "{{run}} fastest rank"),
)
WAITING_COLOURS: Colours = ((None, "green"), (0.05, "orange"), (0.2, "red"))
AGE_COLOURS: Colours = ((None, "green"), (300, "orange"), (900, "red"))


def stat(
    title: str,
    description: str,
    unit: str,
    promql: str,
    colours: Colours = (),
    *,
    decimals: int | None = None,
) -> Panel:
    """The newest number, large; eight of them fill a line."""
    return Panel(
        title,
        description,
        unit,
        (Query(promql),),
        kind="stat",
        width=3,
        height=4,
        colours=colours,
        decimals=decimals,
    )


def events(title: str, description: str, key: str) -> Panel:
    """Events in the time shown, counted by the maximum over nodes.

    Where a run comes back on another node, the series there begins at the old total, which is no increase of its own.
    """
    metric = by_key(key)
    promql = total(metric, f"(max by (cluster, run) ({metric.name}))[$__range:$__interval]")
    return stat(title, description, "locale", promql, ((None, "green"), (0.5, "orange")), decimals=0)


def by_class(promql: Callable[[Metric, str], str]) -> tuple[Query, ...]:
    """The time that each class took, what counts first: the bottom of a stack is read best.

    Args:
        promql: of the metric and a selector of its series.
    """
    seconds = by_key("goodput_seconds_total")
    classes = sorted(TIME_CLASSES, key=lambda kind: kind != "step")
    return tuple(Query(promql(seconds, f'{{kind="{kind}"}}'), "{{run}} {{kind}}") for kind in classes)


def in_all(metric: Metric, selector: str) -> str:
    """What a counter has counted in the time shown, in one number a series."""
    return total(metric, f"{metric.name}{selector}[$__range]")


def over(key: str, time_key: str) -> str:
    """The rate of a counter by another one that moves at the same log steps, whose steps the quotient does not have."""
    both = (by_key(key), by_key(time_key))
    quotient = " / ".join(f"sum by (cluster, run) (rate({one.name}[$__rate_interval]))" for one in both)
    set_back = [f" unless on (cluster, run) resets({one.name}[$__rate_interval]) > 0" for one in both if one.rewinds]
    return quotient + "".join(set_back)


GOODPUT = stat(
    "Goodput",
    "Share of the time since the run's first start that went into steps that count.",
    "percentunit",
    "hopescale_goodput_ratio",
    ((None, "red"), (0.5, "orange"), (0.8, "green")),
    decimals=1,
)
