"""How rows of recorded actions become one action per transition, by name.

Data sets hold actions as they were recorded; the reader aligns them, so that no choice is baked into the shards.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

ActionAlignment = Literal["as-is", "first", "row1-to-row0", "pair-mean", "difference"]
"""as-is: exactly F - 1 rows. first: the first F - 1 rows of more. row1-to-row0: row 1 acts between frames 0 and 1, and
nothing acts later. pair-mean: two rows a stored frame, as for a tubelet of two, and their mean. difference: rows are
poses at the frames, and an action is the difference of two neighbours."""

ALIGNMENTS: tuple[str, ...] = get_args(ActionAlignment)


def rows_needed(alignment: ActionAlignment, frames: int) -> tuple[int, int | None]:
    """Return the least and the greatest number of rows a clip of some frames may have; None for no upper limit."""
    return {
        "as-is": (frames - 1, frames - 1),
        "first": (frames - 1, None),
        "row1-to-row0": (2, None),
        "pair-mean": (2 * (frames - 1), None),
        "difference": (frames, None),
    }[alignment]


def aligned(rows: np.ndarray, alignment: ActionAlignment, frames: int) -> np.ndarray:
    """Return f32 `[frames - 1, A]` from recorded rows `[rows, A]`.

    Args:
        rows: As many as `rows_needed` says.
        alignment: Rule.
        frames: Stored frames of the clip, F.

    Raises:
        ValueError: Another number of rows.
    """
    transitions = frames - 1
    least, most = rows_needed(alignment, frames)
    if len(rows) < least or (most is not None and len(rows) > most):
        raise ValueError(f"{len(rows)} rows of actions do not suit {frames} frames with action alignment {alignment}")
    if alignment == "row1-to-row0":
        actions = np.zeros((transitions, rows.shape[1]), np.float32)
        actions[0] = rows[1]
        return actions
    if alignment == "pair-mean":
        return rows[: 2 * transitions].astype(np.float32).reshape(transitions, 2, -1).mean(1)
    if alignment == "difference":
        return np.diff(rows[:frames].astype(np.float32), axis=0)
    return rows[:transitions].astype(np.float32)
