"""Panels and queries that several dashboards have, or of which one has many alike."""

from __future__ import annotations

from hopescale.dashboards.panel import Colour, Panel, Query
from hopescale.metrics.catalog import by_key
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
    """Events in the time shown, counted by the maximum over nodes; one that a resume undid and that comes again is two.

    Where a run comes back on another node, the series there begins at the old total, which is no increase of its own.
    """
    metric = by_key(key)
    now, before = (f"max by (cluster, run) ({metric.name}{offset})" for offset in ("", " offset $__interval"))
    promql = f"increase(({now})[$__range:$__interval])"
    if metric.rewinds:
        promql = f"sum_over_time(clamp_min({now} - {before}, 0)[$__range:$__interval])"
    return stat(title, description, "locale", promql, ((None, "green"), (0.5, "orange")), decimals=0)


def by_class(function: str, window: str) -> tuple[Query, ...]:
    """The time that each class took, what counts first: the bottom of a stack is read best."""
    classes = sorted(TIME_CLASSES, key=lambda kind: kind != "step")
    return tuple(
        Query(f'{function}(hopescale_goodput_seconds_total{{kind="{kind}"}}[{window}])', "{{run}} {{kind}}")
        for kind in classes
    )


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
