"""Bytes of a step on the rank that needs most, in closed form: what is held throughout, and the most of all else.

Categories: parameters (what the engine holds of them between steps, fp32 masters among them), gradients (whole ones
that wait, and reduced pieces), optimizer state, fast weights, activations (with what backward works on), and buffers:
gathered parameters, what collectives pack, what the optimizer works in, and the batch. Each figure is the most that
its category reaches in a step; they need not meet, so the total is that of the fuller of two moments, when backward
is deepest and when parameters are updated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from hopescale.config.schema import Config
from hopescale.model.passes import passes
from hopescale.optim.newton_schulz import takes_gram_form
from hopescale.optim.planner import Bucket, Schedule, Traffic, workers
from hopescale.optim.plans.whole import PIECES_TRAVEL, UPDATES_TRAVEL
from hopescale.optim.state import state_tensors
from hopescale.parallel.deepspeed import bucket_numbers
from hopescale.parallel.fsdp import shard_dim

from .activations import STREAM_BYTES, clip_bytes
from .spread import NUMBER_BYTES, Parameter, Spread
from .traffic import Share

ZERO_0_BUCKET = 500_000_000
"""Gradients that ZeRO stage 0 puts side by side to reduce them."""
RESERVE = 0.1
"""Share of a device's memory that is left to its context, to buffers of libraries, and to gaps between tensors."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    parameters: int
    gradients: int
    optimizer: int
    fast_state: int
    activations: int
    buffers: int
    total: int
    """At the fuller moment."""
    host: int
    """In host memory: what is offloaded."""

    @property
    def by_category(self) -> dict[str, int]:
        """All but what is in host memory."""
        return {name: size for name, size in asdict(self).items() if name != "host"}


def memory_of(spread: Spread, schedule: Schedule | None, share: Share, frames: int) -> Memory:
    """Bytes of the rank that needs most.

    Args:
        spread: the model over ranks.
        schedule: of M3's matrices; None without any.
        share: of a rank; its micro-batch is what memory grows with.
        frames: stored frames of a clip.
    """
    config = spread.config
    kept = clip_bytes(config.model, config.objective, frames, config.parallel.recompute, config.parallel.precision)
    fast, activations = share.micro_batch * kept.fast_weights, share.micro_batch * kept.activations
    deepest = share.micro_batch * kept.together
    if config.parallel.precision == "bf16":
        # Autocast keeps what it makes of parameters until the forward of all passes is done, and backward reads it.
        activations, deepest = (size + 2 * spread.model.numel for size in (activations, deepest))
    parameters, optimizer, host = _parameters(spread), *_optimizer(spread)
    gradients, pieces = _gradients(spread, share, frames), NUMBER_BYTES * spread.held(spread.model.parameters)
    batch = _batch(config, share, frames)
    gathered, update = batch + _gathered(spread, share), batch + _update(spread, schedule)
    in_backward = batch + _gathered_in_backward(spread, share)
    held = parameters + optimizer
    return Memory(
        parameters=parameters,
        gradients=max(gradients, pieces),
        optimizer=optimizer,
        fast_state=fast,
        activations=activations,
        buffers=max(gathered, update),
        total=held + max(deepest + _waiting(spread, share, frames) + in_backward, pieces + update),
        host=host,
    )


