"""What long-term memories carry over: the same on all ranks, moved by what the clips of all ranks left in them.

With M the mean over the clips of a step, on all ranks, of (memory after the clip - trained memory), after every
`sync_every` successful steps

    carried <- carried + (1 - (1 - ema)^sync_every) (mean over these steps of M - carried)

a moving average of what a clip leaves. Between moves it stays as it is, and every rank adds up its own clips.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, zeros

from hopescale.model.longterm import LongTermChange, LongTermMemory, total
from hopescale.model.titan import MemoryTrace
from hopescale.optim.state import local


def added_changes(changes: Sequence[LongTermChange], traces: Sequence[MemoryTrace]) -> list[LongTermChange]:
    """Changes of all long-term memories so far, and those of one more micro-batch."""
    more = [trace.longterm for trace in traces if trace.longterm is not None]
    return [total(pair) for pair in zip(changes, more, strict=True)] if changes else more


@torch.no_grad()
def consolidate(
    model: nn.Module, changes: Sequence[LongTermChange], num_clips: int, step: int, *, spread: bool = False
) -> None:
    """Take in what one successful optimizer step has left; a collective where memories are due to move.

    Args:
        model: predictor, in place.
        changes: of this rank's clips, one for each long-term memory in the order of the blocks; none at all where the
            step had no teacher branch, which counts as clips that change nothing.
        num_clips: clips of the step, on all ranks.
        step: optimizer steps before this one.
        spread: whether other ranks have clips of the step too.
    """
    memories = [memory for _, memory in longterm_memories(model)]
    if not memories:
        return
    settings = memories[0].settings
    shares = [part / num_clips for change in changes for part in change]
    waiting = [part for memory in memories if memory.waiting is not None for part in memory.waiting]
    if waiting:
        if shares:
            torch._foreach_add_(waiting, shares)
        shares = waiting
    if not shares or (step + 1) % settings.sync_every:
        return
    mean = torch.cat([share.flatten() for share in shares]) / settings.sync_every
    if spread:
        dist.all_reduce(mean)
    carried = [part for memory in memories for part in memory.carried]
    rate = 1 - (1 - settings.ema) ** settings.sync_every
    for part, move in zip(carried, mean.split([part.numel() for part in carried]), strict=True):
        part.add_(move.view_as(part), alpha=rate)
    for part in waiting:
        part.zero_()


def longterm_memories(model: nn.Module) -> Iterator[tuple[str, LongTermMemory]]:
    """All long-term memories by name, in the order of the blocks."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LongTermMemory))


def waiting_changes(model: nn.Module, ranks: int | None = None, *, spread: bool = False) -> dict[str, Tensor]:
    """What every rank has added up since the last move, one row a rank, sharded by rank.

    Args:
        model: predictor.
        ranks: rows to make room for, all 0, to load what so many ranks have saved; None takes the rows there are.
        spread: whether other ranks have rows of their own.
    """
    found: dict[str, Tensor] = {}
    for name, memory in longterm_memories(model):
        for number, part in enumerate(memory.waiting or (), 1):
            rows = _rows(part, ranks, spread)
            if ranks is None:
                local(rows).copy_(part)
            found[f"{name}.waiting{number}"] = rows
    return found


def restore_waiting(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Hand rows back to ranks; where there are more rows than ranks, some take the sum of several."""
    for name, memory in longterm_memories(model):
        for number, part in enumerate(memory.waiting or (), 1):
            part.copy_(local(saved[f"{name}.waiting{number}"]).sum(dim=0))


def _rows(part: Tensor, ranks: int | None, spread: bool) -> Tensor:
    if not spread:
        return part.new_zeros(1 if ranks is None else ranks, *part.shape)
    mesh = init_device_mesh(part.device.type, (dist.get_world_size(),))
    size = (mesh.size() if ranks is None else ranks, *part.shape)
    return zeros(*size, dtype=part.dtype, device_mesh=mesh, placements=[Shard(0)])
