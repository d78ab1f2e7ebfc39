"""Which rank orthogonalises which matrix, and by which plan: a pure function of layouts, team and cost model.

Every rank makes the schedule for itself and comes to the same one: no clock, no hash order, no float that depends on
the rank. `agree` has the ranks compare fingerprints before a schedule is used.

Plans, by what travels (b bytes a number, r x c the matrix, m = min(r, c), W slots):
    local           every matrix is whole on its rank: nothing
    owner           pieces to the owner, updates back: 2 b r c (W-1)/W a matrix, in two exchanges a bucket
    replicated      whole matrices held R times are computed once: b r c (R-1), in one
    gram            upper triangles of partial Gram matrices to the owner, of its polynomial back: m (m+1)/2 + 1
                    numbers from and to every slot but the owner's, in two exchanges (two more for each restart)
    gather          every piece to every rank, which computes everything: b r c (W-1), in one; the oracle
    block_periodic  nothing; each rank orthogonalises its own piece, which is another optimizer
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal, NamedTuple

from .newton_schulz import flops, num_segments, takes_gram_form
from .schema import NewtonSchulzConfig, PlanConfig
from .shard_map import Layout, Team

PlanName = Literal["local", "owner", "replicated", "gram", "gather", "block_periodic"]

EVERY = -1
"""In a place: every replica, or every slot."""


class Place(NamedTuple):
    """Which ranks work on a matrix: those at this replica and slot."""

    replica: int
    slot: int


class Costs(NamedTuple):
    """What the planner takes a machine to do."""

    latency: float
    """Seconds of an exchange inside a replica."""
    bandwidth: float
    """Bytes a second that one rank sends inside a replica."""
    across_latency: float
    """Seconds of an exchange between replicas."""
    across_bandwidth: float
    """Bytes a second that one rank sends to other replicas."""
    flops: float
    """Operations a second of the products of Newton-Schulz in fp32, on one rank."""
    flops_bf16: float
    """The same in bf16."""

    def flops_in(self, precision: str) -> float:
        """Operations a second in a precision."""
        return self.flops_bf16 if precision == "bf16" else self.flops


CPU = Costs(latency=3e-4, bandwidth=1e9, across_latency=5e-4, across_bandwidth=1e9, flops=1e11, flops_bf16=4e11)
"""Orders of magnitude of a few cores that multiply bf16 themselves; the ratio of the two rates is measured."""
CUDA = Costs(latency=3e-5, bandwidth=1e11, across_latency=6e-5, across_bandwidth=2e10, flops=2e13, flops_bf16=1e14)
"""Orders of magnitude of an NVLink node with one 200 Gb/s link a GPU, fp32 without TF32; not measured by us."""


def costs_of(config: PlanConfig, device_type: str) -> Costs:
    """The device's usual costs with those that the configuration gives."""
    usual = CPU if device_type in ("cpu", "meta") else CUDA
    given = {name: getattr(config, name) for name in Costs._fields}
    return usual._replace(**{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Bucket:
    """Parameters whose matrices are orthogonalised together, by one plan."""

    plan: PlanName
    members: tuple[int, ...]
    """Parameters, by their place among all layouts."""
    matrices: tuple[tuple[int, int], ...]
    """(position in members, matrix number) of each matrix."""
    places: tuple[Place, ...]
    """Who works on each matrix."""


class Traffic(NamedTuple):
    """Bytes that each rank sends in one exchange."""

    inside: list[int]
    """To ranks of its replica, itself left out."""
    across: list[int]
    """To other replicas."""
    own: list[int]
    """To itself, in the same collective."""

    @property
    def total(self) -> list[int]:
        """To other ranks."""
        return [a + b for a, b in zip(self.inside, self.across, strict=True)]

    @property
    def packed(self) -> list[int]:
        """What the collective is given, to other ranks or not."""
        return [a + b for a, b in zip(self.total, self.own, strict=True)]


@dataclass(frozen=True)
class Schedule:
    """All buckets of one step, in order."""

    layouts: tuple[Layout, ...]
    team: Team
    newton_schulz: NewtonSchulzConfig
    config: PlanConfig
    costs: Costs
    buckets: tuple[Bucket, ...]

    @cached_property
    def fingerprint(self) -> str:
        """The same on two ranks if and only if they would do the same."""
        told = [repr((b.plan, b.members, b.matrices, b.places)) for b in self.buckets]
        told += [repr((layout.name, layout.shape, layout.pieces)) for layout in self.layouts]
        told += [repr(self.team), self.newton_schulz.model_dump_json(), self.config.gram_wire]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()

    @property
    def wire_bytes(self) -> int:
        """Bytes of a number of a matrix on its way: what Newton-Schulz rounds its input to anyway."""
        return 2 if self.newton_schulz.precision == "bf16" else 4

    def num_exchanges(self, bucket: Bucket) -> int:
        """Collectives of a bucket."""
        return len(self._exchanges(bucket.plan))

    @property
    def _gram_rounds(self) -> int:
        return num_segments(self.newton_schulz.steps, self.newton_schulz.restart)

    @cached_property
    def traffic(self) -> tuple[tuple[Traffic, ...], ...]:
        """Bucket -> exchange -> bytes."""
        return tuple(tuple(exchange(bucket) for exchange in self._exchanges(bucket.plan)) for bucket in self.buckets)

    def _exchanges(self, plan: PlanName) -> list[Callable[[Bucket], Traffic]]:
        """What a plan sends, in order."""
        if self.team.size == 1:
            return []
        exchanges: dict[str, list[Callable[[Bucket], Traffic]]] = {
            "owner": [self._to_workers, self._to_holders],
            "replicated": [self._to_holders],
            "gather": [self._to_workers],
            "gram": [self._to_workers, self._to_holders] * self._gram_rounds,
        }
        return exchanges.get(plan, [])

    def _nothing(self) -> Traffic:
        return Traffic(*([0] * self.team.size for _ in Traffic._fields))

    def _size(self, bucket: Bucket, number: int, slot: int) -> int:
        """Bytes that travel between a slot and whoever works on a matrix."""
        position, matrix = bucket.matrices[number]
        layout = self.layouts[bucket.members[position]]
        size = layout.sizes[slot][matrix]
        if bucket.plan != "gram":
            return size * self.wire_bytes
        return message_bytes(min(layout.rows, layout.columns), self.config) if size else 0

    def _to_workers(self, bucket: Bucket) -> Traffic:
        sent = self._nothing()
        for number, place in enumerate(bucket.places):
            for replica in replicas_of(self.team, place):
                workers = self.team.num_slots if place.slot == EVERY else 1
                for slot in range(self.team.num_slots):
                    rank, itself = self.team.rank[replica, slot], place.slot in (EVERY, slot)
                    sent.inside[rank] += (workers - itself) * self._size(bucket, number, slot)
                    sent.own[rank] += itself * self._size(bucket, number, slot)
        return sent

    def _to_holders(self, bucket: Bucket) -> Traffic:
        sent = self._nothing()
        others = self.team.num_replicas - 1
        for number, place in enumerate(bucket.places):
            sizes = [self._size(bucket, number, slot) for slot in range(self.team.num_slots)]
            for replica in replicas_of(self.team, place):
                rank = self.team.rank[replica, place.slot]
                sent.inside[rank] += sum(sizes) - sizes[place.slot]
                sent.own[rank] += sizes[place.slot]
                sent.across[rank] += 0 if place.replica == EVERY else others * sum(sizes)
        return sent

    @cached_property
    def flops(self) -> tuple[tuple[int, ...], ...]:
        """Bucket -> rank -> operations."""
        return tuple(tuple(self._flops(bucket)) for bucket in self.buckets)

    def _flops(self, bucket: Bucket) -> list[int]:
        done = [0] * self.team.size
        for (position, matrix), place in zip(bucket.matrices, bucket.places, strict=True):
            layout = self.layouts[bucket.members[position]]
            if bucket.plan in ("gram", "block_periodic"):
                for slot in range(self.team.num_slots):
                    share = self._share_flops(layout, matrix, slot, bucket.plan)
                    for replica in range(self.team.num_replicas):
                        done[self.team.rank[replica, slot]] += share
            if bucket.plan != "block_periodic":
                whole = work(bucket.plan, layout, self.newton_schulz)
                for rank in workers(self.team, place):
                    done[rank] += whole
        return done

    def _share_flops(self, layout: Layout, matrix: int, slot: int, plan: PlanName) -> int:
        """Operations on one matrix by everyone who holds a piece."""
        if not layout.sizes[slot][matrix]:
            return 0
        if plan == "gram":
            return 4 * layout.sizes[slot][matrix] * min(layout.rows, layout.columns) * self._gram_rounds
        (box,) = layout.pieces[slot][matrix]
        sides = sorted((box.bottom - box.top, box.right - box.left))
        return matrix_flops(sides[0], sides[1], self.newton_schulz)

    def seconds(self, buckets: Sequence[int] | None = None) -> float:
        """What some buckets take by the cost model, all of them by default.

        Ranks wait for each other only at the end, for buckets overlap and owners are balanced over all of them; but
        no exchange of a rank is taken to overlap with its own products.
        """
        chosen = range(len(self.buckets)) if buckets is None else buckets
        exchanges = [sent for bucket in chosen for sent in self.traffic[bucket]]
        costs, ranks = self.costs, range(self.team.size)
        rate = costs.flops_in(self.newton_schulz.precision)
        return (
            max((sum(self.flops[bucket][rank] for bucket in chosen) for rank in ranks), default=0) / rate
            + sum(costs.across_latency if any(sent.across) else costs.latency for sent in exchanges)
            + max(sum(sent.inside[rank] for sent in exchanges) for rank in ranks) / costs.bandwidth
            + max(sum(sent.across[rank] for sent in exchanges) for rank in ranks) / costs.across_bandwidth
        )


def message_size(short: int) -> int:
    """Numbers of what the Gram plan sends about a matrix: a triangle, and the exponent of the scale of its piece."""
    return short * (short + 1) // 2 + 1


def message_bytes(short: int, config: PlanConfig) -> int:
    """Bytes of the same on its way."""
    return message_size(short) * (2 if config.gram_wire == "bf16" else 4)


def work(plan: PlanName, layout: Layout, config: NewtonSchulzConfig) -> int:
    """Operations on one matrix of a layout by whoever works on it; in a gram plan the polynomial alone."""
    short, long = sorted((layout.rows, layout.columns))
    if plan != "gram":
        return matrix_flops(short, long, config)
    return flops(short, 0, config.steps, gram=True, restart=config.restart)


def matrix_flops(short: int, long: int, config: NewtonSchulzConfig) -> int:
    """Operations on one whole matrix, in the form that `orthogonalise` takes."""
    gram = config.precision == "fp32" and takes_gram_form(short, long)
    return flops(short, long, config.steps, gram=gram, restart=config.restart)


def replicas_of(team: Team, place: Place) -> Sequence[int]:
    """Replicas at a place."""
    return range(team.num_replicas) if place.replica == EVERY else [place.replica]


def workers(team: Team, place: Place) -> list[int]:
    """Ranks at a place."""
    slots = range(team.num_slots) if place.slot == EVERY else [place.slot]
    return [team.rank[replica, slot] for replica in replicas_of(team, place) for slot in slots]


def make_schedule(
    layouts: Sequence[Layout],
    members: Sequence[int],
    team: Team,
    newton_schulz: NewtonSchulzConfig,
    config: PlanConfig,
    costs: Costs,
) -> Schedule:
    """The schedule of some parameters.

    "auto" considers these, and takes what the cost model finds fastest: whole matrices stay local, are replicated or go
    to owners; cut ones go to owners, or those that `_prefers_gram` names take the Gram plan; copies of the model share
    the work out or repeat it. The model's seconds are rough, and bytes and operations are not: so the Gram plan where
    it sends more than owners, or loses precision, and gather, which repeats everything on every rank, are not
    considered even where their seconds are fewer.

    Args:
        layouts: of all parameters.
        members: which of them, by their place.
        team: the ranks that hold them.
        newton_schulz: how a matrix is orthogonalised; `precision` is not "auto" any more.
        config: the strategy, forced or "auto".
        costs: the cost model.

    Raises:
        ValueError: the strategy cannot be used on some parameter.
    """

    def schedule(plan_of: Callable[[int], PlanName], across: bool) -> Schedule:
        buckets = _buckets(layouts, members, plan_of, team, newton_schulz, config, across)
        return Schedule(tuple(layouts), team, newton_schulz, config, costs, tuple(buckets))

    between = [False, True] if team.num_replicas > 1 else [False]
    if config.strategy != "auto":
        forced: PlanName = config.strategy
        _check_forced(forced, layouts, members, team)
        found = [schedule(lambda _: forced, across) for across in between]
    else:
        whole_plans: list[PlanName] = ["local"]
        if team.num_replicas > 1:
            whole_plans.append("replicated")
        if team.num_slots > 1:
            whole_plans.append("owner")
        prefers_gram = {n: _prefers_gram(layouts[n], team, newton_schulz, config) for n in members}
        found = [
            schedule(lambda n, w=w, g=g: w if layouts[n].is_whole else "gram" if g and prefers_gram[n] else "owner", a)
            for w, g, a in product(whole_plans, [False, True] if any(prefers_gram.values()) else [False], between)
        ]
    # The first of equals: `min` keeps it, and every rank lists them in the same order.
    return min(found, key=Schedule.seconds)


def _prefers_gram(layout: Layout, team: Team, newton_schulz: NewtonSchulzConfig, config: PlanConfig) -> bool:
    """Whether the Gram plan is as exact as the owner's and sends fewer bytes."""
    short, long = sorted((layout.rows, layout.columns))
    # In bf16 the unsharded update is the less exact one, and a sharded run is to equal an unsharded one.
    if newton_schulz.precision == "bf16" or not takes_gram_form(short, long) or layout.cut_side is None:
        return False
    rounds = num_segments(newton_schulz.steps, newton_schulz.restart)
    return rounds * team.num_slots * message_bytes(short, config) < 4 * short * long


def _check_forced(plan: PlanName, layouts: Sequence[Layout], members: Sequence[int], team: Team) -> None:
    rules: dict[str, tuple[Callable[[Layout], bool], str]] = {
        "local": (lambda layout: layout.is_whole, "needs every matrix whole on its rank"),
        "replicated": (lambda layout: layout.is_whole, "needs every matrix whole on its rank"),
        "gram": (
            lambda layout: layout.cut_side is not None,
            "needs pieces that cut the longer side alone, in whole rows (or columns) of the other",
        ),
        "block_periodic": (
            lambda layout: all(len(piece) <= 1 for slot in layout.pieces for piece in slot),
            "needs pieces that are rectangles",
        ),
    }
    fits, rule = rules.get(plan, (lambda _: True, ""))
    wrong = [layouts[n].name for n in members if not fits(layouts[n])]
    if wrong:
        names = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise ValueError(f"optimizer.plan.strategy={plan} {rule}, but {names} are cut otherwise; use auto or owner")


def _buckets(
    layouts: Sequence[Layout],
    members: Sequence[int],
    plan_of: Callable[[int], PlanName],
    team: Team,
    newton_schulz: NewtonSchulzConfig,
    config: PlanConfig,
    across: bool,
) -> list[Bucket]:
    """Buckets of one plan each, no larger than asked for unless one parameter is; then owners, by work so far."""
    held: dict[PlanName, list[list[int]]] = {}
    filled: dict[PlanName, int] = {}
    for number in members:
        plan, size = plan_of(number), max(map(sum, layouts[number].sizes)) * 4
        full = plan in held and filled[plan] + size > config.bucket_mib * 2**20
        if plan not in held or full:
            held.setdefault(plan, []).append([])
            filled[plan] = 0
        held[plan][-1].append(number)
        filled[plan] += size
    loads = [0] * team.size
    return [
        _assigned(plan, numbers, layouts, team, newton_schulz, across, loads)
        for plan, lists in held.items()
        for numbers in lists
    ]


def _assigned(
    plan: PlanName,
    numbers: list[int],
    layouts: Sequence[Layout],
    team: Team,
    newton_schulz: NewtonSchulzConfig,
    across: bool,
    loads: list[int],
) -> Bucket:
    """A bucket with its owners: largest work first, each to the rank with the least so far; adds to `loads`."""
    matrices = [(position, m) for position, n in enumerate(numbers) for m in range(layouts[n].count)]
    costs = [work(plan, layouts[numbers[position]], newton_schulz) for position, _ in matrices]
    places: list[Place] = [Place(EVERY, EVERY)] * len(matrices)
    for number in sorted(range(len(matrices)), key=lambda number: (-costs[number], number)):
        position, matrix = matrices[number]
        candidates = _candidates(plan, layouts[numbers[position]], matrix, team, across)
        place = min(candidates, key=lambda place: max(loads[rank] for rank in workers(team, place)))
        for rank in workers(team, place):
            loads[rank] += costs[number]
        places[number] = place
    return Bucket(plan, tuple(numbers), tuple(matrices), tuple(places))


def _candidates(plan: PlanName, layout: Layout, matrix: int, team: Team, across: bool) -> list[Place]:
    if plan in ("gather", "block_periodic"):
        return [Place(EVERY, EVERY)]
    slots = list(range(team.num_slots))
    if plan in ("local", "replicated"):
        slots = [next(slot for slot in slots if layout.sizes[slot][matrix])]
    replicas = range(team.num_replicas) if plan == "replicated" or (across and plan != "local") else [EVERY]
    return [Place(replica, slot) for replica in replicas for slot in slots]
