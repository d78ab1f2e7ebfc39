from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hopescale.optim.newton_schulz import flops, takes_gram_form
from hopescale.optim.planner import (
    CPU,
    CUDA,
    EVERY,
    Costs,
    Place,
    PlanName,
    Schedule,
    costs_of,
    make_schedule,
    matrix_flops,
    work,
    workers,
)
from hopescale.optim.schema import NewtonSchulzConfig, PlanConfig
from hopescale.optim.shard_map import Layout, Team, flat_ranges, sharded, whole

FP32, BF16 = NewtonSchulzConfig(precision="fp32"), NewtonSchulzConfig(precision="bf16")
PHASE_5 = [(1152, 384)] * 24 + [(384, 384)] * 24 + [(1536, 384)] * 12 + [(384, 1536)] * 12
"""Attention, projections, and matrices of memories and CMS levels, in number and shape much like those of phase 5."""


def plan_of(strategy: str, **fields: Any) -> PlanConfig:
    period = {"block_period": 2} if strategy == "block_periodic" else {}
    return PlanConfig.model_validate({"strategy": strategy, **period, **fields})


def scheduled(
    layouts: Sequence[Layout],
    team: Team,
    strategy: str = "auto",
    newton_schulz: NewtonSchulzConfig = FP32,
    costs: Costs = CPU,
    **fields: Any,
) -> Schedule:
    return make_schedule(layouts, range(len(layouts)), team, newton_schulz, plan_of(strategy, **fields), costs)


def flops_of(shape: tuple[int, int], newton_schulz: NewtonSchulzConfig) -> int:
    return matrix_flops(min(shape), max(shape), newton_schulz)


def cut_in(parts: int, shapes: Sequence[tuple[int, ...]], dim: int | None = None) -> list[Layout]:
    """Layouts of shapes cut along a dim, or along the longer side."""
    return [
        sharded(f"w{n}", shape, [(len(shape) - 2 + (shape[-1] > shape[-2]) if dim is None else dim, parts)])
        for n, shape in enumerate(shapes)
    ]


@st.composite
def teams_and_layouts(draw: st.DrawFn) -> tuple[Team, list[Layout]]:
    """Ranks in any order, and parameters cut along dims or anywhere."""
    slots, copies = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (3, 1), (4, 1), (2, 2), (3, 2)]))
    team = Team.of_shards(slots, copies)
    order = draw(st.permutations(range(team.size)))
    team = Team(tuple(team.slots[r] for r in order), tuple(team.replicas[r] for r in order))
    layouts = []
    for number in range(draw(st.integers(1, 5))):
        leading = draw(st.lists(st.integers(1, 4), max_size=1))
        shape = (*leading, draw(st.integers(1, 12)), draw(st.integers(1, 12)))
        name = f"w{number}"
        if draw(st.booleans()):
            layouts.append(sharded(name, shape, [(draw(st.integers(0, len(shape) - 1)), slots)]))
        else:
            numel = whole(name, shape).sizes[0]
            points = sorted(draw(st.integers(0, sum(numel))) for _ in range(slots - 1))
            bounds = list(zip([0, *points], [*points, sum(numel)], strict=True))
            layouts.append(flat_ranges(name, shape, [(*bound, 0) for bound in bounds]))
    return team, layouts


def fits(strategy: str, layout: Layout) -> bool:
    return {
        "local": layout.is_whole,
        "replicated": layout.is_whole,
        "gram": layout.cut_side is not None,
        "block_periodic": all(len(piece) <= 1 for slot in layout.pieces for piece in slot),
    }.get(strategy, True)


@pytest.mark.parametrize("strategy", ["auto", *get_args(PlanName)])
@settings(max_examples=40, deadline=None)
@given(drawn=teams_and_layouts(), bucket_mib=st.sampled_from([64.0, 3e-4]))
def test_every_matrix_is_worked_on_once_or_by_everyone_the_plan_says(
    strategy: str, drawn: tuple[Team, list[Layout]], bucket_mib: float
) -> None:
    team, layouts = drawn
    layouts = [layout for layout in layouts if fits(strategy, layout)]
    schedule = scheduled(layouts, team, strategy, bucket_mib=bucket_mib)
    members = [member for bucket in schedule.buckets for member in bucket.members]
    assert sorted(members) == list(range(len(layouts)))
    for bucket in schedule.buckets:
        assert strategy in ("auto", bucket.plan)
        expected = [(p, m) for p, member in enumerate(bucket.members) for m in range(layouts[member].count)]
        assert sorted(bucket.matrices) == expected
        for (position, matrix), place in zip(bucket.matrices, bucket.places, strict=True):
            at, layout = workers(team, place), layouts[bucket.members[position]]
            if bucket.plan in ("gather", "block_periodic"):
                assert sorted(at) == list(range(team.size))
            elif bucket.plan == "replicated":
                assert len(at) == 1
            else:
                # By one rank in all, or by one of each replica.
                assert len(at) == 1 or sorted(team.replicas[rank] for rank in at) == list(range(team.num_replicas))
            if bucket.plan in ("local", "replicated"):
                assert all(layout.sizes[team.slots[rank]][matrix] for rank in at)
            if bucket.plan == "local":
                holders = [rank for rank in range(team.size) if layout.sizes[team.slots[rank]][matrix]]
                assert sorted(at) == holders


