"""What the ranks of a step send each other: the collectives of the engine, of M3 and of the trainer, in bytes.

The size of a collective is that of its input on one rank, as the process group is given it. What a rank sends of it is
another number: an all-gather's input goes to every other rank, of a reduction's a rank keeps its own part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from hopescale.config.schema import Config
from hopescale.model.passes import Pass, passes
from hopescale.optim.planner import Schedule
from hopescale.parallel.deepspeed import bucket_numbers
from hopescale.resilience.control_word import WORD_BYTES

from .spread import NUMBER_BYTES, Parameter, Spread

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
SENT = {"all_gather": lambda n: n - 1, "reduce_scatter": lambda n: (n - 1) / n, "all_reduce": lambda n: 2 * (n - 1) / n}
"""Times the input that a rank sends in a ring of so many."""
NORM_BYTES = 8
"""Of the norm of one group's gradients."""


class Collective(NamedTuple):
    """A kind of collective that a step repeats."""

    what: str
    """Who asks for it: parameters, gradients, norms, M3, or control."""
    kind: Kind
    ranks: int
    stride: int
    """How far apart they are: 1 for ranks next to each other, the shards of a copy for those at the same place of
    each."""
    count: int
    """How often in a step."""
    input_bytes: int
    """Of all together, on the rank with most."""
    sent_bytes: int
    """To other ranks, of all together, on the rank with most."""


@dataclass(frozen=True)
class Share:
    """What a step asks of one rank."""

    clips: int
    """Of the rank with most."""
    micro_batches: int
    micro_batch: int
    """Clips of the largest of them."""


def share_of(config: Config, world_size: int) -> Share:
    """Clips of a rank, by `train.global_batch` and `train.micro_batch`."""
    clips = -(-config.train.global_batch // world_size)
    count = -(-clips // (config.train.micro_batch or clips))
    return Share(clips, count, -(-clips // count))


def collectives(spread: Spread, schedule: Schedule | None, share: Share, frames: int) -> list[Collective]:
    """All of one step in which every group fires, the first step's checks and the figures of log steps apart.

    Args:
        spread: the model over ranks.
        schedule: of M3's matrices; None without any.
        share: of a rank.
        frames: stored frames of a clip.
    """
    found = list(_engine(spread, share, passes(spread.config.model, spread.config.objective, frames)))
    degrees = spread.degrees
    if degrees.shard > 1:
        size = NORM_BYTES * len(spread.model.groups)
        found.append(_collective("norms", "all_reduce", degrees.shard, 1, 1, size))
    if schedule is not None and schedule.team.size > 1:
        exchanges = [sent for bucket in schedule.traffic for sent in bucket]
        ranks = range(schedule.team.size)
        packed = max(sum(sent.packed[rank] for sent in exchanges) for rank in ranks)
        total = max(sum(sent.total[rank] for sent in exchanges) for rank in ranks)
        crosses = any(any(sent.across) for sent in exchanges)
        size = schedule.team.size if crosses else schedule.team.num_slots
        if exchanges:
            found.append(Collective("M3", "all_to_all", size, 1, len(exchanges), packed, total))
    found.append(_collective("control", "all_reduce", spread.world_size, 1, 1, WORD_BYTES))
    return [each for each in found if each.ranks > 1]


def _engine(spread: Spread, share: Share, calls: list[Pass]) -> Iterator[Collective]:
    if spread.world_size == 1:
        return
    if spread.engine in ("fsdp", "ddp"):
        yield from _fsdp(spread, share, len(calls))
    else:
        yield from _zero(spread, share, calls)


def _fsdp(spread: Spread, share: Share, num_passes: int) -> Iterator[Collective]:
    """Each pass gathers the blocks in forward, and again in backward, the rest once.

    Blocks that are kept after forward serve all passes of it and the first one of backward, which then frees them.

    Collectives of one rank are left out by the caller: those of copies and of shards.
    """
    model, (copies, shards) = spread.model, spread.degrees
    blocks = sum(spread.held(block) for block in model.blocks)
    ends = spread.held(model.ends)
    times = 2 * num_passes if spread.config.parallel.reshard_after_forward else num_passes
    gathered = share.micro_batches * NUMBER_BYTES * (times * blocks + ends)
    count = share.micro_batches * (times * model.num_blocks + 1)
    yield _collective("parameters", "all_gather", shards, 1, count, gathered)
    # The first pass of the last micro-batch is through a block with the gradients of those before, the last with more.
    times = 2 if share.micro_batches > 1 and num_passes > 1 else 1
    pieces, count = NUMBER_BYTES * (times * blocks + ends), times * model.num_blocks + 1
    yield _collective("gradients", "reduce_scatter", shards, 1, count, shards * pieces)
    yield _collective("gradients", "all_reduce", copies, shards, count, pieces)


def _zero(spread: Spread, share: Share, calls: list[Pass]) -> Iterator[Collective]:
    model, stage, ranks = spread.model, spread.config.parallel.zero_stage or 0, spread.world_size
    bucket = bucket_numbers(spread.config.parallel, model.numel)
    # Stages 2 and 3 keep nothing of a micro-batch but their own part of its gradients.
    times = share.micro_batches if stage >= 2 else 1
    count = times * -(-model.numel // bucket)
    size = times * NUMBER_BYTES * model.numel
    if stage < 3:
        yield _collective("gradients", "all_reduce", ranks, 1, count, size)
        if stage:
            part = NUMBER_BYTES * spread.padded // ranks
            yield _collective("parameters", "all_gather", ranks, 1, 1, part)
        return
    yield _collective("gradients", "reduce_scatter", ranks, 1, count, size)
    blocks = [_fetched(spread, block) for block in model.blocks]
    each = 2 * (sum(blocks) + _fetched(spread, model.ends))
    if spread.config.parallel.recompute == "block":
        # A second forward ends before the block's last product, unless drop-path scales what comes of it.
        ends_early = [n == 0 or not spread.config.model.drop_path for n in range(model.num_blocks)]
        last = [_fetched(spread, _last_product(block)) for block in model.blocks]
        each += sum(block - early * part for block, early, part in zip(blocks, ends_early, last, strict=True))
    size, count = share.micro_batches * len(calls) * each, 2 * share.micro_batches * len(calls) * len(model.parameters)
    yield _collective("parameters", "all_gather", ranks, 1, count, NUMBER_BYTES * size)
    # What is left on every rank is brought up to date; and it takes a norm of its own.
    yield _collective("parameters", "all_gather", ranks, 1, 1, NUMBER_BYTES * -(-spread.kept_whole // ranks))
    yield _collective("norms", "all_reduce", ranks, 1, 1, NORM_BYTES)


def _fetched(spread: Spread, parameters: Sequence[Parameter]) -> int:
    """Numbers that a rank gives to have some parameters gathered by ZeRO 3."""
    return spread.held([p for p in parameters if not spread.is_kept_whole(p)])


def _last_product(block: Sequence[Parameter]) -> list[Parameter]:
    return [p for p in block if len(p.shape) > 1][-1:]


def _collective(what: str, kind: Kind, ranks: int, stride: int, count: int, size: int) -> Collective:
    return Collective(what, kind, ranks, stride, count, size, round(SENT[kind](ranks) * size))


def by_kind(found: list[Collective]) -> dict[str, int]:
    """Bytes of the inputs of each kind of collective."""
    total: Counter[str] = Counter()
    for each in found:
        total[each.kind] += each.input_bytes
    return dict(total)
