"""What a dashboard is made of, as plain data that knows neither Grafana's file format nor a drawing library."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

from hopescale.metrics.metric import Dashboard

Kind = Literal["stat", "lines", "bars", "gauges", "table"]
Colour = Literal["green", "orange", "red"]

COLUMNS = 24
"""Width of Grafana's grid."""


@dataclass(frozen=True)
class Query:
    """One query of a panel.

    Attributes:
        promql: names metrics without the filters of a dashboard, which are added to each of them later.
        legend: of its series, with labels in braces: `{{run}} {{group}}`.
    """

    promql: str
    legend: str = "{{run}}"


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: unique in its dashboard.
        description: what is seen, in a sentence or two.
        unit: a Grafana unit id, as `hopescale.dashboards.generated` lists those in use.
        queries: at least one.
        kind: `stat` the newest number, large; `lines` and `bars` over time; `gauges` a bar for the newest number of
            each series; `table` a row for each series, of its labels.
        width: in columns; when None, neighbours without one share lines of up to three evenly.
        height: in rows of the grid, 30 pixels each.
        shares: areas on top of each other, as shares of their sum.
        logarithmic: axis.
        decimals: of numbers; as many as it takes when None.
        low: lower end of the axis; what the numbers need when None.
        high: upper end likewise.
        colours: of a stat: from which number on it has which colour, ascending; the first colour has no number.
    """

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    _: KW_ONLY
    kind: Kind = "lines"
    width: int | None = None
    height: int = 8
    shares: bool = False
    logarithmic: bool = False
    decimals: int | None = None
    low: float | None = None
    high: float | None = None
    colours: tuple[tuple[float | None, Colour], ...] = ()

    def asks_once(self, query: Query) -> bool:
        """Whether the newest moment alone is asked for: of a table, and of what looks back over all the time shown."""
        return self.kind == "table" or "$__range" in query.promql


@dataclass(frozen=True)
class Section:
    """Panels under a heading.

    Attributes:
        title: of the heading.
        panels: made by hand, in the order of reading.
        takes: beginnings of the keys of those metrics whose generated panels follow.
    """

    title: str
    panels: tuple[Panel, ...] = ()
    takes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mark:
    """Moments that are marked in all panels of all dashboards.

    Attributes:
        name: of what happened.
        promql: has a value while it is news.
        colour: of the marks.
    """

    name: str
    promql: str
    colour: Literal["blue", "orange"]


@dataclass(frozen=True, kw_only=True)
class Board:
    """A dashboard.

    Attributes:
        dashboard: its name in the catalog.
        uid: its name in addresses, never to be changed.
        description: the question it answers.
        sections: metrics of the catalog that none of them takes or shows come last, under a heading of their own.
        filters: labels that people choose by, beside cluster and run.
    """

    dashboard: Dashboard
    uid: str
    description: str
    sections: tuple[Section, ...]
    filters: tuple[str, ...] = ()
