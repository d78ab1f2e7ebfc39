"""Where a run goes on.

1. No committed checkpoint in the run folder: start at step 0.
2. Else the newest whose manifest verifies; a damaged one is renamed to *.damaged and the next older is tried.
3. All damaged: an error (exit code 71), never a silent start from scratch.
4. The checkpoint's configuration differs in what shapes the training curve: an error that names the fields.
   train.steps may change, to make a run longer or shorter; the learning rate's phases are then shares of the new one.
   So may optimizer.plan between exact plans, which all come to the same update.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

from hopescale.errors import CheckpointError, ConfigError, Problem

from .manifest import verify
from .staging import committed

CURVE_SECTIONS = ("model", "objective", "optimizer")
INEXACT_PLAN = "block_periodic"
CURVE_FIELDS = ("data.view", "data.frames", "train.seed", "train.global_batch", "parallel.precision")


def newest_valid(root: Path) -> Path | None:
    """The checkpoint to resume from, by rules 1-3; call it in one process, before the others read.

    Raises:
        CheckpointError: there are checkpoints and none is whole.
    """
    candidates = committed(root)
    reasons = []
    for folder in candidates:
        try:
            verify(folder)
        except CheckpointError as error:
            reasons.extend(error.problems)
            _set_aside(folder)
        else:
            return folder
    if not reasons and root.is_dir():
        rule = "was found damaged before, and nothing else is left to resume from"
        fix = "restore it, or delete it to start from step 0"
        reasons = [Problem("checkpoint", p, rule, fix) for p in sorted(root.glob("step-*.damaged*"))]
    if reasons:
        raise CheckpointError(reasons)
    return None


def _set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint to a name that is free: one step can be damaged more than once."""
    names = (f"{folder.name}.damaged{'' if n == 1 else f'-{n}'}" for n in count(1))
    folder.rename(next(p for p in map(folder.with_name, names) if not p.exists()))


def check_same_curve(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to continue a run under another configuration (rule 4).

    Args:
        saved: the checkpoint's resolved configuration.
        current: this run's.

    Raises:
        ConfigError: all differing fields.
    """
    old, new = _flat(saved), _flat(current)
    # Log steps are where a curriculum sees whether there is a plateau.
    curve_fields = {*CURVE_FIELDS, "metrics.every"} if _waits_for_plateau(current) else set(CURVE_FIELDS)
    fields = sorted(
        name for name in old.keys() | new.keys() if name.split(".")[0] in CURVE_SECTIONS or name in curve_fields
    )
    if INEXACT_PLAN not in (old.get("optimizer.plan.strategy"), new.get("optimizer.plan.strategy")):
        inexact = "optimizer.plan.gram_wire"
        fields = [name for name in fields if name == inexact or not name.startswith("optimizer.plan.")]
    problems = [
        Problem(
            name,
            new.get(name, "absent"),
            f"this run folder was trained with {old.get(name, 'no such field')}",
            "resume with the old value, or start a new run in another run.dir",
        )
        for name in fields
        if old.get(name) != new.get(name)
    ]
    if problems:
        raise ConfigError(problems)


def _waits_for_plateau(config: dict[str, Any]) -> bool:
    return any(phase["plateau"] is not None for phase in config["objective"]["curriculum"])


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {name: value for key in tree for name, value in _flat(tree[key], f"{prefix}.{key}".lstrip(".")).items()}