@settings(max_examples=60, deadline=None)
@given(drawn=teams_and_layouts(), strategy=st.sampled_from(["owner", "gram"]), bucket_mib=st.sampled_from([64.0, 3e-4]))
def test_owners_are_balanced_within_the_largest_matrix(
    drawn: tuple[Team, list[Layout]], strategy: PlanName, bucket_mib: float
) -> None:
    team, layouts = drawn
    layouts = [layout for layout in layouts if fits(strategy, layout)]
    schedule, loads, largest = scheduled(layouts, team, strategy, bucket_mib=bucket_mib), [0] * team.size, 0
    for bucket in schedule.buckets:
        for (position, _), place in zip(bucket.matrices, bucket.places, strict=True):
            cost = work(strategy, layouts[bucket.members[position]], FP32)
            largest = max(largest, cost)
            for rank in workers(team, place):
                loads[rank] += cost
    assert max(loads) <= sum(loads) / team.size + largest


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=9), copies=st.integers(2, 5)
)
def test_copies_share_the_work_evenly(shapes: list[tuple[int, int]], copies: int) -> None:
    schedule = scheduled([whole(f"w{n}", s) for n, s in enumerate(shapes)], Team.of_copies(copies), "replicated")
    loads = [sum(flops[rank] for flops in schedule.flops) for rank in range(copies)]
    assert max(loads) <= sum(loads) / copies + max(flops_of(shape, FP32) for shape in shapes)


def test_the_largest_matrices_are_given_away_first() -> None:
    layouts = cut_in(2, [(8, 8), (8, 8), (16, 16), (8, 8)], dim=0)
    (bucket,) = scheduled(layouts, Team.of_shards(2), "owner").buckets
    # A 16 x 16 matrix is eight times the work of the others, which all go to the other rank.
    assert [place.slot for place in bucket.places] == [1, 1, 0, 1]


def bytes_sent(schedule: Schedule) -> tuple[list[int], list[int]]:
    """(inside, across) of each exchange, summed over ranks."""
    exchanges = [sent for bucket in schedule.traffic for sent in bucket]
    return [sum(sent.inside) for sent in exchanges], [sum(sent.across) for sent in exchanges]


