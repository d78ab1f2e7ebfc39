"""Turns what `ablations.py`, `step_cost.py` and `clip_cost.py` have kept into tables and one picture.

`python tests/benchmarks/ablation_report.py [--results FOLDER] [--out FOLDER]` writes ABLATIONS.md, ablations.png and
the tables of the README. Rows without a result are left out; runs that cannot be compared are refused.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hopescale.report import style
from tests.benchmarks.ablation_results import RESULTS, Spread, Trained, equal_time, load_group
from tests.benchmarks.ablation_rows import ROWS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Column = tuple[str, Callable[[Trained], Spread | None]]

README = Path(__file__).parents[2] / "README.md"
MARKS = ("<!-- ablations -->\n", "<!-- /ablations -->\n")

TITLES = {"demo": "The demo, one change at a time", "hidden": "The probe: hidden friction and mass"}
SKILL_SHOWN = {"demo": "skill_far", "hidden": "skill_context"}
"""The skill that the picture shows, and that is read at equal time, by group."""
SKILL_TITLES = {
    "skill_one_step": "one step",
    "skill_far": "far",
    "skill_jump": "jump",
    "skill_context": "after four true frames",
}
RATIO_TITLES = {
    "writes_off_ratio_one_step": "writes off, one step",
    "writes_off_ratio_far": "writes off, far",
    "writes_off_ratio_context": "writes off, after four",
    "no_past_ratio_context": "no past, after four",
}
TIMED = ("skill_one_step", "skill_far", "skill_context")
"""Skills that evaluations during training measure, and that are read at equal time."""
WHOLE = {
    "demo": (("skill_one_step", "skill_far", "skill_jump"), ("writes_off_ratio_one_step", "writes_off_ratio_far")),
    "hidden": (("skill_one_step", "skill_context"), ("writes_off_ratio_context", "no_past_ratio_context")),
}
"""Skills and ratios of a group's table."""
BRIEF = {
    "demo": (("skill_one_step", "skill_far"), ("writes_off_ratio_far",)),
    "hidden": (("skill_context",), ("writes_off_ratio_context",)),
}
"""The same in the README."""
COLOURS = {
    "S-H-S": style.BLUE,
    "T-T-T": style.ORANGE,
    "T-H-T": style.TEAL,
    "H-H-H": style.PURPLE,
    "U-U-U": "#b4233c",
    "S-S-S": style.STONE,
}

INTRODUCTION = """\
# Ablations

Made from the figures in `results/` by `python tests/benchmarks/ablations.py`, `step_cost.py`, `clip_cost.py` and
`ablation_report.py`. Mean ± half the range over seeds. Skill: 1 is perfect, 0 repeats the last frame given. *Writes
off* and *no past* are error ratios: with memory writes disabled, and with the newest of four true frames alone. Equal
steps: after the whole run. Equal time: read from the same curves after the training seconds of the group's fastest row,
where the learning rate of slower rows has not yet fallen to its end. Training seconds are steps times the seconds of a
step without data and evaluation, one thread, all rows taking turns in one process (`step_cost.py`). The optimizer of
all rows is M3 with two time scales at rate 6e-3 (`optimizer=m3_k2`); today's was chosen after them (BENCHMARKS.md).

![Held-out skill against training time](ablations.png)
"""

LONGER = """\
Seconds and FLOPs: what T-T-T takes, S-H-S = 1, forward and backward on the probe's objective, taking turns in one
process, with as many patches a frame as the probe (16) and the demo (64) have. Skills: of the probe, trained on as many
frames a step and as many steps.

"""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, all columns but the first to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def group_table(rows: Sequence[Trained], *, brief: bool = False) -> str:
    """One row a configuration: skills at equal steps and at equal time, ratios, cost.

    Args:
        rows: of one group; the first takes time 1.
        brief: only what the README shows.
    """
    group = "demo" if rows[0].group == "demo" else "hidden"
    skills, ratios = (BRIEF if brief else WHOLE)[group]
    limit = equal_time(rows)
    columns: list[Column] = [(SKILL_TITLES[name], lambda row, name=name: row.final(name)) for name in skills]
    columns += [
        (f"{SKILL_TITLES[name]} in {limit:.0f} s", lambda row, name=name: row.at_time(name, limit))
        for name in skills
        if name in TIMED
    ]
    columns += [(RATIO_TITLES[name], lambda row, name=name: row.final(name)) for name in ratios]
    facts = [] if brief else ["seeds", "parameters"]
    lines = []
    for row in rows:
        known = {"seeds": str(len(row.runs)), "parameters": f"{row.parameters:,}"}
        figures = [f"{pace(row) / pace(rows[0]):.2f}", *(cell(figure(row)) for _, figure in columns)]
        lines.append([row.name, *(known[fact] for fact in facts), *figures])
    return table(["", *facts, "time a step", *(title for title, _ in columns)], lines)


def pace(row: Trained) -> float:
    """Training seconds a step."""
    return float(row.seconds[-1] / row.steps[-1])


def cell(figure: Spread | None) -> str:
    """A figure, or a dash where there is none."""
    return "–" if figure is None else str(figure)


