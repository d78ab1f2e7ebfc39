"""Ranks that fit together meet; others all learn why they do not."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from hopescale.errors import ConfigError
from hopescale.parallel import rendezvous
from hopescale.parallel.rendezvous import Place, meet


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, free_port: int) -> Place:
    monkeypatch.setattr(rendezvous, "FAREWELL", 1.0)
    return Place("127.0.0.1", str(free_port))


def met(
    place: Place, ranks: Sequence[tuple[int, int]], seconds: float = 30, apart: float = 0
) -> list[dist.Store | str]:
    """What becomes of each (rank, world size), coming so many seconds apart: the store, or what it is told."""

    def one(number: int) -> dist.Store | str:
        rank, world_size = ranks[number]
        time.sleep(number * apart)
        try:
            return meet(rank, world_size, place, timedelta(seconds=seconds))
        except ConfigError as error:
            return error.problems[0].rule

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, range(len(ranks))))


def test_ranks_that_expect_as_many_meet_in_one_store(place: Place) -> None:
    stores = met(place, [(0, 3), (2, 3), (1, 3)])
    assert all(isinstance(store, dist.Store) for store in stores)
    assert isinstance(stores[0], dist.Store)
    assert isinstance(stores[1], dist.Store)
    stores[0].set("a", "b")
    assert stores[1].get("a") == b"b"


def test_ranks_that_expect_other_numbers_are_all_told_who_expects_what(place: Place) -> None:
    # Rank 1 would wait for a third one, rank 0 not even for rank 1.
    told = met(place, [(0, 2), (1, 3)])
    assert told[0] == told[1]
    assert isinstance(told[0], str)
    assert "2 ranks are expected by rank 0" in told[0] or "2 by rank 0" in told[0]
    assert "3 ranks are expected by rank 1" in told[0] or "3 by rank 1" in told[0]


def test_a_rank_that_comes_twice_is_named_to_all(place: Place) -> None:
    told = met(place, [(0, 3), (1, 3), (1, 3)])
    assert len(set(map(str, told))) == 1
    assert "two processes are rank 1" in str(told[0])


@pytest.mark.parametrize("late", [[(1, 3), (2, 3)], [(1, 2)], [(2, 4), (0, 2)]])
def test_ranks_that_come_beside_those_that_have_met_are_refused_at_once(
    place: Place, late: list[tuple[int, int]]
) -> None:
    began = time.monotonic()
    stores = met(place, [(0, 2), (1, 2), *late], apart=0.3)
    assert [isinstance(store, dist.Store) for store in stores] == [True, True] + [False] * len(late)
    for (rank, world_size), told in zip(late, stores[2:], strict=True):
        wanted = (
            f"two processes are rank {rank}"
            if world_size == 2
            else f"2 ranks are expected by rank 0 on .*, and {world_size} by"
        )
        assert re.match(wanted, str(told)), told
    assert time.monotonic() - began < 10


def test_the_store_stays_until_the_largest_launch_has_read_why_it_is_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "FAREWELL", 30.0)
    told = met(place, [(0, 2), (2, 4), (1, 2), (3, 4)], apart=0.5)
    assert len(set(map(str, told))) == 1
    told = met(place, [(0, 3), (1, 3), (1, 3), (2, 3)], apart=0.5)
    assert len(set(map(str, told))) == 1
    assert "two processes are rank 1" in str(told[0])


def test_a_port_in_use_has_a_fix_of_its_own(place: Place) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", int(place.port)))
        other.listen()
        with pytest.raises(ConfigError, match="choose another port, or end the launch that uses it"):
            meet(0, 2, place, timedelta(seconds=2))


def test_ranks_that_stay_away_are_named_when_the_time_is_over(place: Place) -> None:
    told = met(place, [(0, 12), (1, 12)], seconds=1)
    assert told == ["ranks that did not come within 1 s: 2, 3, 4, 5, 6, 7, 8, 9, ..."] * 2


def test_a_place_that_cannot_be_reached_is_named(place: Place) -> None:
    said = r"MASTER_ADDR:MASTER_PORT=127\.0\.0\.1:.*rank 1 cannot meet the others there"
    with pytest.raises(ConfigError, match=said):
        meet(1, 2, place, timedelta(seconds=1))


@pytest.mark.parametrize(
    ("address", "port"),
    [("", "29500"), ("127.0.0.1", ""), ("127.0.0.1", "http"), ("a", "0"), ("a", "65536"), ("a", "²")],
)
def test_a_launcher_that_names_no_place_is_refused(address: str, port: str) -> None:
    with pytest.raises(ConfigError, match="the launcher must say where ranks meet"):
        meet(0, 2, Place(address, port), timedelta(seconds=1))


def test_ranks_started_anew_do_not_meet_those_of_before(place: Place) -> None:
    # The store outlives an attempt.
    store = dist.TCPStore("127.0.0.1", int(place.port), None, True, wait_for_workers=False)
    assert str(store.port) == place.port
    held = place._replace(held=True)
    assert all(isinstance(each, dist.Store) for each in met(held, [(0, 2), (1, 2)]))
    again = held._replace(attempt="1")
    assert all(isinstance(each, dist.Store) for each in met(again, [(0, 3), (1, 3), (2, 3)]))
