"""Tables of result.json for the console, for Markdown and for the HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = (
    ("skill_one_step", "skill one step"),
    ("skill_far", "skill far"),
    ("skill_jump", "skill jump"),
    ("shuffled_ratio_one_step", "shuffled one step"),
    ("shuffled_ratio_far", "shuffled far"),
    ("writes_off_ratio_one_step", "writes off one step"),
    ("writes_off_ratio_far", "writes off far"),
)


def number(value: object, digits: int = 3) -> str:
    """Return a value with fixed digits; an en dash where there is none (a missing measurement is not a zero)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return "–"
    return f"{value:.{digits}f}"


def result_table(result: Mapping[str, Any]) -> list[list[str]]:
    """Return header, one row per partition, and the row `mean` (the top level of result.json).

    Columns: partition, three skills (1 = perfect, 0 = copy-last), then error ratios with shuffled actions and with
    memory writes off (1 = makes no difference).
    """
    rows = [["partition", *(title for _, title in COLUMNS)]]
    partitions = result.get("partitions") or {}
    for name, values in [*partitions.items(), ("mean", result)]:
        rows.append([str(name), *(number(values.get(key)) for key, _ in COLUMNS)])
    return rows


def print_result(result: Mapping[str, Any]) -> None:
    """Print the result table to the console."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    header, *rows = result_table(result)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(header[0], overflow="fold", vertical="bottom")
    for title in header[1:]:
        # Stacked words keep the table inside 80 columns.
        measure = next(name for name in ("skill", "shuffled", "writes off") if title.startswith(name))
        lines = [*measure.split(), title.removeprefix(measure).strip()]
        table.add_column("\n".join(lines), justify="right", no_wrap=True, vertical="bottom")
    for row in rows[:-1]:
        # Text, not str: a partition called "[red]" is a name, not markup.
        table.add_row(*(Text(cell) for cell in row))
    table.add_section()
    table.add_row(*(Text(cell, style="bold") for cell in rows[-1]))
    console = Console()
    console.print(table)
    if result.get("skill_context") is not None:
        console.print(Text(f"mean of the frames after four true ones: {_context_figures(result)}"))


def _context_figures(result: Mapping[str, Any]) -> str:
    ratios = (("writes_off_ratio_context", "writes off"), ("no_past_ratio_context", "newest frame alone"))
    measured = [f"{title} {number(result[key])}" for key, title in ratios if result.get(key) is not None]
    return "; ".join([f"skill {number(result['skill_context'])}", *measured])


def markdown_table(result: Mapping[str, Any]) -> str:
    """Return the result table as GitHub Markdown, numbers right-aligned, ending in a newline."""
    header, *rows = result_table(result)
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "".join("| " + " | ".join(_escaped(cell) for cell in line) + " |\n" for line in lines)


def _escaped(cell: str) -> str:
    one_line = " ".join(cell.split())
    for character in "\\`*_[]<>|":
        one_line = one_line.replace(character, "\\" + character)
    return one_line
