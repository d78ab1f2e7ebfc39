"""Puts dashboards together: panels made by hand, those generated for all other metrics, filters, places on the grid."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from hopescale.dashboards.boards import BOARDS
from hopescale.dashboards.generated import panel_of
from hopescale.dashboards.panel import COLUMNS, Board, Panel, Query, Section
from hopescale.metrics.catalog import CATALOG
from hopescale.metrics.metric import PREFIX, Metric

FILTERS = ("cluster", "run")
"""Labels that Prometheus gives every series of a run, by which every query is filtered."""
IN_A_LINE = 3
"""Panels beside each other, where none has a width of its own."""

_SELECTOR = re.compile(rf"(?<![\w$\"])({PREFIX}[a-z0-9_]+|up)(?![\w(])(?:\{{([^}}]*)\}})?")


@dataclass(frozen=True)
class Heading:
    """A row with a section's title across the whole width.

    Attributes:
        id: number of the panel in its dashboard.
        title: of the section.
        y: row of the grid.
    """

    id: int
    title: str
    y: int


@dataclass(frozen=True)
class PlacedPanel:
    """A panel in its place, its queries filtered.

    Attributes:
        id: number of the panel in its dashboard.
        panel: what is shown.
        x: first column.
        y: first row.
    """

    id: int
    panel: Panel
    x: int
    y: int


@dataclass(frozen=True)
class Layout:
    """A whole dashboard.

    Attributes:
        board: whose it is.
        items: headings and panels from top to bottom.
    """

    board: Board
    items: tuple[Heading | PlacedPanel, ...]

    @property
    def panels(self) -> tuple[PlacedPanel, ...]:
        """Without the headings."""
        return tuple(item for item in self.items if isinstance(item, PlacedPanel))


def compose(catalog: Sequence[Metric] = CATALOG) -> tuple[Layout, ...]:
    """All dashboards, with every metric of the catalog that belongs to one."""
    return tuple(_layout(board, catalog) for board in BOARDS)


def metrics_of(promql: str) -> set[str]:
    """Names of the metrics in an expression."""
    return {match.group(1) for match in _SELECTOR.finditer(promql)}


def filtered(promql: str, filters: Iterable[str], catalog: Sequence[Metric] = CATALOG) -> str:
    """The expression with the dashboard's variables as filters of each of its metrics.

    Args:
        promql: names metrics bare, or with labels of their own.
        filters: names of variables, which are names of labels too; `rank` only where a metric has it.
        catalog: says which metrics have it.
    """
    with_rank = {metric.name for metric in catalog if "rank" in metric.labels}

    def add(match: re.Match[str]) -> str:
        name, own = match.group(1), match.group(2)
        chosen = [f'{label}=~"${label}"' for label in filters if label != "rank" or name in with_rank]
        return f"{name}{{{', '.join([*chosen, *([own] if own else [])])}}}"

    return _SELECTOR.sub(add, promql)


def _layout(board: Board, catalog: Sequence[Metric]) -> Layout:
    filters = (*FILTERS, *board.filters)
    numbered = enumerate(_placed(_sections(board, catalog)), start=1)
    items = []
    for number, (what, x, y) in numbered:
        if isinstance(what, str):
            items.append(Heading(number, what, y))
            continue
        queries = tuple(Query(filtered(query.promql, filters, catalog), query.legend) for query in what.queries)
        items.append(PlacedPanel(number, replace(what, queries=queries), x, y))
    return Layout(board, tuple(items))


def _sections(board: Board, catalog: Sequence[Metric]) -> Iterator[Section]:
    """The board's sections, each with the generated panels it takes; what is left comes last."""
    by_hand = {
        name
        for section in board.sections
        for panel in section.panels
        for query in panel.queries
        for name in metrics_of(query.promql)
    }
    left = [m for m in catalog if m.dashboard == board.dashboard and m.name not in by_hand]
    for section in board.sections:
        taken = [metric for metric in left if metric.key.startswith(section.takes)]
        left = [metric for metric in left if metric not in taken]
        yield Section(section.title, (*section.panels, *map(panel_of, taken)))
    if left:
        yield Section("Everything else", tuple(map(panel_of, left)))


def _placed(sections: Iterable[Section]) -> Iterator[tuple[str | Panel, int, int]]:
    """Headings and panels with their column and row, line by line."""
    y = 0
    for section in sections:
        yield section.title, 0, y
        y += 1
        for line in _lines(section.panels):
            x = 0
            for panel, width in line:
                yield replace(panel, width=width), x, y
                x += width
            y += max(panel.height for panel, _ in line)


def _lines(panels: Sequence[Panel]) -> Iterator[list[tuple[Panel, int]]]:
    """Panels that stand beside each other, with their widths."""
    for by_hand, group in groupby(panels, key=lambda panel: panel.width is not None):
        together = list(group)
        yield from _full_lines(together) if by_hand else _even_lines(together)


def _even_lines(panels: Sequence[Panel]) -> Iterator[list[tuple[Panel, int]]]:
    rest = list(panels)
    for lines in range(-(-len(panels) // IN_A_LINE), 0, -1):
        count = -(-len(rest) // lines)
        yield [(panel, COLUMNS // count) for panel in rest[:count]]
        del rest[:count]


def _full_lines(panels: Iterable[Panel]) -> Iterator[list[tuple[Panel, int]]]:
    line, taken = [], 0
    for panel in panels:
        width = panel.width or COLUMNS
        if taken + width > COLUMNS:
            yield line
            line, taken = [], 0
        line.append((panel, width))
        taken += width
    yield line
