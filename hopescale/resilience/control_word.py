"""The one small all-reduce of every step: what any rank knows that all of them must act on together.

Signals reach ranks at different moments, and files are seen by some before others. A branch with a collective in it
that goes by a rank's own flag hangs the job, so ranks say here what they know and all go by what came out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from hopescale.errors import Disagreement, Problem, UserError
from hopescale.parallel.agreement import share_failures

from .preemption import Stop, StopRequests

logger = logging.getLogger(__name__)

LEAST_SECONDS_LEFT = 60.0
"""A job with less time left stops, whatever its steps take."""
WORD_BYTES = 6 * 8
"""Of the all-reduce: failed, stop, save, time left, and the skipped steps from above and from below."""


class Interrupted(Exception):
    """Something that can be done again is left unfinished, on all ranks at the same place, because the run stops."""


class ControlWord:
    """Exchanges the word and remembers what was agreed.

    Args:
        requests: what this rank is asked.
        now: a monotonic clock, in seconds.
    """

    def __init__(self, requests: StopRequests, now: Callable[[], float] = time.monotonic) -> None:
        self.requests = requests
        self.stop = Stop.NO
        """Why all ranks are to stop; once it is no longer NO it stays."""
        self.save = False
        """Whether all ranks are to save after this step; whoever does sets it back."""
        self._now = now
        self._spoken: float | None = None
        self._longest_pause = 0.0

    @contextmanager
    def word(self, skipped_steps: int) -> Iterator[None]:
        """A block that a rank may fail in for reasons of its own, as in `Together`; the ranks speak at its end.

        The block must hold no collective. An error in it that is no UserError or OSError passes and ends the launch.

        Args:
            skipped_steps: of the run so far; ranks whose gradients agree have skipped the same.

        Raises:
            UserError: on every rank, what failed on any.
            Disagreement: on every rank: they have not skipped as many steps.
        """
        failure: UserError | OSError | None = None
        try:
            yield
        except (UserError, OSError) as error:
            failure = error
        self._speak(failure, skipped_steps)

    @contextmanager
    def part_of_evaluation(self, skipped_steps: int) -> Iterator[None]:
        """The same for a part of an evaluation.

        Raises:
            Interrupted: on every rank: the run is to stop.
        """
        with self.word(skipped_steps):
            yield
        if self.stop:
            raise Interrupted

    def _speak(self, error: UserError | OSError | None, skipped_steps: int) -> None:
        """Tell the others what this rank knows, and take over what any of them does."""
        now = self._now()
        if self._spoken is not None:
            self._longest_pause = max(self._longest_pause, now - self._spoken)
        self._spoken = now
        # Between two words lie a step, an evaluation's part or a save; the job must have time for two of the longest.
        spare = self.requests.seconds_left - max(LEAST_SECONDS_LEFT, 2 * self._longest_pause)
        stop, save = self.requests.stop, self.requests.save
        said = [float(error is not None), float(stop), float(save), -spare, float(skipped_steps), -float(skipped_steps)]
        heard = torch.tensor(said, dtype=torch.float64)
        dist.all_reduce(heard, op=dist.ReduceOp.MAX)
        failed, stop, save, lack, most_skipped, least_skipped = heard.tolist()
        if failed:
            raise share_failures(error)
        if most_skipped != -least_skipped:
            raise _disagreement(skipped_steps)
        agreed = max(Stop(int(stop)), Stop.TIME if lack > 0 else Stop.NO)
        if agreed and not self.stop:
            logger.warning("stopping with a checkpoint after this step: %s", agreed.reason)
            self.stop = agreed
        if save:
            self.save = True
            self.requests.granted(save=True)


def _disagreement(skipped_steps: int) -> Disagreement:
    by_rank: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(by_rank, skipped_steps)
    rule = "ranks have not skipped the same steps, so some of them compute with other numbers than the rest"
    fix = "find the node whose number is alone (logs/rank-N.log), take it out, and go on from the last checkpoint"
    return Disagreement(Problem("skipped steps by rank", by_rank, rule, fix))
