"""The plans that orthogonalise whole matrices: local, owner, replicated and gather.

They differ in who works on a matrix, and in whether its pieces must travel there and its update back.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from hopescale.optim.exchange import Exchange, unpack
from hopescale.optim.newton_schulz import orthogonalise

from .work import Task, Work

PIECES_TRAVEL = {"owner", "gather"}
UPDATES_TRAVEL = {"owner", "replicated"}


def orthogonalise_whole(work: Work, locals_: list[Tensor]) -> Task:
    """Bring pieces together where a matrix is worked on, orthogonalise it there, and send everyone its pieces back."""
    device = locals_[0].device
    wire = torch.bfloat16 if work.precision == "bf16" else torch.float32
    matrices = _WholeMatrices(work, wire, device)

    if work.bucket.plan in PIECES_TRAVEL:
        parts = [[view for n in peer for view in work.views(n, locals_)] for peer in work.to_workers]
        received = [sum(work.size(n, rank) for n in peer) for rank, peer in enumerate(work.from_holders)]
        pieces = Exchange(work.group, parts, received, wire, device)
        yield
        matrices.fill(work.from_holders, pieces.wait())
        del pieces
    else:
        _copy(
            [view for n in work.mine for view in matrices.views(n, work.rank)],
            [view for n in work.mine for view in work.views(n, locals_)],
        )
    matrices.orthogonalise()

    if work.bucket.plan in UPDATES_TRAVEL:
        parts = [[v for n in peer for v in matrices.views(n, rank)] for rank, peer in enumerate(work.to_holders)]
        received = [sum(work.size(n, work.rank) for n in peer) for peer in work.from_workers]
        updates = Exchange(work.group, parts, received, wire, device)
        del matrices
        yield
        for peer, flat in zip(work.from_workers, updates.wait(), strict=True):
            unpack(flat, [view for n in peer for view in work.views(n, locals_)])
    else:
        _copy(
            [view for n in work.mine for view in work.views(n, locals_)],
            [view for n in work.mine for view in matrices.views(n, work.rank)],
        )


class _WholeMatrices:
    """The matrices that one rank works on, batched by shape; those taller than wide lie transposed."""

    def __init__(self, work: Work, dtype: torch.dtype, device: torch.device) -> None:
        self.work = work
        self.batches: list[Tensor] = []
        self.place: dict[int, tuple[int, int]] = {}
        by_shape = sorted(work.mine, key=lambda n: (self._shape(n), n))
        for shape, group in groupby(by_shape, self._shape):
            numbers = list(group)
            self.place |= {number: (len(self.batches), row) for row, number in enumerate(numbers)}
            self.batches.append(torch.empty(len(numbers), *shape, dtype=dtype, device=device))

    def _shape(self, number: int) -> tuple[int, int]:
        layout = self.work.layout(number)
        return min(layout.rows, layout.columns), max(layout.rows, layout.columns)

    def views(self, number: int, rank: int) -> list[Tensor]:
        """The rectangles that a rank holds of a matrix."""
        batch, row = self.place[number]
        layout = self.work.layout(number)
        matrix = self.batches[batch][row]
        matrix = matrix.mT if layout.rows > layout.columns else matrix
        return [matrix[box.top : box.bottom, box.left : box.right] for box in self.work.piece(number, rank)]

    def fill(self, sent: list[list[int]], received: list[Tensor]) -> None:
        """Put together what came from each rank."""
        for rank, (numbers, flat) in enumerate(zip(sent, received, strict=True)):
            unpack(flat, [view for number in numbers for view in self.views(number, rank)])

    def orthogonalise(self) -> None:
        """In place of the matrices, fp32; a batch at a time."""
        work = self.work
        for number, batch in enumerate(self.batches):
            self.batches[number] = orthogonalise(batch, work.steps, work.precision, work.restart)


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
