"""Turns what `ablations.py --only 'optimizer/*'` has kept into the optimizer's table of BENCHMARKS.md.

`python tests/benchmarks/optimizer_report.py [--results FOLDER]`. A kind's learning rate is the one of three with the
best sum of both skills of seed 0; its other seeds were trained at that rate alone. Intervals are bootstraps over seeds:
95 % of the means of all resamples with replacement.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.benchmarks.ablation_report import names_of, table
from tests.benchmarks.ablation_results import RESULTS, Trained, load_group

PAGE = Path(__file__).with_name("BENCHMARKS.md")
MARKS = ("<!-- optimizer -->\n", "<!-- /optimizer -->\n")
SKILLS = {"skill_one_step": "one step", "skill_far": "far"}
RATIOS = {"writes_off_ratio_one_step": "writes off, one step", "writes_off_ratio_far": "writes off, far"}


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """Ends of the 95 % interval of the mean, over every resample of the values."""
    means = [np.mean(chosen) for chosen in itertools.product(values, repeat=len(values))]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def finals(row: Trained, name: str) -> list[float]:
    """A figure of every seed."""
    return [run["result"][name] for run in row.runs]


def tuned(rows: Sequence[Trained]) -> dict[str, tuple[dict[str, Trained], str]]:
    """Kind -> its rows by learning rate, and the rate that seed 0 likes best."""
    kinds: dict[str, dict[str, Trained]] = {}
    for row in rows:
        kind, rate = row.name.split("-lr")
        kinds.setdefault(kind, {})[rate] = row
    return {
        kind: (by_rate, max(by_rate, key=lambda rate: sum(finals(by_rate[rate], skill)[0] for skill in SKILLS)))
        for kind, by_rate in kinds.items()
    }


def optimizer_table(rows: Sequence[Trained]) -> str:
    """One row a kind, the best first."""
    lines = []
    for kind, (by_rate, best) in tuned(rows).items():
        row = by_rate[best]
        rates = sorted(by_rate, key=float)
        tried = ", ".join(
            f"{rate}: " + " / ".join(f"{finals(by_rate[rate], s)[0]:.3f}" for s in SKILLS) for rate in rates
        )
        skills = []
        for skill in SKILLS:
            low, high = bootstrap(finals(row, skill))
            skills.append(f"{np.mean(finals(row, skill)):.3f} [{low:.3f}, {high:.3f}]")
        ratios = [f"{np.mean(finals(row, ratio)):.2f}" for ratio in RATIOS]
        lines.append([kind, best, *skills, *ratios, tried])
    lines.sort(key=lambda line: line[3], reverse=True)
    return table(["", "rate", *SKILLS.values(), *RATIOS.values(), "seed 0 at each rate, one step / far"], lines)


def main() -> None:
    """Put the table between the marks of BENCHMARKS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = load_group(arguments.results, "optimizer", names_of("optimizer"))
    if not rows:
        parser.error(f"{arguments.results} holds no results: run ablations.py first")
    before, rest = PAGE.read_text().split(MARKS[0])
    PAGE.write_text(before + MARKS[0] + optimizer_table(rows) + MARKS[1] + rest.split(MARKS[1])[1])
    print(optimizer_table(rows))


if __name__ == "__main__":
    main()