@pytest.mark.parametrize("slots", [2, 3, 4])
@pytest.mark.parametrize("newton_schulz", [FP32, BF16])
def test_bytes_of_even_shards_are_the_formulas(slots: int, newton_schulz: NewtonSchulzConfig) -> None:
    rows, columns, number = 48, 12, 2 if newton_schulz.precision == "bf16" else 4
    layouts, team = cut_in(slots, [(rows, columns), (2, rows, columns)]), Team.of_shards(slots)
    matrix, triangle = number * rows * columns, 4 * (columns * (columns + 1) // 2 + 1)

    def sent(strategy: str) -> list[int]:
        inside, across = bytes_sent(scheduled(layouts, team, strategy, newton_schulz))
        assert not any(across)
        return inside

    assert sent("owner") == [3 * matrix * (slots - 1) // slots] * 2
    assert sent("gather") == [3 * matrix * (slots - 1)]
    assert sent("gram") == [3 * triangle * (slots - 1)] * 2
    assert sent("block_periodic") == []


@pytest.mark.parametrize("copies", [2, 3])
def test_bytes_between_copies_are_the_formula(copies: int) -> None:
    layouts, team = [whole("w", (3, 48, 12))], Team.of_copies(copies)
    assert bytes_sent(scheduled(layouts, team, "replicated")) == ([0], [3 * 4 * 48 * 12 * (copies - 1)])
    assert bytes_sent(scheduled(layouts, team, "local")) == ([], [])


@pytest.mark.parametrize("strategy", ["owner", "gram"])
@pytest.mark.parametrize("copies", [2, 3])
def test_replicas_work_apart_or_send_updates_across(strategy: str, copies: int) -> None:
    layouts, team, slots = cut_in(2, [(48, 12)] * 4), Team.of_shards(2, copies), 2
    size = 4 * 48 * 12 // slots if strategy == "owner" else 4 * (12 * 13 // 2 + 1)
    apart = scheduled(layouts, team, strategy, costs=CPU._replace(across_latency=1.0))
    assert {place.replica for bucket in apart.buckets for place in bucket.places} == {EVERY}
    assert bytes_sent(apart) == ([4 * size * copies] * 2, [0, 0])
    free = CPU._replace(across_latency=0.0, across_bandwidth=1e20, flops=1e6)
    across = scheduled(layouts, team, strategy, costs=free)
    assert EVERY not in {place.replica for bucket in across.buckets for place in bucket.places}
    # Pieces come from the owner's replica alone; what comes of them goes to everyone.
    assert bytes_sent(across) == ([4 * size] * 2, [0, 4 * size * slots * (copies - 1)])
    assert sum(map(sum, across.flops)) < sum(map(sum, apart.flops))


def test_restarts_and_a_bf16_wire_change_what_gram_matrices_cost() -> None:
    layouts, team = cut_in(2, [(48, 12)]), Team.of_shards(2)
    plain = scheduled(layouts, team, "gram")
    restarted = FP32.model_copy(update={"restart": 2})
    for schedule, number in (
        (scheduled(layouts, team, "gram", restarted), 4),
        (scheduled(layouts, team, "gram", restarted, gram_wire="bf16"), 2),
    ):
        assert bytes_sent(schedule)[0] == [number * (12 * 13 // 2 + 1)] * 6
        assert schedule.num_exchanges(schedule.buckets[0]) == 6
        # The matrices of every part: its Gram matrix, its polynomial, and the product with the pieces.
        assert sum(schedule.flops[0]) == 3 * 4 * 12 * 12 * 48 + (10 + 10 + 2) * 12**3
    assert plain.num_exchanges(plain.buckets[0]) == 2
    assert sum(plain.flops[0]) == flops(12, 48, 5, gram=True)


def test_slots_that_hold_nothing_send_nothing() -> None:
    for strategy in ("owner", "gram", "gather"):
        schedule = scheduled([sharded("w", (18, 5), [(0, 8)])], Team.of_shards(8), strategy)
        sent = [sum(s.total[rank] for s in schedule.traffic[0][:1]) for rank in range(8)]
        assert [bool(n) for n in sent[6:]] == [False, False]
        if strategy == "gram":
            assert schedule.flops[0][6:] == tuple(
                work("gram", schedule.layouts[0], FP32) * (schedule.buckets[0].places[0].slot == slot)
                for slot in (6, 7)
            )


@pytest.mark.parametrize("strategy", ["local", "owner", "gather", "gram", "replicated"])
def test_one_rank_sends_nothing(strategy: str) -> None:
    schedule = scheduled([whole("w", (12, 4)), whole("v", (2, 4, 4))], Team.of_one(), strategy)
    assert bytes_sent(schedule) == ([], [])
    assert [schedule.num_exchanges(bucket) for bucket in schedule.buckets] == [0] * len(schedule.buckets)


@pytest.mark.parametrize("newton_schulz", [FP32, BF16])
@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("slots", [2, 4, 8])
def test_ranks_share_the_products_of_a_large_model_evenly(
    slots: int, dim: int | None, newton_schulz: NewtonSchulzConfig
) -> None:
    total = sum(flops_of(shape, newton_schulz) for shape in PHASE_5)
    schedule = scheduled(cut_in(slots, PHASE_5, dim), Team.of_shards(slots), "auto", newton_schulz)
    for rank in range(slots):
        assert sum(done[rank] for done in schedule.flops) == pytest.approx(total / slots, rel=0.1)


def plans(schedule: Schedule) -> set[str]:
    return {bucket.plan for bucket in schedule.buckets}


@pytest.mark.parametrize("shape", [(1024, 256), (256, 1024)])
def test_gram_matrices_are_exchanged_by_few_ranks_and_pieces_by_many(shape: tuple[int, int]) -> None:
    for slots, plan in ((2, "gram"), (4, "gram"), (16, "owner")):
        assert plans(scheduled(cut_in(slots, [shape] * 16), Team.of_shards(slots))) == {plan}
        # Cut along the shorter side, Gram matrices of pieces do not add up.
        other = 0 if shape[1] > shape[0] else 1
        assert plans(scheduled(cut_in(slots, [shape] * 16, other), Team.of_shards(slots))) == {"owner"}


def test_gram_matrices_are_not_for_bf16_products_nor_for_squares_of_auto() -> None:
    assert plans(scheduled(cut_in(2, [(1024, 256)] * 8), Team.of_shards(2), newton_schulz=BF16)) == {"owner"}
    assert not takes_gram_form(256, 300)
    assert plans(scheduled(cut_in(2, [(300, 256), (256, 256)]), Team.of_shards(2))) == {"owner"}


def test_stacks_that_are_cut_between_matrices_need_no_exchange() -> None:
    stack = [sharded("w", (8, 64, 32), [(0, 4)])]
    assert plans(scheduled(stack, Team.of_shards(4))) == {"local"}
    # One rank of four holds all of them: worth sending away where products are dear and the line is not.
    end = 4 * 64 * 32
    uneven = [flat_ranges("w", (4, 64, 32), [(0, end, 0), (end, end, 0), (end, end, 0), (end, end, 0)])]
    assert uneven[0].is_whole
    dear = CPU._replace(flops=1e6)
    assert plans(scheduled(uneven, Team.of_shards(4), costs=dear)) == {"owner"}
    assert plans(scheduled(uneven, Team.of_shards(4), costs=CPU._replace(flops=1e20))) == {"local"}


@pytest.mark.parametrize(("costs", "plan"), [({"flops": 1e6}, "replicated"), ({"across_bandwidth": 1e3}, "local")])
def test_copies_are_computed_once_or_everywhere_by_what_it_costs(costs: dict[str, float], plan: str) -> None:
    layouts = [whole(f"w{n}", (64, 32)) for n in range(4)]
    assert plans(scheduled(layouts, Team.of_copies(2), costs=CPU._replace(**costs))) == {plan}


def test_costs_are_the_devices_but_for_those_given() -> None:
    assert costs_of(PlanConfig(), "cpu") == costs_of(PlanConfig(), "meta") == CPU
    assert costs_of(PlanConfig(), "cuda") == CUDA
    given = PlanConfig(latency=0.0, bandwidth=2.0, across_latency=3.0, across_bandwidth=4.0, flops=5.0, flops_bf16=6.0)
    assert costs_of(given, "cuda") == Costs(0.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    assert costs_of(PlanConfig(flops=7.0), "cuda") == CUDA._replace(flops=7.0)


def test_seconds_are_those_of_the_busiest_rank() -> None:
    costs = Costs(
        latency=0.5, bandwidth=100.0, across_latency=0.25, across_bandwidth=10.0, flops=1000.0, flops_bf16=4000.0
    )
    layouts = [whole("w", (3, 8, 4))]
    alone = scheduled(layouts, Team.of_one(), costs=costs)
    assert alone.seconds() == pytest.approx(3 * matrix_flops(4, 8, FP32) / 1000)
    rounded = scheduled(layouts, Team.of_one(), newton_schulz=BF16, costs=costs)
    assert rounded.seconds() == pytest.approx(3 * matrix_flops(4, 8, BF16) / 4000)
    shared = scheduled(layouts, Team.of_copies(2), "replicated", costs=costs)
    # Two of three matrices on one rank, which sends both to the other.
    expected = 2 * matrix_flops(4, 8, FP32) / 1000 + 0.25 + 2 * 4 * 8 * 4 / 10
    assert shared.seconds() == pytest.approx(expected)
    owned = scheduled(cut_in(2, [(8, 4)]), Team.of_shards(2), "owner", costs=costs)
    # Half a matrix goes to the owner and comes back, from different ranks.
    assert owned.seconds() == pytest.approx(matrix_flops(4, 8, FP32) / 1000 + 2 * 0.5 + 4 * 8 * 4 / 2 / 100)


@settings(max_examples=40, deadline=None)
@given(drawn=teams_and_layouts(), strategy=st.sampled_from(["auto", "owner", "gather"]))
def test_buckets_are_no_larger_than_asked_for(drawn: tuple[Team, list[Layout]], strategy: str) -> None:
    team, layouts = drawn
    limit = 400
    schedule = scheduled(layouts, team, strategy, bucket_mib=limit / 2**20)
    for bucket in schedule.buckets:
        held = [sum(sum(layouts[n].sizes[slot]) for n in bucket.members) * 4 for slot in range(team.num_slots)]
        assert max(held) <= limit or len(bucket.members) == 1


def test_parameters_fill_a_bucket_before_the_next_begins() -> None:
    layouts = cut_in(2, [(16, 8)] * 5)
    schedule = scheduled(layouts, Team.of_shards(2), "owner", bucket_mib=2 * 256 / 2**20)
    assert [bucket.members for bucket in schedule.buckets] == [(0, 1), (2, 3), (4,)]
    assert len(scheduled(layouts, Team.of_shards(2), "owner").buckets) == 1


def test_only_the_members_asked_for_are_scheduled() -> None:
    layouts = cut_in(2, [(16, 8)] * 5)
    schedule = make_schedule(layouts, [1, 3], Team.of_shards(2), FP32, PlanConfig(), CPU)
    assert [member for bucket in schedule.buckets for member in bucket.members] == [1, 3]
    nothing = make_schedule(layouts, [], Team.of_shards(2), FP32, PlanConfig(), CPU)
    assert (nothing.buckets, nothing.seconds()) == ((), 0)


@pytest.mark.parametrize(
    ("strategy", "wrong", "rule"),
    [
        ("local", sharded("odd", (8, 4), [(0, 2)]), "every matrix whole"),
        ("replicated", sharded("odd", (8, 4), [(0, 2)]), "every matrix whole"),
        ("gram", sharded("odd", (8, 4), [(1, 2)]), "longer side alone"),
        ("gram", flat_ranges("odd", (8, 4), [(0, 15, 0), (15, 32, 0)]), "longer side alone"),
        ("block_periodic", flat_ranges("odd", (8, 4), [(0, 15, 0), (15, 32, 0)]), "rectangles"),
    ],
)
def test_a_strategy_that_cannot_be_used_names_the_parameters(strategy: str, wrong: Layout, rule: str) -> None:
    right = flat_ranges("right", (2, 8, 4), [(0, 32, 0), (32, 64, 0)])
    with pytest.raises(ValueError, match=rf"optimizer\.plan\.strategy={strategy} .*{rule}.* odd are cut otherwise"):
        scheduled([right, wrong], Team.of_shards(2), strategy)
    with pytest.raises(ValueError, match=r"odd, odd, odd, odd, odd and 2 more are cut otherwise"):
        scheduled([wrong] * 7, Team.of_shards(2), strategy)


def golden() -> Schedule:
    layouts = [*cut_in(2, PHASE_5[::6]), sharded("stack", (5, 24, 8), [(0, 2)])]
    return scheduled(layouts, Team.of_shards(2, 2), bucket_mib=4.0)


def test_schedules_do_not_depend_on_the_order_of_hashes() -> None:
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_planner as t; "
    program += "print(hash('w'), t.golden().fingerprint)"
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    path = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path}
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    theirs, fingerprint = said.stdout.split()
    assert int(theirs) != hash("w")
    assert fingerprint == golden().fingerprint


def test_fingerprints_tell_whatever_differs() -> None:
    layouts, team = cut_in(4, [(16, 8), (8, 8)], dim=0), Team.of_shards(4)
    restarted = FP32.model_copy(update={"restart": 2})
    schedules = [
        scheduled(layouts, team, "owner"),
        scheduled(layouts, team, "gather"),
        scheduled(layouts, team, "gram", restarted),
        scheduled(layouts, team, "gram", restarted, gram_wire="bf16"),
        scheduled(layouts, team, "owner", BF16),
        scheduled(layouts, team, "owner", FP32.model_copy(update={"steps": 6})),
        scheduled(layouts, team, "owner", FP32.model_copy(update={"coefficients": "simple"})),
        scheduled(layouts, team, "owner", bucket_mib=1e-4),
        scheduled(layouts[::-1], team, "owner"),
        scheduled([replace(layouts[0], name="other"), layouts[1]], team, "owner"),
        scheduled([sharded("w0", (16, 8), [(1, 4)]), layouts[1]], team, "owner"),
        scheduled(layouts, Team((1, 0, 2, 3), (0, 0, 0, 0)), "owner"),
    ]
    assert Counter(s.fingerprint for s in schedules).most_common(1)[0][1] == 1
    assert scheduled(layouts, team, "owner").fingerprint == schedules[0].fingerprint
    (bucket,) = schedules[0].buckets
    for places in permutations([Place(EVERY, 0), Place(EVERY, 1)]):
        moved = replace(schedules[0], buckets=(replace(bucket, places=places),))
        assert (moved.fingerprint == schedules[0].fingerprint) == (places == bucket.places)
