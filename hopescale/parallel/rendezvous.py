"""Where ranks first meet: all come, or those who came learn why they do not fit together."""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from hopescale.errors import ConfigError, Problem

FAREWELL = 20.0
"""Most seconds that the rank that holds the store leaves others to come and read why they are refused."""
PORTS = range(1, 1 << 16)


class Place(NamedTuple):
    """Where ranks meet, as their launcher says."""

    address: str
    port: str
    held: bool = False
    """Whether the launcher holds a store there itself and keeps it when it starts its ranks anew, as torchrun does."""
    attempt: str = "0"
    """Which start of the ranks this is, where the launcher keeps its store."""

    @property
    def is_named(self) -> bool:
        """Whether there are an address and a port that could be one."""
        return bool(self.address) and self.port.isdecimal() and int(self.port) in PORTS


def meet(rank: int, world_size: int, place: Place, timeout: timedelta) -> dist.Store:
    """A store that every rank of a launch has reached, each of them once and all expecting as many.

    Without this, ranks that were told different world sizes wait for each other until the time is over.

    Args:
        rank: of this process.
        world_size: ranks that this process expects.
        place: where.
        timeout: how long to wait for the store and for all of them.

    Raises:
        ConfigError: on every rank that came: they expect different numbers, two have the same rank, some have not come
            in time, or the store cannot be reached. Ranks that have met already go on; who comes later is refused.
    """
    where = f"{place.address}:{place.port}"
    if not place.is_named:
        rule = "the launcher must say where ranks meet, an address and a port from 1 to 65535"
        raise ConfigError(Problem("MASTER_ADDR:MASTER_PORT", where, rule, "start with torchrun"))
    holds = rank == 0 and not place.held
    try:
        store = dist.TCPStore(
            place.address, int(place.port), None, holds, timeout, wait_for_workers=False, multi_tenant=True
        )
        come = dist.PrefixStore(f"hopescale/{place.attempt}/come", store)
        refusal = _arrive(come, rank, world_size, timeout)
        if refusal is not None:
            _leave(come, rank, holds)
    except dist.DistError as error:
        rule = f"rank {rank} cannot meet the others there: {str(error).splitlines()[0]}"
        fix = "see that it is the first node's address as all nodes know it, and that no firewall closes the port"
        if "EADDRINUSE" in rule:
            fix = "choose another port, or end the launch that uses it"
        raise ConfigError(Problem("MASTER_ADDR:MASTER_PORT", where, rule, fix)) from None
    if refusal is not None:
        raise ConfigError(Problem("WORLD_SIZE", world_size, refusal, "start every node with the same numbers, once"))
    return dist.PrefixStore(f"hopescale/{place.attempt}/group", store)


def _arrive(come: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str | None:
    """Wait for the others; returns why they, or this rank, cannot go on together."""
    host, misfit = socket.gethostname(), None
    first = come.compare_set("first", "", f"{world_size} ranks are expected by rank {rank} on {host}").decode()
    largest = come.compare_set("largest", "", str(world_size))
    while int(largest) < world_size:
        largest = come.compare_set("largest", largest.decode(), str(world_size))
    if first.split()[0] != str(world_size):
        misfit = f"{first}, and {world_size} by rank {rank} on {host}"
    elif come.add(f"rank/{rank}", 1) > 1:
        misfit = f"two processes are rank {rank}, the second on {host}"
    elif come.add("count", 1) == world_size:
        come.compare_set("outcome", "", "all")
    if misfit is not None:
        come.compare_set("outcome", "", misfit)
    try:
        come.wait(["outcome"], timeout)
    except dist.DistStoreError:
        away = [other for other in range(world_size) if not come.check([f"rank/{other}"])]
        shown = ", ".join(map(str, away[:8])) + (", ..." if len(away) > 8 else "")
        come.compare_set("outcome", "", f"ranks that did not come within {timeout.total_seconds():g} s: {shown}")
    outcome = come.get("outcome").decode()
    # All may have met before one that does not fit comes.
    return misfit if outcome == "all" else outcome


def _leave(come: dist.Store, rank: int, holds: bool) -> None:
    """Go after having read a refusal; the rank that holds the store when the largest launch named can have read it."""
    until = time.monotonic() + FAREWELL
    if come.add(f"told/{rank}", 1) == 1:
        come.add("told", 1)
    while holds and come.add("told", 0) < int(come.get("largest")) and time.monotonic() < until:
        time.sleep(0.1)
