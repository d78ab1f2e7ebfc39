"""Newton-Schulz on every rank's own piece: no communication, and another optimizer.

What it computes depends on how many ranks cut a matrix. Every `plan.block_period`-th step is a full one (MuonBP, arXiv
2510.16981); without those, parameters are known to grow without bound.
"""

from __future__ import annotations

from torch import Tensor

from hopescale.optim.newton_schulz import orthogonalise, shape_factor

from .work import Task, Work


def orthogonalise_pieces(work: Work, locals_: list[Tensor], adjust: str) -> Task:
    """Orthogonalise pieces as if they were matrices, rates by their own shape; never yields."""
    for number in range(len(work.bucket.matrices)):
        layout = work.layout(number)
        for piece in work.views(number, locals_):
            factor = shape_factor(piece.shape[0], piece.shape[1], adjust) / shape_factor(
                layout.rows, layout.columns, adjust
            )
            piece.copy_(orthogonalise(piece, work.steps, work.precision, work.restart) * factor)
    return
    yield
