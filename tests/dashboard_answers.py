"""Answers of a Prometheus that there is not, for pictures of dashboards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hopescale.dashboards.answers import Answers, marks
from hopescale.dashboards.compose import Layout, compose
from hopescale.dashboards.variables import Span

SPAN = Span(1_700_000_000.0, 1_700_000_060.0, 1.0, 1.0, {"run": ["a"]})
TIMES = [SPAN.start + second for second in range(61)]
Samples = Sequence[tuple[Mapping[str, str], Sequence[float]]]


def layout_of(name: str) -> Layout:
    """A dashboard by the last part of its uid."""
    return next(layout for layout in compose() if layout.board.uid == f"hopescale-{name}")


def matrix(samples: Samples, times: Sequence[float] = TIMES) -> dict[str, Any]:
    """The data of an answer to `query_range`: labels and numbers of each series."""
    result = [
        {"metric": dict(labels), "values": [[at, repr(value)] for at, value in zip(times, values, strict=True)]}
        for labels, values in samples
    ]
    return {"resultType": "matrix", "result": result}


def answers_for(layout: Layout, titles: Mapping[str, Samples], otherwise: Samples = ()) -> Answers:
    """Answers in which the queries of panels with these titles have these series, and all other queries others."""
    data: dict[str, dict[str, Any]] = {promql: matrix(()) for promql in marks().values()}
    for placed in sorted(layout.panels, key=lambda placed: placed.panel.title in titles):
        for query in placed.panel.queries:
            data[query.promql] = matrix(titles.get(placed.panel.title, otherwise))
    return Answers(SPAN, data)
