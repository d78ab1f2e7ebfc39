"""A container's health check: whether the endpoints that its runs have announced still answer.

`python -m hopescale.metrics.healthcheck RUNS` prints what it found and ends with 0 or 1.

An endpoint is withdrawn when its trainer ends and answers for as long as it lives, so one that is announced and silent
belongs to a trainer that was killed, or lost its sidecar. A trainer that stands still answers all the same: the age of
`hopescale_last_step_timestamp_seconds` tells that. Commands that announce nothing are healthy while they run.

Imports the standard library only, and what does the same: it is started every few seconds for the life of a job.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hopescale.process_start import seconds_after_boot

ANNOUNCEMENT = "metrics-endpoint*.json"
PLACES = (ANNOUNCEMENT, f"*/{ANNOUNCEMENT}", f"runs/*/{ANNOUNCEMENT}")
"""Where a run folder may be: the given folder itself, in it, or in `run.root`, whose default is `runs`."""
TIMEOUT_SECONDS = 5.0
CLOCK_SLACK_SECONDS = 2.0


@dataclass(frozen=True)
class Announced:
    """An endpoint that a trainer has announced.

    Attributes:
        file: The announcement, in the run folder.
        host: Address to ask.
        port: Port to ask.
    """

    file: Path
    host: str
    port: int


def announced(folder: Path, node: str, since: float) -> Iterator[Announced]:
    """Endpoints that were announced by this container in its present life.

    Args:
        folder: Holds run folders, also those of other containers.
        node: This container's host name.
        since: Unix time of its start: a container that was killed and started again keeps its name, and what it
            could not withdraw.

    Raises:
        ValueError: an announcement holds something else.
    """
    for pattern in PLACES:
        for file in sorted(folder.glob(pattern)):
            try:
                written, text = file.stat().st_mtime, file.read_text()
            except (FileNotFoundError, PermissionError):
                continue  # the run has just ended, or is another user's
            if written < since - CLOCK_SLACK_SECONDS:
                continue
            try:
                entry = json.loads(text)
                if entry["node"] == node:
                    yield Announced(file, str(entry["host"]), int(entry["port"]))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{file} is no announcement of an endpoint: {error!r}") from error


def complaint(endpoint: Announced) -> str | None:
    """What is wrong with an endpoint, or None. One that asks for a token is alive."""
    connection = http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        server = answer.getheader("Server", "").strip()
    except (OSError, http.client.HTTPException) as error:
        return f"does not answer ({error!r})"
    finally:
        connection.close()
    if server != "hopescale":
        return f"is answered by another server ({server or 'without a name'})"
    return None if answer.status in (200, 401) else f"answers {answer.status}"


def container_start() -> float:
    """Unix time at which process 1 started."""
    boot = next(line.split()[1] for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    return float(boot) + seconds_after_boot(1)


def main(arguments: list[str] | None = None) -> int:
    """Asks every announced endpoint, and prints what it found.

    Returns:
        0 if all answer or there is none, 1 otherwise.
    """
    parser = argparse.ArgumentParser(prog="healthcheck", description="Asks the metrics endpoints of this container.")
    parser.add_argument("runs", type=Path, help="folder of run folders")
    options = parser.parse_args(arguments)
    try:
        endpoints = list(announced(options.runs, socket.gethostname(), container_start()))
    except ValueError as error:
        print(error)
        return 1
    if not endpoints:
        print("healthy: nothing here has announced metrics")
    complaints = [(endpoint, complaint(endpoint)) for endpoint in endpoints]
    for endpoint, wrong in complaints:
        where = f"http://{endpoint.host}:{endpoint.port}/healthz of {endpoint.file.parent}"
        print(f"unhealthy: {where} {wrong}" if wrong else f"healthy: {where}")
    return int(any(wrong for _, wrong in complaints))


if __name__ == "__main__":
    sys.exit(main())
