"""The part of the `cluster` section that Slurm is told.

Values land in the header of a batch script, where no quoting helps: bash reads a header line as a comment up to the
next line break, and what follows as a command. So every value is held to a pattern that leaves nothing to quote.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

NAME = r"^[A-Za-z0-9][A-Za-z0-9._,:@+-]{0,127}$"
TIME = r"^(\d{1,7}|\d{1,5}:\d{2}(:\d{2})?|\d{1,4}-\d{1,2}(:\d{2}){0,2})$"
MEMORY = r"^\d{1,9}[KMGT]?$"
OPTION = r"^--[a-z][a-z-]{1,40}(=[A-Za-z0-9][A-Za-z0-9._,:@+/*\[\]-]{0,127})?$"
PATH = r"^(~/)?[A-Za-z0-9._/@+=][A-Za-z0-9._/@+=-]{0,1023}$"
IMAGE = r"^[A-Za-z0-9._/@+=][A-Za-z0-9._/@+=:#-]{0,1023}$"
MOUNT = r"^/[A-Za-z0-9._/@+=-]{0,511}:/[A-Za-z0-9._/@+=-]{0,511}(:(ro|rw))?$"

Name = Annotated[str, Field(pattern=NAME)]


def seconds_of(time: str) -> int:
    """Seconds of a time as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash or len(parts) == 3:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, minutes, seconds = 0, *(*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


class SlurmFields(BaseModel):
    """What `hopescale slurm` puts into a job."""

    model_config = ConfigDict(
        allow_inf_nan=False, extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    partition: Name | None = None
    """Partition of the job; null takes the cluster's default."""
    account: Name | None = None
    """Account that pays; null takes the user's default."""
    qos: Name | None = None
    """Quality of service; null takes the partition's default."""
    time: Annotated[str, Field(pattern=TIME)] | None = None
    """Most time of one start, as Slurm writes it: minutes, H:MM:SS or DAYS-HH:MM:SS; null takes the partition's."""
    cpus_per_node: PositiveInt | None = None
    """CPU cores of a node for the ranks on it; null takes what the partition gives."""
    memory: Annotated[str, Field(pattern=MEMORY)] | None = None
    """Host memory of a node, as Slurm writes it: 500G; null takes what the partition gives."""
    options: Annotated[tuple[Annotated[str, Field(pattern=OPTION)], ...], Field(strict=False)] = ()
    """Further options of sbatch, each --name=value."""
    stop_signal: Literal["USR1", "USR2"] = "USR1"
    """Signal with which Slurm tells the job script that its time is nearly over; no rank ever gets it."""
    grace_seconds: Annotated[int, Field(ge=60, le=86_400)] = 300
    """Seconds before the end of its time at which the job begins to save; Slurm may be a minute early."""
    requeue: bool = True
    """Goes back into the queue by itself when it was stopped with a checkpoint, lost a node, or crashed."""
    crashes: PositiveInt = 3
    """Starts without a new checkpoint, crashed or stopped too soon, after which the job gives up (exit code 70)."""
    restarts: NonNegativeInt = 0
    """Times that torchrun starts crashed ranks anew without going back into the queue."""
    container: Annotated[str, Field(pattern=IMAGE)] | None = None
    """Image that the ranks run in: a file, or a name that the runtime knows; null runs them on the node itself."""
    container_runtime: Literal["pyxis", "apptainer", "podman", "docker"] | None = None
    """What runs the image; null is pyxis, as a part of srun."""
    mounts: Annotated[tuple[Annotated[str, Field(pattern=MOUNT)], ...], Field(strict=False)] = ()
    """Folders that are seen in the container, each SOURCE:TARGET; the run folder is one by itself."""
    python: Annotated[str, Field(pattern=PATH)] | None = None
    """Python that has hopescale, on the nodes or in the container; null takes the one that submits, or the image's."""
    env_file: Annotated[str, Field(pattern=PATH)] | None = None
    """File of NAME=VALUE lines for the ranks, such as one of launch/cluster."""
