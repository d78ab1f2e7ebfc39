"""The figures of trained rows: where they are kept, and what is read from several seeds of a row together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).with_name("results")
STEP_COST = RESULTS / "step_cost.json"


@dataclass(frozen=True)
class Spread:
    """Mean over seeds and half of the distance between the lowest and the highest."""

    mean: float
    half_range: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.count == 1 else f"{self.mean:.3f} ± {self.half_range:.3f}"


def spread(values: Sequence[float | None]) -> Spread | None:
    """The same over the values that are there; None if one is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return Spread(float(np.mean(known)), (max(known) - min(known)) / 2, len(known))


@dataclass(frozen=True)
class Trained:
    """All seeds of one row; their curves have the same steps."""

    group: str
    name: str
    runs: tuple[dict[str, Any], ...]
    step_seconds: float | None = None
    """What a training step takes where nothing disturbs it; None if that was not measured."""

    @property
    def steps(self) -> np.ndarray:
        """Steps at which the runs were evaluated, [n]."""
        return np.array(self.runs[0]["curve"]["step"])

    @property
    def seconds(self) -> np.ndarray:
        """Training seconds by then, [n].

        Raises:
            ValueError: nobody measured what a step takes.
        """
        if self.step_seconds is None:
            raise ValueError(f"{STEP_COST.name} has no seconds of {self.group}/{self.name}: run step_cost.py")
        return self.steps * self.step_seconds

    @property
    def parameters(self) -> int:
        """Of the model."""
        return self.runs[0]["parameters"]

    def curves(self, skill: str) -> np.ndarray:
        """A skill at every evaluation of every seed, [seeds, n]; NaN where it was not measured."""
        return np.array([run["curve"][skill] for run in self.runs], dtype=float)

    def final(self, name: str) -> Spread | None:
        """A figure of result.json, mean over partitions."""
        return spread([run["result"].get(name) for run in self.runs])

    def at_time(self, skill: str, seconds: float) -> Spread | None:
        """A skill after so many training seconds, between two evaluations by interpolation; None before the first."""
        # A millionth of slack: the fastest row is asked for its own last moment.
        if not self.seconds[0] <= seconds <= self.seconds[-1] * (1 + 1e-6):
            return None
        found = [float(np.interp(seconds, self.seconds, curve)) for curve in self.curves(skill)]
        return spread([value if np.isfinite(value) else None for value in found])


def keep(path: Path, figures: dict[str, Any]) -> None:
    """Write JSON with one line a field, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    fields = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in figures.items())
    part.write_text(f"{{\n{fields}\n}}\n")
    part.replace(path)


def load_group(results: Path, group: str, names: Sequence[str]) -> list[Trained]:
    """The rows of a group that have results, in the order of `names`.

    Raises:
        ValueError: runs of the group cannot be compared, for they differ in steps or in ranks.
    """
    rows, kinds = [], {}
    measured = results / STEP_COST.name
    costs = json.loads(measured.read_text()).get(group, {}) if measured.is_file() else {}
    for name in names:
        files = sorted((results / group).glob(f"{name}-seed*.json"))
        runs = [json.loads(file.read_text()) for file in files]
        for file, run in zip(files, runs, strict=True):
            kinds.setdefault((tuple(run["curve"]["step"]), run["ranks"]), file)
        if runs:
            rows.append(Trained(group, name, tuple(runs), costs.get(name)))
    if len(kinds) > 1:
        raise ValueError(f"runs of other steps or ranks cannot be compared: {', '.join(map(str, kinds.values()))}")
    return rows


def equal_time(rows: Sequence[Trained]) -> float:
    """Training seconds that every row has reached: the total of the fastest."""
    return min(float(row.seconds[-1]) for row in rows)
