"""Which phase of its curriculum a run is in, decided alike on every rank.

A phase begins at its step, or when the memories' surprise no longer falls. The surprise is seen on log steps only,
where all ranks learn the same reduced number, and only that of the log step itself: so nothing between two log steps
must be remembered, and a checkpoint may be taken, and a run stopped, at any step. Noise of single steps averages out
over a window, a row of log steps whose mean is compared with that of the window before.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from hopescale.model.objective_schema import ObjectiveConfig, PlateauConfig

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a curriculum has come; a checkpoint holds it."""

    phase: int = 0
    """Phases that have begun; 0 is the objective itself."""
    window_began: int = 0
    """Optimizer steps done when the window began that is now being filled."""
    window_sum: float = 0.0
    """Surprise of its log steps, added up."""
    window_count: int = 0
    """Its log steps so far."""
    mean_before: float | None = None
    """Mean surprise of the window before; None in the first one of a phase."""


class Curriculum:
    """The objective of a run, phase by phase.

    Args:
        config: the objective with its phases.
        progress: where the run stands, in place.
    """

    def __init__(self, config: ObjectiveConfig, progress: Progress) -> None:
        self.progress = progress
        self._phases, self._stages = config.curriculum, config.stages

    @property
    def objective(self) -> ObjectiveConfig:
        """What is trained now."""
        return self._stages[self.progress.phase]

    @property
    def awaited(self) -> PlateauConfig | None:
        """The plateau that begins the next phase, if one does."""
        waiting = self._phases[self.progress.phase :]
        return waiting[0].plateau if waiting else None

    def arrive(self, step: int) -> None:
        """Begin the phases whose step has come.

        Args:
            step: optimizer steps done; the next one is the first of a phase with this start.
        """
        starts = [(number, phase.start) for number, phase in enumerate(self._phases, 1) if phase.start is not None]
        latest = max((number for number, start in starts if start <= step), default=0)
        if latest > self.progress.phase:
            self._begin(latest, step)

    def see(self, step: int, surprise: float) -> None:
        """Take in the surprise of a log step, and begin the next phase if that is its plateau.

        Args:
            step: optimizer steps done.
            surprise: mean over all ranks' memory writes of the last of them.
        """
        seen, plateau = self.progress, self.awaited
        if plateau is None:
            return
        seen.window_sum += surprise
        seen.window_count += 1
        if step - seen.window_began < plateau.patience:
            return
        mean, before = seen.window_sum / seen.window_count, seen.mean_before
        seen.window_began, seen.window_sum, seen.window_count, seen.mean_before = step, 0.0, 0, mean
        if before is not None and step >= plateau.earliest and mean >= (1 - plateau.min_fall) * before:
            self._begin(seen.phase + 1, step)

    def _begin(self, phase: int, step: int) -> None:
        seen = self.progress
        seen.phase = phase
        seen.window_began, seen.window_sum, seen.window_count, seen.mean_before = step, 0.0, 0, None
        logger.info("phase %d of %d of the curriculum begins after step %d", phase, len(self._phases), step)
