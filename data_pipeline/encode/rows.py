"""Rows recorded with pixel frames (actions, states, extrinsics) as rows of stored frames.

Actions stay as they were recorded, with the name of the rule that makes them one per transition. States and extrinsics
belong to moments, so they are taken at the first pixel frame of each stored frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from data_pipeline.alignment import ActionAlignment, rows_needed

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Timeline:
    """How stored frames lie on the frames of the recording.

    Attributes:
        taken: i64 `[P]`, which recorded frame each pixel frame is.
        recorded: Frames of the recording, or None if its end was not seen.
        tubelet: Pixel frames in a stored frame; what is left over at the end belongs to none.
    """

    taken: NDArray[np.int64]
    recorded: int | None
    tubelet: int

    @property
    def pixel_frames(self) -> int:
        """P."""
        return len(self.taken)

    @property
    def frames(self) -> int:
        """Stored frames, F."""
        return len(self.taken) // self.tubelet

    @property
    def is_thinned(self) -> bool:
        """Whether recorded frames between the pixel frames were left out."""
        return not np.array_equal(self.taken, np.arange(len(self.taken)))


def stored_rows(
    recorded: Mapping[str, Rows], timeline: Timeline, alignment: ActionAlignment | None
) -> tuple[dict[str, Rows], ActionAlignment]:
    """Return the rows to store and the rule that aligns the actions.

    Args:
        recorded: f32 `[rows, numbers]` by field, with actions.
        timeline: Of the clip.
        alignment: Rule the user named, or None to find it by the number of action rows.

    Raises:
        ValueError: Fewer than two stored frames, or a number of rows that fits no rule.
    """
    if timeline.frames < 2:
        rule = f"{timeline.pixel_frames} pixel frames are {timeline.frames} stored ones of {timeline.tubelet}"
        raise ValueError(f"{rule}, and a clip needs two")
    if alignment is None:
        actions, rule = _aligned_by_count(recorded["actions"], timeline)
    else:
        actions, rule = _checked(recorded["actions"], timeline, alignment), alignment
    rows = {"actions": actions}
    if "extrinsics" in recorded:
        rows["extrinsics"] = _at_frames("extrinsics", recorded["extrinsics"], timeline, timeline.frames - 1)
    if "states" in recorded:
        rows["states"] = _at_frames("states", recorded["states"], timeline, timeline.frames)
    return rows, rule


def common_alignment(rules: Iterable[str]) -> ActionAlignment:
    """Return the rule that holds for all clips of a folder.

    Raises:
        ValueError: There is none.
    """
    found = set(rules)
    if found == {"as-is", "first"}:
        # The first F - 1 of exactly F - 1 rows are all of them.
        return "first"
    if len(found) != 1:
        raise ValueError(f"clips need different rules: {', '.join(sorted(found))}")
    return cast(ActionAlignment, found.pop())


def _aligned_by_count(rows: Rows, timeline: Timeline) -> tuple[Rows, ActionAlignment]:
    frames, pixel_frames, given = timeline.frames, timeline.pixel_frames, len(rows)
    if given == frames - 1:
        return rows, "as-is"
    if given == frames:
        return rows, "first"
    if given > pixel_frames and timeline.recorded is None and not timeline.is_thinned:
        # The rest acts between frames that were not asked for.
        rows, given = rows[:pixel_frames], pixel_frames
    if given in (pixel_frames - 1, pixel_frames):
        if timeline.tubelet == 1:
            return rows, "first"
        if timeline.tubelet == 2:
            return rows, "pair-mean"
        raise ValueError(
            f"there is no rule for {timeline.tubelet} actions a stored frame: store {frames - 1} actions, one for each "
            "transition"
        )
    hint = ""
    if timeline.is_thinned:
        hint = "; fps leaves frames out: resample actions too, or set alignment=difference if they are poses"
    pixel_rows = f", or {pixel_frames - 1} or {pixel_frames} for its pixel frames" if timeline.tubelet > 1 else ""
    raise ValueError(f"{given} actions for {frames} stored frames, not {frames - 1} or {frames}{pixel_rows}{hint}")


def _checked(rows: Rows, timeline: Timeline, alignment: ActionAlignment) -> Rows:
    if alignment == "difference":
        # Poses belong to moments, as states do.
        return _at_frames("actions", rows, timeline, timeline.frames)
    least, greatest = rows_needed(alignment, timeline.frames)
    if len(rows) < least or (greatest is not None and len(rows) > greatest):
        wanted = f"exactly {least}" if least == greatest else f"at least {least}"
        raise ValueError(f"{len(rows)} actions, and alignment={alignment} needs {wanted} for {timeline.frames} frames")
    return rows


def _at_frames(field: str, rows: Rows, timeline: Timeline, needed: int) -> Rows:
    """Return one row for each of the first `needed` stored frames."""
    given, step = len(rows), timeline.tubelet
    missing = timeline.frames - needed
    if given in (timeline.frames, needed):
        return rows[:needed]
    if given in (timeline.pixel_frames, timeline.pixel_frames - missing):
        return rows[::step][:needed]
    places = timeline.taken[::step][:needed]
    whole = timeline.recorded
    if given > places[-1] and (whole is None or given in (whole, whole - missing)):
        return rows[places]
    counts = dict.fromkeys(count for count in (needed, timeline.pixel_frames, whole) if count is not None)
    raise ValueError(f"{given} rows of {field}, not {' or '.join(str(count) for count in counts)}")
