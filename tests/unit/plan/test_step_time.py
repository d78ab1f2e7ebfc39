"""Seconds of a step on machines whose rates are round numbers."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hopescale.config.compose import load_config
from hopescale.config.schema import Config
from hopescale.model.flops import flops_executed
from hopescale.optim.planner import Schedule
from hopescale.parallel.schema import ParallelConfig
from hopescale.plan.hardware import PRESETS, Hardware
from hopescale.plan.operators import operators
from hopescale.plan.optimizer import schedule_of
from hopescale.plan.spread import Model, Parameter, Spread, model_of
from hopescale.plan.step_time import PARTS, Step, StepTime, collective_seconds, rounds, step_time, work_of
from hopescale.plan.traffic import Collective, Kind, Share, collectives

FRAMES = 8
SHARE = Share(clips=4, micro_batches=1, micro_batch=4)
MACHINE = Hardware(
    "round",
    memory_bytes=1e9,
    flops_fp32=1e9,
    flops_bf16=8e9,
    efficiency=0.5,
    memory_bandwidth=1e6,
    link_bandwidth=100,
    link_latency=1,
    network_bandwidth=10,
    network_latency=2,
    operator_latency=0,
    queues=False,
    overlap=0.5,
)


@lru_cache
def small() -> Config:
    return load_config(["experiment=demo", "model.width=48", "model.block_pattern=[S,H]"])


@lru_cache
def small_model() -> Model:
    return model_of(small())


def over(world_size: int, model: Model | None = None, **parallel: Any) -> Spread:
    """80 numbers in two blocks and an end, unless another model is given."""
    block = (("fc1", (6, 4)), ("fc2", (4, 2)), ("bias", (3,)))
    parameters = [Parameter(f"blocks.{n}.{name}", shape) for n in range(2) for name, shape in block]
    toy = Model((Parameter("embed", (10,)), *parameters), (), 2)
    return Spread(small().model_copy(update={"parallel": ParallelConfig(**parallel)}), model or toy, world_size)


@lru_cache
def planned(world_size: int) -> tuple[Spread, Schedule, tuple[Collective, ...]]:
    """The small model with M3 over shards."""
    spread = over(world_size, small_model())
    schedule = schedule_of(spread)
    assert schedule is not None
    return spread, schedule, tuple(collectives(spread, schedule, SHARE, FRAMES))


def sending(size: int, ranks: int = 2, kind: Kind = "all_gather", stride: int = 1, count: int = 1) -> Collective:
    return Collective("parameters", kind, ranks, stride, count, size, size)


def timed(*found: Collective, machine: Hardware = MACHINE, ranks_of_node: int = 8, **parallel: Any) -> StepTime:
    return step_time(Step(over(2, **parallel), None, found, SHARE, FRAMES, machine, ranks_of_node))


@pytest.mark.parametrize(("ranks", "expected"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (64, 6)])
def test_ranks_wait_for_each_other_in_a_tree(ranks: int, expected: int) -> None:
    assert rounds(ranks) == expected


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "all_reduce", "all_to_all"])
def test_inside_a_node_all_bytes_take_the_fast_links(kind: Kind) -> None:
    # 600 bytes by 100 a second, and 3 collectives of two rounds of a second.
    assert collective_seconds(sending(600, 4, kind, count=3), MACHINE, 4) == 12
    assert collective_seconds(sending(600, 4, kind, count=3), MACHINE, 8) == 12


def test_ranks_of_a_node_share_what_comes_in_from_others() -> None:
    # Of 700 bytes 4/7 are other nodes', a quarter of them by each of four adapters: 100 by 10 a second. Three rounds.
    assert collective_seconds(sending(700, 8), MACHINE, 4) == pytest.approx(10 + 6)


def test_in_an_all_to_all_every_rank_sends_to_other_nodes_itself() -> None:
    assert collective_seconds(sending(700, 8, "all_to_all"), MACHINE, 4) == pytest.approx(40 + 6)


def test_one_rank_a_node_sends_everything_over_the_network() -> None:
    for machine in (MACHINE, replace(MACHINE, link_bandwidth=1)):
        assert collective_seconds(sending(100, 2, count=5), machine, 1) == pytest.approx(10 + 10)


def test_links_that_are_slower_than_the_network_decide() -> None:
    slow = replace(MACHINE, link_bandwidth=1)
    assert collective_seconds(sending(700, 8), slow, 4) == pytest.approx(700 + 6)


@pytest.mark.parametrize(
    ("ranks_of_node", "expected"),
    [
        # All four copies on one node: 60 bytes by 100 a second.
        (16, 0.6 + 2),
        # Two of a node and two of another: 40 of 60 bytes through two adapters.
        (8, 2 + 4),
        # Each on a node of its own, or on more than one.
        (4, 6 + 4),
        (2, 6 + 4),
    ],
)
def test_ranks_that_are_apart_meet_on_fewer_nodes_the_larger_these_are(ranks_of_node: int, expected: float) -> None:
    between_copies = sending(60, 4, "all_reduce", stride=4)
    assert collective_seconds(between_copies, MACHINE, ranks_of_node) == pytest.approx(expected)


@given(size=st.integers(0, 10**6), ranks=st.integers(2, 64), stride=st.integers(1, 8), ranks_of_node=st.integers(1, 64))
def test_a_faster_network_is_never_slower(size: int, ranks: int, stride: int, ranks_of_node: int) -> None:
    each = sending(size, ranks, stride=stride)
    fast = replace(MACHINE, network_bandwidth=20, network_latency=1)
    assert 0 < collective_seconds(each, fast, ranks_of_node) <= collective_seconds(each, MACHINE, ranks_of_node)


def test_products_take_the_flops_of_all_clips_by_the_rate_of_the_precision() -> None:
    flops = flops_executed(small().model, small().objective, FRAMES, "block").total
    assert timed().products == pytest.approx(4 * flops / 0.5e9)
    assert timed(precision="bf16").products == pytest.approx(4 * flops / 4e9)


def test_to_run_blocks_again_takes_more_products_and_touches_more_memory() -> None:
    none, block = timed(recompute="none"), timed(recompute="block")
    assert 1.2 < block.products / none.products < 1.4
    assert block.elementwise / none.elementwise == pytest.approx(5 / 4)


def test_an_update_reads_and_writes_what_a_rank_holds() -> None:
    # 41 numbers of four bytes: a gradient read, a parameter and two tensors of state read and written.
    assert timed().update == pytest.approx(41 * 4 * 7 / 1e6)
    assert timed(engine="ddp").update == pytest.approx(80 * 4 * 7 / 1e6)


def test_newton_schulz_is_part_of_the_update_and_its_exchange_apart() -> None:
    spread, schedule, found = planned(2)
    fast = replace(MACHINE, memory_bandwidth=1e30)
    time = step_time(Step(spread, schedule, found, SHARE, FRAMES, fast, 2))
    busiest = max(sum(flops) for flops in zip(*schedule.flops, strict=True))
    assert time.update == pytest.approx(busiest / 0.5e9)
    (m3,) = [each for each in found if each.what == "M3"]
    assert time.exchange == pytest.approx(m3.sent_bytes / 100 + 2)
    assert time.communication == pytest.approx(sum(e.sent_bytes / 100 + e.count for e in found if e.what != "M3"))


def test_collectives_hide_behind_part_of_forward_and_backward() -> None:
    quiet = timed()
    behind = 0.5 * (quiet.products + quiet.elementwise)
    short, long = (round(100 * (part * behind - 1)) for part in (0.5, 3))
    hidden, exposed = timed(sending(short)), timed(sending(long))
    assert hidden.communication == pytest.approx(0.5 * behind, abs=0.01)
    assert (hidden.exposed, hidden.total) == (0, quiet.total)
    assert exposed.exposed == pytest.approx(2 * behind, abs=0.01)
    assert exposed.total == pytest.approx(quiet.total + 2 * behind, abs=0.01)


def test_without_overlap_all_collectives_are_exposed() -> None:
    time = timed(sending(300), sending(200), machine=replace(MACHINE, overlap=0))
    assert time.communication == time.exposed == 7


@pytest.mark.parametrize("what", ["norms", "control"])
def test_what_a_step_waits_for_hides_behind_nothing(what: str) -> None:
    time = timed(sending(300)._replace(what=what), machine=replace(MACHINE, overlap=1))
    assert time.exposed == time.communication > 0


def test_the_exchange_of_m3_hides_behind_nothing() -> None:
    quiet, time = timed(), timed(sending(300)._replace(what="M3"), machine=replace(MACHINE, overlap=1))
    assert (time.exchange, time.communication, time.exposed) == (4, 0, 0)
    assert time.total == pytest.approx(quiet.total + 4)


def test_ranks_that_share_devices_compute_and_send_slower() -> None:
    two = replace(MACHINE, devices=2, overlap=0, operator_latency=0.01)
    alone, shared = (timed(sending(300), machine=two, ranks_of_node=ranks) for ranks in (2, 8))
    assert alone.exposed == 4
    for name in ("products", "elementwise", "launching", "update", "exposed"):
        assert getattr(shared, name) == pytest.approx(4 * getattr(alone, name))
    # Devices that have enough for everyone have one memory all the same.
    one = timed(machine=two, ranks_of_node=1)
    assert one.elementwise == pytest.approx(0.5 * alone.elementwise)
    assert timed(machine=two, ranks_of_node=1).products == alone.products


def test_operators_are_handed_out_one_after_the_other_in_every_micro_batch() -> None:
    slow = replace(MACHINE, operator_latency=0.5)
    number = operators(small().model, small().objective, FRAMES, "block")
    assert timed(machine=slow).launching == pytest.approx(0.5 * number)
    in_turns = Share(clips=4, micro_batches=3, micro_batch=2)
    assert step_time(Step(over(2), None, (), in_turns, FRAMES, slow, 8)).launching == pytest.approx(1.5 * number)


def test_a_device_that_queues_works_while_operators_are_handed_out() -> None:
    quick = timed(machine=replace(MACHINE, queues=True, operator_latency=1e-9))
    assert quick.launching == 0
    slow = timed(machine=replace(MACHINE, queues=True, operator_latency=1.0))
    number = operators(small().model, small().objective, FRAMES, "block")
    assert slow.products + slow.elementwise + slow.launching == pytest.approx(number)
    assert slow.bottleneck == "launching"


@pytest.mark.parametrize("name", PARTS)
def test_the_bottleneck_is_what_takes_longest(name: str) -> None:
    parts = dict.fromkeys(PARTS, 1.0) | {name: 2.0}
    time = StepTime(**parts, communication=50.0, handing_out=parts["launching"])
    assert time.bottleneck == ("communication" if name == "exposed" else name)
    assert time.total == 7


def test_a_device_that_waits_for_operators_is_bound_by_them_however_long_its_products_take() -> None:
    parts = dict.fromkeys(PARTS, 1.0) | {"products": 3.0, "launching": 0.5}
    assert StepTime(**parts, communication=0.0, handing_out=4.5).bottleneck == "launching"
    assert StepTime(**(parts | {"launching": 0.0}), communication=0.0, handing_out=3.9).bottleneck == "products"


RATES = st.floats(1e6, 1e15)


@settings(deadline=None)
@given(
    flops=RATES,
    memory=RATES,
    link=RATES,
    each=st.floats(0, 1),
    latency=st.floats(0, 10),
    world_size=st.sampled_from([1, 2, 4]),
)
def test_amounts_of_a_step_take_its_seconds_on_one_node(
    flops: float, memory: float, link: float, each: float, latency: float, world_size: int
) -> None:
    machine = replace(
        MACHINE,
        flops_fp32=flops,
        efficiency=1.0,
        memory_bandwidth=memory,
        link_bandwidth=link,
        link_latency=latency,
        operator_latency=each,
        overlap=0.0,
        devices=2,
    )
    spread, schedule, found = planned(world_size)
    step = Step(spread, schedule, found, SHARE, FRAMES, machine, world_size)
    work = work_of(step)
    amounts = (
        work.flops / flops,
        work.moved / memory,
        work.operators * each,
        work.sent / link,
        work.messages * latency,
    )
    assert step_time(step).total == pytest.approx(sum(amounts))


def test_messages_count_every_round_of_every_collective() -> None:
    found = [sending(100, 2, count=3), sending(50, 5, count=2)]
    work = work_of(Step(over(2), None, found, SHARE, FRAMES, MACHINE, 2))
    assert (work.sent, work.messages) == (150, 3 + 6)


@pytest.mark.parametrize(("ranks_of_node", "crosses"), [(8, False), (6, True), (4, False)])
def test_groups_that_begin_inside_a_node_and_end_in_another_take_the_network(ranks_of_node: int, crosses: bool) -> None:
    each = Collective("parameters", "all_gather", 4, 1, 1, 10**9, 3 * 10**9)
    hardware = PRESETS["h100"]
    inside = 3e9 / hardware.link_bandwidth
    assert (collective_seconds(each, hardware, ranks_of_node) > 2 * inside) is crosses
