"""How long a step takes on machines you do not have: a sum of what the busiest rank does, by stated assumptions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hopescale.model.flops import flops_executed
from hopescale.optim.planner import Schedule

from .activations import clip_bytes
from .hardware import Hardware, Work
from .spread import NUMBER_BYTES, Spread
from .traffic import Collective, Share

TOUCHED = 4
"""Times that what a forward leaves is written or read in a step; once more if it runs again."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the busiest rank."""

    products: float
    """Matrix products of forward and backward."""
    elementwise: float
    """Everything else of them, bound by the device's memory."""
    update: float
    """Newton-Schulz, and reading and writing parameters, gradients and state."""
    exchange: float
    """Collectives of M3."""
    communication: float
    """Collectives of parameters, gradients and norms, hidden or not."""
    exposed: float
    """What of them does not hide behind forward and backward."""

    @property
    def total(self) -> float:
        """Of the step."""
        return self.products + self.elementwise + self.update + self.exchange + self.exposed

    @property
    def bottleneck(self) -> str:
        """What takes longest."""
        parts = ("products", "elementwise", "update", "exchange", "exposed")
        longest = max(parts, key=lambda name: getattr(self, name))
        return "communication" if longest == "exposed" else longest


def step_time(
    spread: Spread,
    schedule: Schedule | None,
    found: Sequence[Collective],
    share: Share,
    frames: int,
    hardware: Hardware,
    ranks_of_node: int,
) -> StepTime:
    """Seconds of one step in which every group fires.

    Args:
        spread: the model over ranks.
        schedule: of M3's matrices; None without any.
        found: collectives of the step.
        share: of a rank.
        frames: stored frames of a clip.
        hardware: of a rank.
        ranks_of_node: that share a node's devices and its fast links.
    """
    parallel, part = spread.config.parallel, hardware.share(ranks_of_node)
    flops, moved = forward_and_backward(spread, share, frames)
    products = flops / (hardware.rate(parallel.precision) * part)
    elementwise = moved / (hardware.memory_bandwidth * part)
    seconds = {"M3": 0.0, "others": 0.0}
    for each in found:
        seconds["M3" if each.what == "M3" else "others"] += collective_seconds(each, hardware, ranks_of_node)
    hidden = hardware.overlap * (products + elementwise)
    orthogonalised, touched = update(spread, schedule)
    precision = "fp32" if schedule is None else schedule.newton_schulz.precision
    return StepTime(
        products=products,
        elementwise=elementwise,
        update=orthogonalised / (hardware.rate(precision) * part) + touched / (hardware.memory_bandwidth * part),
        exchange=seconds["M3"],
        communication=seconds["others"],
        exposed=max(0.0, seconds["others"] - hidden),
    )


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


def work_of(
    spread: Spread,
    schedule: Schedule | None,
    found: Sequence[Collective],
    share: Share,
    frames: int,
    hardware: Hardware,
    ranks_of_node: int,
) -> Work:
    """The same in amounts, for `fit`: all ranks on one node and nothing hidden."""
    part = hardware.share(ranks_of_node)
    (flops, moved), (orthogonalised, touched) = forward_and_backward(spread, share, frames), update(spread, schedule)
    sent = sum(each.sent_bytes for each in found)
    messages = sum(each.count * rounds(each.ranks) for each in found)
    return Work((flops + orthogonalised) / part, (moved + touched) / part, sent, messages)
