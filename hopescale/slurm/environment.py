"""What Slurm tells the processes of a job about it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from hopescale.errors import ConfigError, Problem

NUMBER = re.compile(r"[0-9]{1,12}")


@dataclass(frozen=True)
class SlurmJob:
    """The job that this process is of.

    Attributes:
        id: Number of the job; the same after it was requeued.
        restart: Times that it was requeued.
        ends_at: Unix seconds at which its time is over, where Slurm says so.
    """

    id: str
    restart: int = 0
    ends_at: float | None = None

    @property
    def start(self) -> str:
        """Names this start of the job, as the job script does."""
        return f"{self.id}-{self.restart}"

    def succeeds(self, other: SlurmJob) -> bool:
        """Whether Slurm has started this one because that one is over, whatever its processes still do."""
        return self.id == other.id and self.restart > other.restart


def read_job() -> SlurmJob | None:
    """The Slurm job around this process, if there is one.

    Raises:
        ConfigError: a variable of Slurm's is no number.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    restart, ends_at = os.environ.get("SLURM_RESTART_COUNT", "0"), os.environ.get("SLURM_JOB_END_TIME")
    told = {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": restart, "SLURM_JOB_END_TIME": ends_at or "0"}
    rule, fix = "Slurm sets it to a whole number", "unset it outside a job, and leave it alone in one"
    problems = [Problem(name, text, rule, fix) for name, text in told.items() if not NUMBER.fullmatch(text)]
    if problems:
        raise ConfigError(problems)
    return SlurmJob(job, int(restart), float(ends_at) if ends_at else None)
