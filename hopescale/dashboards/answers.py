"""What Prometheus answers to the queries of a dashboard, for a picture of it, now or from a file later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.cache import write_bytes
from data_pipeline.errors import Problem, UserError
from hopescale.dashboards.boards import MARKS
from hopescale.dashboards.compose import FILTERS, Layout, filtered
from hopescale.dashboards.prometheus_api import PrometheusApi, PrometheusError, Series, parse_answer
from hopescale.dashboards.variables import Span

FORMAT = 1


@dataclass(frozen=True)
class Answers:
    """Answers to the queries of dashboards, by the queries as the dashboards have them.

    Attributes:
        span: for which time they were asked, and of which run.
        data: of `query_range`, as it came.
    """

    span: Span
    data: Mapping[str, Mapping[str, Any]]

    def series(self, promql: str) -> list[Series]:
        """The answer to a query.

        Raises:
            KeyError: it was not asked.
        """
        return parse_answer(self.data[promql])

    def save(self, path: Path) -> None:
        """Write them to a file, whole or not at all."""
        document = {"format": FORMAT, "span": asdict(self.span), "answers": self.data}
        write_bytes(path, (json.dumps(document, sort_keys=True) + "\n").encode())


def marks() -> dict[str, str]:
    """Queries for the moments that are marked, by their names."""
    return {mark.name: filtered(mark.promql, FILTERS) for mark in MARKS}


def ask(api: PrometheusApi, layout: Layout, span: Span) -> Answers:
    """Ask everything that a dashboard shows.

    Raises:
        PrometheusError: no answer, or not one of Prometheus.
    """
    data: dict[str, dict[str, Any]] = {}
    for placed in layout.panels:
        for query in placed.panel.queries:
            start = span.end if placed.panel.asks_once(query) else span.start
            data[query.promql] = api.query_range_answer(span.substitute(query.promql), start, span.end, span.step)
    for promql in marks().values():
        data[promql] = api.query_range_answer(span.substitute(promql), span.start, span.end, span.step)
    return Answers(span, data)


def load(path: Path, layout: Layout) -> Answers:
    """Read a file that `Answers.save` wrote.

    Raises:
        UserError: it is none, or not of this dashboard as it is now.
    """
    fix = "ask a Prometheus again: --dashboard http://HOST:9090"
    try:
        document = json.loads(path.read_bytes())
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']}")
        answers = Answers(Span(**document["span"]), document["answers"])
        wanted = [query.promql for placed in layout.panels for query in placed.panel.queries]
        missing = [promql for promql in [*wanted, *marks().values()] if promql not in answers.data]
        for promql in answers.data:
            answers.series(promql)
    except (OSError, ValueError, KeyError, TypeError, PrometheusError) as error:
        rule = f"must be a file of answers that an earlier report has saved ({error})"
        raise UserError(Problem("dashboard", path, rule, fix)) from error
    if missing:
        name = layout.board.dashboard
        rule = f"holds no answer to {len(missing)} queries of the dashboard {name!r}, such as {missing[0]}"
        raise UserError(Problem("dashboard", path, rule, fix))
    return answers