def cost_table(results: Path) -> str:
    """What longer clips cost attention over all frames, and what it gains; empty without `clip_cost.py`."""
    kept = results / "clip_cost.json"
    if not kept.is_file():
        return ""
    trained = {
        (row.name if row.name.count("-") == 3 else f"{row.name}-7"): row
        for group, names in (("hidden", ["S-H-S", "T-T-T"]), ("length", names_of("length")))
        for name in names
        for row in load_group(results, group, [name])
    }
    measured = json.loads(kept.read_text())["rows"]
    sizes = sorted({row["patches"] for row in measured})
    costs = {(row["transitions"], row["patches"]): row for row in measured}
    lines = []
    for length in sorted({row["transitions"] for row in measured}):
        rows = [trained.get(f"{pattern}-{length}") for pattern in ("S-H-S", "T-T-T")]
        skills = [
            cell(row.final(skill)) if row else "–" for skill in ("skill_one_step", "skill_context") for row in rows
        ]
        ratios = [f"{costs[length, size][name]:.2f}" for size in sizes for name in ("seconds_ratio", "flops_ratio")]
        lines.append([str(length), *ratios, *skills])
    header = ["T", *(f"{cost}, {size} patches" for size in sizes for cost in ("seconds", "FLOPs"))]
    header += [f"{title}, {name}" for title in ("one step", "after four true frames") for name in ("S-H-S", "T-T-T")]
    return "\n## Longer clips\n\n" + LONGER + table(header, lines)


def names_of(group: str) -> list[str]:
    """Names of a group's rows, in order."""
    return [row.name for row in ROWS if row.group == group]


def draw(groups: dict[str, list[Trained]]) -> Figure:
    """Held-out skill of every block pattern against training time: a panel a group, mean and range over seeds."""
    with style.styled():
        figure = style.new_figure(11, 4.4)
        panels = figure.subplots(1, len(groups), squeeze=False)[0]
        figure.subplots_adjust(left=0.06, right=0.88, top=0.87, bottom=0.13, wspace=0.5)
        for axes, (group, rows) in zip(panels, groups.items(), strict=True):
            skill = SKILL_SHOWN[group]
            axes.set_title(f"{TITLES[group].split(':')[0].split(',')[0]}: skill {SKILL_TITLES[skill]}")
            axes.set_xlabel("training seconds")
            draw_skill(axes, rows, skill)
        return figure


def draw_skill(axes: Axes, rows: Sequence[Trained], skill: str) -> None:
    """One line a block pattern, named at its end; rows that change something else are left to the table."""
    named = {("S-H-S" if row.name == "default" else row.name): row for row in rows}
    patterns = {name: row for name, row in named.items() if name in COLOURS}
    ends = []
    for name, row in patterns.items():
        values, colour = row.curves(skill), COLOURS[name]
        axes.fill_between(row.seconds, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0)
        axes.plot(row.seconds, values.mean(0), color=colour, linewidth=2.6 if name == "S-H-S" else 1.7)
        ends.append((float(row.seconds[-1]), float(values.mean(0)[-1]), name, colour))
    axes.set_xlim(0, max(end[0] for end in ends) * 1.02)
    # An untrained model can be many times worse than repeating a frame.
    axes.set_ylim(max(axes.get_ylim()[0], -0.2), None)
    style.label_ends(axes, ends, bold="S-H-S")


def show_in(readme: Path, groups: dict[str, list[Trained]]) -> None:
    """Put the short tables between the marks of a README.

    Raises:
        ValueError: it has no such marks.
    """
    text = readme.read_text()
    if not all(mark in text for mark in MARKS):
        raise ValueError(f"{readme} has no place for the tables: put {MARKS[0]} and {MARKS[1]} around it")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    tables = [f"{TITLES[group]}:\n\n{group_table(rows, brief=True)}" for group, rows in groups.items()]
    readme.write_text("\n".join([before + MARKS[0], *tables]) + MARKS[1] + after)


def main() -> None:
    """Write the page and the picture, and the README's tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=RESULTS.parent)
    parser.add_argument("--readme", type=Path, default=README)
    arguments = parser.parse_args()
    groups = {group: load_group(arguments.results, group, names_of(group)) for group in TITLES}
    groups = {group: rows for group, rows in groups.items() if rows}
    if not groups:
        parser.error(f"{arguments.results} holds no results: run ablations.py first")
    parts = [f"\n## {TITLES[group]}\n\n{run_line(rows)}\n\n{group_table(rows)}" for group, rows in groups.items()]
    page = INTRODUCTION + "".join(parts) + cost_table(arguments.results)
    (arguments.out / "ABLATIONS.md").write_text(page)
    draw(groups).savefig(arguments.out / "ablations.png", metadata={"Software": None})
    show_in(arguments.readme, groups)
    print(f"{arguments.out / 'ABLATIONS.md'}\n{arguments.out / 'ablations.png'}\n{arguments.readme}")


def run_line(rows: Sequence[Trained]) -> str:
    """What the runs of a group have in common."""
    ranks = rows[0].runs[0]["ranks"]
    return f"{rows[0].steps[-1]} steps, {ranks} rank{'s' if ranks > 1 else ''}; times are those of {rows[0].name} = 1."


if __name__ == "__main__":
    main()
