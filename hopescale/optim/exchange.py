"""One uneven all-to-all in flight, and packing into it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange:
    """Numbers on their way between the ranks of a group: begun when made, in flight until `wait`.

    Every plan moves everything by this one collective. An all-gather or a reduce-scatter of uneven parts is one too,
    with the same bytes a rank, no padding, and sums in an order that does not depend on the backend.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        parts: Sequence[Sequence[Tensor]],
        received: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Pack and send.

        Args:
            group: of the ranks; None for one rank alone, which sends to itself.
            parts: rank -> tensors for it, of any shape; packed flat, in order, as `dtype`.
            received: rank -> numbers that come from it.
            dtype: of the numbers on their way.
            device: where they are packed.
        """
        sent = [sum(part.numel() for part in peer) for peer in parts]
        # Kept until the wait: nobody else holds on to what a collective still reads.
        self._out = torch.empty(sum(sent), dtype=dtype, device=device)
        pack(self._out, [part for peer in parts for part in peer])
        self._received = list(received)
        self._work: dist.Work | None = None
        if group is None:
            self._in = self._out
        else:
            self._in = torch.empty(sum(received), dtype=dtype, device=device)
            self._work = dist.all_to_all_single(self._in, self._out, self._received, sent, group, async_op=True)

    def wait(self) -> list[Tensor]:
        """Rank -> the flat numbers that came from it, as soon as all are here."""
        if self._work is not None:
            self._work.wait()
        del self._out
        return list(self._in.split(self._received))


def pack(flat: Tensor, parts: Sequence[Tensor]) -> None:
    """Copy tensors one after the other into a flat one, casting to its dtype."""
    if parts:
        torch._foreach_copy_(_views(flat, parts), list(parts))


def unpack(flat: Tensor, parts: Sequence[Tensor]) -> None:
    """Copy a flat tensor's numbers into tensors, in order: the inverse of `pack`."""
    if parts:
        torch._foreach_copy_(list(parts), _views(flat, parts))


def _views(flat: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    """Pieces of a flat tensor in the shapes of some tensors."""
    sizes = [part.numel() for part in parts]
    pieces = flat[: sum(sizes)].split(sizes)
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
