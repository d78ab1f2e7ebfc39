"""A node's entry in Prometheus' file-based service discovery, there exactly as long as the node's run is meant to live.

Alerts go by it: while there is an entry there is an `up` of 0 or 1, so a node or a run that has died is noticed, and
one that has ended in order is not. What a failed run leaves is the next start's, the job script's or the user's to
remove.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from data_pipeline.cache import write_bytes
from data_pipeline.errors import UserError

logger = logging.getLogger(__name__)

UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
READABLE = 0o644
"""Of files that Prometheus or node_exporter read as other users; there is no secret in them."""
OF_A_START = re.compile(r"(?P<stem>.+?)(?:-job\d+)?-start(?P<start>\d+)-\d+\.json")


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


def file_stem(named: Mapping[str, str], run: Path) -> str:
    """With what the names of a run's files begin where other runs have theirs too; names of folders may be equal."""
    place = hashlib.sha256(str(run.absolute()).encode()).hexdigest()[:8]
    return UNSAFE.sub("_", f"{named['cluster']}-{named['run']}-{place}")


class DiscoveryEntry:
    """One file in the folder that `file_sd_configs` names; a context manager.

    Entries of earlier starts of the run go, and so does any other of the cluster at this address: whoever left it is
    gone, and this run would answer in its name.

    Args:
        folder: of the entries, which Prometheus reads too.
        target: ADDRESS:PORT as Prometheus is to reach it.
        named: the labels of `labels`.
        run: folder of the run.
        incarnation: of the run, from 0.
        node_rank: number of the node in its run.

    Raises:
        OSError: the folder cannot be made or written.
    """

    def __init__(
        self, folder: Path, target: str, named: Mapping[str, str], *, run: Path, incarnation: int, node_rank: int
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        stem = file_stem(named, run)
        # The job script removes what its ranks could not, by this pattern.
        job = f"-job{named['slurm_job_id']}" if "slurm_job_id" in named else ""
        self.run_has_begun = False
        self.path = folder / f"{stem}{job}-start{incarnation:06d}-{node_rank}.json"
        for other in folder.glob("*.json"):
            start = OF_A_START.fullmatch(other.name)
            if start is not None and start["stem"] == stem and int(start["start"]) < incarnation:
                other.unlink(missing_ok=True)
            elif other != self.path and _is_at(other, target, named["cluster"]):
                logger.warning("service discovery has lost %s, whose address is this run's now", other.name)
                other.unlink(missing_ok=True)
        entry = [{"targets": [target], "labels": dict(named)}]
        write_bytes(self.path, (json.dumps(entry) + "\n").encode(), mode=READABLE)

    def __enter__(self) -> Self:
        """The entry is there since it was made."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Take the entry away, unless the run has failed: it was meant to live on, and somebody is to be told.

        A mistake that is found before the run begins is told to whoever starts it.
        """
        mistaken = isinstance(error, UserError) and error.exit_code == UserError.exit_code
        if error is None or (mistaken and not self.run_has_begun):
            self.path.unlink(missing_ok=True)


def _is_at(path: Path, target: str, cluster: str) -> bool:
    """Whether a file is an entry of the cluster at an address."""
    try:
        return any(
            target in entry["targets"] and entry["labels"]["cluster"] == cluster
            for entry in json.loads(path.read_text())
        )
    except (OSError, ValueError, KeyError, TypeError):
        # Somebody else's, or gone.
        return False
