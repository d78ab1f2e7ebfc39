"""A node's entry in Prometheus' file-based service discovery, there exactly as long as the node's run is meant to live.

Alerts go by it: while there is an entry there is an `up` of 0 or 1, so a node or a run that has died is noticed, and
one that has ended in order is not. What a crash leaves is the next start's, the job script's or the user's to remove.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from data_pipeline.cache import write_bytes
from hopescale.errors import UserError

UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def labels(cluster: str, run: Path, node: str, job: str | None) -> dict[str, str]:
    """Labels that every number of a node carries.

    Args:
        cluster: `cluster.name`.
        run: its folder, of which the name is the label.
        node: name of the machine.
        job: number of its Slurm job, if it is one.
    """
    named = {"cluster": cluster, "run": run.absolute().name, "node": node}
    return named if job is None else named | {"slurm_job_id": job}


class DiscoveryEntry:
    """One file in the folder that `file_sd_configs` names; a context manager.

    Args:
        folder: of the entries, which Prometheus reads too.
        target: ADDRESS:PORT as Prometheus is to reach it.
        named: the labels of `labels`.
        node_rank: number of the node in its run.

    Raises:
        OSError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, target: str, named: Mapping[str, str], node_rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # The job script removes what its ranks could not, by this pattern.
        job = f"-job{named['slurm_job_id']}" if "slurm_job_id" in named else ""
        stem = UNSAFE.sub("_", f"{named['cluster']}-{named['run']}")
        self.path = folder / f"{stem}{job}-{node_rank}.json"
        entry = [{"targets": [target], "labels": dict(named)}]
        write_bytes(self.path, (json.dumps(entry) + "\n").encode())
        # Prometheus runs as another user, and there is no secret in it.
        self.path.chmod(0o644)

    def __enter__(self) -> Self:
        """The entry is there since it was made."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Take the entry away, unless the run crashes: it was meant to live on, and somebody is to be told."""
        if error is None or isinstance(error, UserError):
            self.path.unlink(missing_ok=True)
