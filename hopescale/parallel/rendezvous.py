"""Where ranks first meet: all come, or all learn within seconds why they do not fit together."""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from hopescale.errors import ConfigError, Problem

FAREWELL = 10.0
"""Seconds that the rank that holds the store leaves others to come and read why they are refused."""


class Place(NamedTuple):
    """Where ranks meet, as their launcher says."""

    address: str
    port: str
    held: bool
    """Whether the launcher holds a store there itself and keeps it when it starts its ranks anew, as torchrun does."""
    attempt: str
    """Which start of the ranks this is."""


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
            in time, or the store cannot be reached.
    """
    where = f"{place.address}:{place.port}"
    if not place.address or not place.port.isdigit():
        rule = "the launcher must say where ranks meet"
        raise ConfigError(Problem("MASTER_ADDR:MASTER_PORT", where, rule, "start with torchrun"))
    holds = rank == 0 and not place.held
    try:
        store = dist.TCPStore(
            place.address, int(place.port), None, holds, timeout, wait_for_workers=False, multi_tenant=True
        )
        come = dist.PrefixStore(f"hopescale/{place.attempt}/come", store)
        refusal = _arrive(come, rank, world_size, timeout)
        if refusal is not None:
            _leave(come, world_size, holds)
    except dist.DistError as error:
        rule = f"rank {rank} cannot meet the others there: {str(error).splitlines()[0]}"
        fix = "see that it is the first node's address as all nodes know it, and that no firewall closes the port"
        raise ConfigError(Problem("MASTER_ADDR:MASTER_PORT", where, rule, fix)) from None
    if refusal is not None:
        raise ConfigError(Problem("WORLD_SIZE", world_size, refusal, "start every node with the same numbers, once"))
    return dist.PrefixStore(f"hopescale/{place.attempt}/group", store)


def _arrive(come: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str | None:
    """Wait for the others; returns why they cannot go on together."""
    host = socket.gethostname()
    first = come.compare_set("first", "", f"{world_size} ranks are expected by rank {rank} on {host}").decode()
    if first.split()[0] != str(world_size):
        come.compare_set("outcome", "", f"{first}, and {world_size} by rank {rank} on {host}")
    elif come.add(f"rank/{rank}", 1) > 1:
        come.compare_set("outcome", "", f"two processes are rank {rank}, the second on {host}")
    elif come.add("count", 1) == world_size:
        come.compare_set("outcome", "", "all")
    try:
        come.wait(["outcome"], timeout)
    except dist.DistStoreError:
        away = [other for other in range(world_size) if not come.check([f"rank/{other}"])]
        shown = ", ".join(map(str, away[:8])) + (", ..." if len(away) > 8 else "")
        come.compare_set("outcome", "", f"ranks that have not come in {timeout.total_seconds():g} s: {shown}")
    outcome = come.get("outcome").decode()
    return None if outcome == "all" else outcome


def _leave(come: dist.Store, world_size: int, holds: bool) -> None:
    """Go after having read a refusal, the rank that holds the store last."""
    until = time.monotonic() + FAREWELL
    told = come.add("told", 1)
    while holds and told < world_size and time.monotonic() < until:
        time.sleep(0.1)
        told = come.add("told", 0)
