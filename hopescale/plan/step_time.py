"""How long a step takes on machines you do not have: a sum of what the busiest rank does, by stated assumptions."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from hopescale.model.flops import flops_executed
from hopescale.optim.planner import Schedule

from .activations import clip_bytes
from .hardware import Hardware, Work
from .operators import operators
from .spread import NUMBER_BYTES, Spread
from .traffic import Collective, Share

TOUCHED = 4
"""Times that what a forward leaves is written or read in a step; once more if it runs again."""


@dataclass(frozen=True)
class Step:
    """What decides how long a step takes: one in which every group fires."""

    spread: Spread
    """The model over ranks."""
    schedule: Schedule | None
    """Of M3's matrices; None without any."""
    collectives: Sequence[Collective]
    share: Share
    """Of a rank."""
    frames: int
    """Stored frames of a clip."""
    hardware: Hardware
    """Of a rank."""
    ranks_of_node: int
    """That share a node's devices and its fast links."""

    @property
    def part(self) -> float:
        """Of a device that a rank has."""
        return self.hardware.share(self.ranks_of_node)

    @property
    def memory_part(self) -> float:
        """Of the memory's bandwidth that a rank has."""
        return self.hardware.memory_share(self.ranks_of_node)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the busiest rank."""

    products: float
    """Matrix products of forward and backward."""
    elementwise: float
    """Everything else of them, bound by the device's memory."""
    launching: float
    """Handing operators of forward and backward out, as far as the device has no work meanwhile."""
    update: float
    """Newton-Schulz, and reading and writing parameters, gradients and state."""
    exchange: float
    """Collectives of M3."""
    communication: float
    """Other collectives: of parameters and gradients, hidden or not, of norms and of the control word."""
    exposed: float
    """What of them does not hide behind forward and backward."""
    handing_out: float
    """Handing out all operators of forward and backward, whether or not the device has work meanwhile."""

    @property
    def total(self) -> float:
        """Of the step."""
        return sum(getattr(self, name) for name in PARTS)

    @property
    def bottleneck(self) -> str:
        """What takes longest: launching is all of forward and backward where a device that queues waits for work."""
        seconds = {name: getattr(self, name) for name in PARTS}
        if self.launching:
            seconds["launching"] = self.handing_out
        longest = max(PARTS, key=lambda name: seconds[name])
        return "communication" if longest == "exposed" else longest


PARTS = ("products", "elementwise", "launching", "update", "exchange", "exposed")
"""Of a step, one after the other."""
WAITED_FOR = ("norms", "control")
"""Collectives with nothing to do meanwhile, as with those of M3."""


def step_time(step: Step) -> StepTime:
    """Seconds of one step."""
    hardware, part, parallel = step.hardware, step.part, step.spread.config.parallel
    flops, moved = forward_and_backward(step.spread, step.share, step.frames)
    products = flops / (hardware.rate(parallel.precision) * part)
    elementwise = moved / (hardware.memory_bandwidth * step.memory_part)
    handing_out = launched(step) * hardware.operator_latency / part
    launching = max(0.0, handing_out - products - elementwise) if hardware.queues else handing_out
    seconds: defaultdict[str, float] = defaultdict(float)
    for each in step.collectives:
        seconds[each.what] += collective_seconds(each, hardware, step.ranks_of_node) / part
    exchange = seconds.pop("M3", 0.0)
    waited_for = sum(seconds.pop(what, 0.0) for what in WAITED_FOR)
    others = sum(seconds.values())
    hidden = hardware.overlap * (products + elementwise + launching)
    orthogonalised, touched = update(step.spread, step.schedule)
    precision = "fp32" if step.schedule is None else step.schedule.newton_schulz.precision
    return StepTime(
        products=products,
        elementwise=elementwise,
        launching=launching,
        update=orthogonalised / (hardware.rate(precision) * part)
        + touched / (hardware.memory_bandwidth * step.memory_part),
        exchange=exchange,
        communication=others + waited_for,
        exposed=waited_for + max(0.0, others - hidden),
        handing_out=handing_out,
    )


def launched(step: Step) -> float:
    """Operators of forward and backward of all micro-batches."""
    config = step.spread.config
    each = operators(config.model, config.objective, step.frames, config.parallel.recompute)
    return step.share.micro_batches * each


def forward_and_backward(spread: Spread, share: Share, frames: int) -> tuple[float, float]:
    """Operations of products, and bytes that everything else reads and writes, of a rank's clips."""
    config = spread.config
    recompute, precision = config.parallel.recompute, config.parallel.precision
    flops = flops_executed(config.model, config.objective, frames, recompute).total
    kept = clip_bytes(config.model, config.objective, frames, "none", precision).together
    return share.clips * flops, share.clips * kept * (TOUCHED + (recompute != "none"))


def update(spread: Spread, schedule: Schedule | None) -> tuple[float, float]:
    """Operations of Newton-Schulz on the busiest rank, and bytes that the optimizer reads and writes."""
    flops = 0.0
    if schedule is not None and schedule.buckets:
        flops = max(sum(done[rank] for done in schedule.flops) for rank in range(schedule.team.size))
    # Gradient read, parameter and two tensors of state read and written.
    return flops, 7.0 * NUMBER_BYTES * spread.held(spread.model.parameters)


def collective_seconds(each: Collective, hardware: Hardware, ranks_of_node: int) -> float:
    """Of all collectives of a kind, one after the other.

    Inside a node all bytes take the fast links. What a node takes in from others of a gather or a reduction its ranks
    share, each through an adapter of its own; in an all-to-all every rank has its own.
    """
    # Of groups that do not fill nodes evenly some begin in one and end in another.
    inside = max(1, math.gcd(ranks_of_node, each.ranks * each.stride) // each.stride)
    seconds, latency = each.sent_bytes / hardware.link_bandwidth if inside > 1 else 0.0, hardware.link_latency
    if each.ranks > inside:
        across = each.sent_bytes * (each.ranks - inside) / (each.ranks - 1)
        across /= 1 if each.kind == "all_to_all" else inside
        seconds, latency = max(seconds, across / hardware.network_bandwidth), hardware.network_latency
    return seconds + each.count * latency * rounds(each.ranks)


def rounds(ranks: int) -> int:
    """How often ranks of a collective wait for each other."""
    return max(1, math.ceil(math.log2(ranks)))


def work_of(step: Step) -> Work:
    """The same in amounts, for `fit`: all ranks on one node and nothing hidden."""
    flops, moved = forward_and_backward(step.spread, step.share, step.frames)
    orthogonalised, touched = update(step.spread, step.schedule)
    sent = sum(each.sent_bytes for each in step.collectives)
    messages = sum(each.count * rounds(each.ranks) for each in step.collectives)
    computed = (flops + orthogonalised) / step.part
    others = (amount / step.part for amount in (launched(step), sent, messages))
    return Work(computed, (moved + touched) / step.memory_part, *others)