def largest_micro_batch(spread: Spread, schedule: Schedule | None, frames: int, limit: float, clips: int) -> int:
    """Most clips at once with which a step fits into `limit` bytes; 0 if not even one does.

    Args:
        spread: the model over ranks.
        schedule: of M3's matrices; None without any.
        frames: stored frames of a clip.
        limit: bytes that a step may take.
        clips: of a rank. With fewer at once the others wait, and gradients with them; more are a larger batch.
    """

    def fits(micro_batch: int) -> bool:
        share = Share(max(clips, micro_batch), -(-clips // micro_batch), micro_batch)
        return memory_of(spread, schedule, share, frames).total <= limit

    # A rank's clips at once need no gradients that wait, so that they may fit where a little less does not.
    low, high = 0, clips
    while high < 2**24 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _parameters(spread: Spread) -> int:
    if spread.engine in ("zero1", "zero2"):
        masters = 0 if spread.config.parallel.offload_optimizer else spread.padded // spread.world_size
        return NUMBER_BYTES * (spread.padded + masters)
    pieces = spread.held(spread.model.parameters)
    if spread.engine == "zero3":
        masters = 0 if spread.config.parallel.offload_optimizer else pieces
        return NUMBER_BYTES * (pieces + masters + spread.kept_whole)
    return NUMBER_BYTES * pieces


def _optimizer(spread: Spread) -> tuple[int, int]:
    """Bytes of state, and those of it in host memory."""
    optimizer = spread.config.optimizer
    tensors = {name: state_tensors(g, optimizer) for g in spread.model.groups for name in g["param_names"]}
    held, host = (
        NUMBER_BYTES * spread.held(spread.model.parameters, [tensors[p.name][where] for p in spread.model.parameters])
        for where in (0, 1)
    )
    if spread.config.parallel.offload_optimizer:
        return 0, held + NUMBER_BYTES * spread.held(spread.model.parameters)
    return held, host


def _gradients(spread: Spread, share: Share, frames: int) -> int:
    """Most at a time in backward.

    Gradients of a parameter wait, whole, for those of the other passes of the model; and, but with ZeRO 2 and 3, for
    those of the other micro-batches, until the last one's are reduced.
    """
    model = spread.model
    whole = NUMBER_BYTES * model.numel
    pieces = NUMBER_BYTES * spread.held(model.parameters)
    block = NUMBER_BYTES * max(model.block_numels)
    # ZeRO 2 and 3 move a gradient into a bucket as soon as it is there.
    last = 0 if spread.engine in ("zero2", "zero3") else 1
    arriving = NUMBER_BYTES * max(_arriving(block, last) for block in model.blocks)
    waiting = _waiting(spread, share, frames)
    if spread.degrees.shard == 1:
        return max(waiting, whole) + arriving
    return (waiting or pieces + block) + arriving


def _waiting(spread: Spread, share: Share, frames: int) -> int:
    """Whole gradients that wait while backward is deepest."""
    config, model = spread.config, spread.model
    several = sum(call.scored for call in passes(config.model, config.objective, frames)) > 1
    accumulates = share.micro_batches > 1 and spread.engine in ("fsdp", "ddp", "zero0")
    whole = NUMBER_BYTES * model.numel if several or accumulates else 0
    # Those of earlier micro-batches are reduced as soon as the first pass of the last one is through a block.
    return whole + (NUMBER_BYTES * spread.held(model.parameters) if several and accumulates else 0)


def _arriving(block: Sequence[Parameter], last: int) -> int:
    """Numbers of gradients on their way to be added up; those of memories come from reads and writes apart."""
    memories = [p.numel for p in block if p.name.endswith((".w1", ".w2"))]
    return 2 * sum(memories) + last * max(memories or [p.numel for p in block])


def _gathered(spread: Spread, share: Share) -> int:
    """Parameters gathered, and what their gradients are packed into."""
    model = spread.model
    block = NUMBER_BYTES * max(model.block_numels)
    ends = NUMBER_BYTES * sum(p.numel for p in model.ends)
    if spread.engine == "ddp":
        return block + ends + block if spread.world_size > 1 else 0
    if spread.engine == "fsdp":
        shards = spread.degrees.shard
        ahead = 1 + max(spread.config.parallel.prefetch, 1)
        # Those that are cut along another dim than the first are put together once more.
        again = max(sum(p.numel for p in block if shard_dim(p.shape, shards)) for block in model.blocks)
        # What the micro-batch before gathered last is let go of late.
        ahead += share.micro_batches > 1
        sizes = model.block_numels
        travelling = max(sum(sizes[n : n + ahead]) for n in range(len(sizes)))
        whole = max(sizes) if spread.config.parallel.reshard_after_forward else sum(sizes)
        return NUMBER_BYTES * (travelling + whole + again) + ends
    bucket = NUMBER_BYTES * bucket_numbers(spread.config.parallel, model.numel)
    pieces = NUMBER_BYTES * spread.held(model.parameters)
    if spread.engine == "zero3":
        # Without recomputing, backward holds on to what forward has gathered.
        kept = block * model.num_blocks if spread.config.parallel.recompute != "block" else 0
        return 3 * bucket + pieces + NUMBER_BYTES * max(p.numel for p in model.parameters) + kept
    if spread.engine == "zero0":
        return NUMBER_BYTES * min(model.numel, ZERO_0_BUCKET)
    return 2 * bucket + (pieces if spread.engine == "zero2" and share.micro_batches > 1 else 0)


def _gathered_in_backward(spread: Spread, share: Share) -> int:
    """The same while backward is deepest: a block as it travels and as it is used, and the ends."""
    model = spread.model
    block = NUMBER_BYTES * max(model.block_numels)
    ends = NUMBER_BYTES * sum(p.numel for p in model.ends)
    if spread.engine == "fsdp":
        kept = 1 if spread.config.parallel.reshard_after_forward else model.num_blocks
        return (1 + kept) * block + ends
    if spread.engine in ("ddp", "zero0"):
        return block + ends if spread.engine == "ddp" and spread.world_size > 1 else 0
    bucket = NUMBER_BYTES * bucket_numbers(spread.config.parallel, model.numel)
    return _gathered(spread, share) - (2 if spread.engine == "zero3" else 1) * bucket


def _update(spread: Spread, schedule: Schedule | None) -> int:
    """What the optimizer works in: directions of all m3 groups, roots of an adamw group, matrices and exchanges."""
    named = {p.name: p for p in spread.model.parameters}
    sizes = {
        group["name"]: NUMBER_BYTES * spread.held([named[name] for name in group["param_names"]])
        for group in spread.model.groups
    }
    m3 = [sizes[group["name"]] for group in spread.model.groups if group["algorithm"] == "m3"]
    roots = max((sizes[g["name"]] for g in spread.model.groups if g["algorithm"] == "adamw"), default=0)
    directions = sum(m3)
    if schedule is None or not schedule.buckets:
        return directions + roots
    works = [_bucket(schedule, *each) for each in zip(schedule.buckets, schedule.traffic, strict=True)]
    # Roots are taken while the first exchange is under way; three buckets are under way at a time.
    at_first = works[0].sent + roots
    ahead = [work.sent for work in works[1:]] + [0]
    most = (max(work.products, work.returned) + next_ for work, next_ in zip(works, ahead, strict=True))
    return directions + max(max(m3), at_first, *most)


class _Bucket(NamedTuple):
    """Bytes of a bucket on the busiest rank, besides the directions."""

    sent: int
    """Until they are worked on: what is packed, what is received, and matrices to put it into."""
    products: int
    """Matrices, and what is made while the largest batch of one shape is orthogonalised."""
    returned: int
    """Matrices, what is packed of them, and what is received."""


def _bucket(schedule: Schedule, bucket: Bucket, exchanges: Sequence[Traffic]) -> _Bucket:
    numbers = [Counter[tuple[int, int]]() for _ in range(schedule.team.size)]
    for (position, _), place in zip(bucket.matrices, bucket.places, strict=True):
        layout = schedule.layouts[bucket.members[position]]
        short, long = sorted((layout.rows, layout.columns))
        for rank in workers(schedule.team, place):
            numbers[rank][short, long] += 1
    matrices = max(sum(n * short * long for (short, long), n in each.items()) for each in numbers)
    products = max((n * _products(short, long) for each in numbers for (short, long), n in each.items()), default=0)
    pieces = sum(max(map(sum, schedule.layouts[member].sizes)) for member in bucket.members)
    # Of one rank alone there are none.
    packed = [max(sent.packed) for sent in exchanges] or [0]
    whole, wire = NUMBER_BYTES * matrices, schedule.wire_bytes
    if bucket.plan == "gram":
        received = max(packed)
        return _Bucket(packed[0] + received, NUMBER_BYTES * (pieces + products), received + packed[-1])
    sent = packed[0] + 2 * matrices * wire if bucket.plan in PIECES_TRAVEL and exchanges else 0
    returned = whole + packed[-1] + pieces * wire if bucket.plan in UPDATES_TRAVEL and exchanges else whole
    return _Bucket(sent or returned, whole + NUMBER_BYTES * products, returned)


def _products(short: int, long: int) -> int:
    """Numbers that the products of Newton-Schulz on one matrix make: its unit, and squares."""
    return short * long + 6 * short**2 if takes_gram_form(short, long) else 2 * short * long + 2 * short**2


def _batch(config: Config, share: Share, frames: int) -> int:
    """Features of a rank's clips in fp32, or those of this step and the next one in fp16."""
    return share.clips * frames * config.model.num_patches * config.model.encoder_dim * STREAM_BYTES
