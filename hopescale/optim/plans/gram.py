"""The Gram plan: pieces stay where they are, and only symmetric matrices of the shorter side travel.

With the longer side cut, X X^T of a matrix is the sum of that of its pieces, and so is its trace, |X|^2. Everyone
sends the upper triangle of its part to the owner, the owner sums them in the order of ranks and sends back the
polynomial Q of the sum, and everyone multiplies its piece by Q: the Gram form of Newton-Schulz on the whole matrix,
nothing computed twice. Triangles travel in fp32: rounded to bf16 a Gram matrix has negative eigenvalues, which the
polynomial blows up unless it is computed anew on the way (`newton_schulz.restart`, two exchanges more each).
"""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from hopescale.optim.exchange import Exchange
from hopescale.optim.newton_schulz import Coefficients, gram_matrix, polynomial, segments

from .work import Task, Work


def orthogonalise_by_gram(work: Work, locals_: list[Tensor]) -> Task:
    """Exchange Gram matrices for polynomials, once for each part between restarts."""
    device = locals_[0].device
    wire = torch.bfloat16 if work.schedule.config.gram_wire == "bf16" else torch.float32
    pieces = _Pieces(work, locals_)
    for number, part in enumerate(segments(work.steps, work.restart)):
        triangles = pieces.gram_triangles()
        parts = [[triangles[n] for n in peer] for peer in work.to_workers]
        received = [sum(_triangle_size(work, n) for n in peer) for peer in work.from_holders]
        grams = Exchange(work.group, parts, received, wire, device)
        del triangles
        yield
        polynomials = _polynomials(work, _summed(work, grams.wait()), part, scale=number == 0)
        parts = [[polynomials[n] for n in peer] for peer in work.to_holders]
        received = [sum(_triangle_size(work, n) for n in peer) for peer in work.from_workers]
        answers = Exchange(work.group, parts, received, wire, device)
        del polynomials
        yield
        pieces.multiply(_by_matrix(work, answers.wait()))


class _Pieces:
    """This rank's pieces of the matrices of a bucket, in its flat local tensors."""

    def __init__(self, work: Work, locals_: list[Tensor]) -> None:
        self.work = work
        self.by_parameter: list[tuple[list[int], Tensor]] = []
        """Numbers of the matrices that this rank holds something of -> their pieces [matrices, short, long]."""
        for position, matrices in groupby(range(len(work.bucket.matrices)), lambda n: work.bucket.matrices[n][0]):
            numbers = [n for n in matrices if work.size(n, work.rank)]
            if numbers:
                layout, (box,) = work.layout(numbers[0]), work.piece(numbers[0], work.rank)
                shape = (len(numbers), box.bottom - box.top, box.right - box.left)
                pieces = locals_[position].view(shape)
                self.by_parameter.append((numbers, pieces.mT if layout.cut_side == "rows" else pieces))

    def gram_triangles(self) -> dict[int, Tensor]:
        """Matrix -> upper triangle of X X^T of this rank's piece."""
        found: dict[int, Tensor] = {}
        for numbers, x in self.by_parameter:
            packed = pack_triangle(gram_matrix(x))
            found |= dict(zip(numbers, packed, strict=True))
        return found

    def multiply(self, triangles: dict[int, Tensor]) -> None:
        """X <- Q X in place."""
        for numbers, x in self.by_parameter:
            q = unpack_triangle(torch.stack([triangles[n] for n in numbers]).float(), x.shape[-2])
            x.copy_(q @ x)


def _triangle_size(work: Work, number: int) -> int:
    short = min(work.layout(number).rows, work.layout(number).columns)
    return short * (short + 1) // 2


def _by_matrix(work: Work, received: list[Tensor]) -> dict[int, Tensor]:
    """Matrix -> its polynomial."""
    found: dict[int, Tensor] = {}
    for numbers, flat in zip(work.from_workers, received, strict=True):
        found |= dict(zip(numbers, flat.split([_triangle_size(work, n) for n in numbers]), strict=True))
    return found


def _summed(work: Work, received: list[Tensor]) -> dict[int, Tensor]:
    """Matrix that this rank works on -> the sum of all parts of its triangle, fp32, in the order of ranks."""
    total: dict[int, Tensor] = {}
    for numbers, flat in zip(work.from_holders, received, strict=True):
        parts = flat.split([_triangle_size(work, n) for n in numbers])
        for number, part in zip(numbers, parts, strict=True):
            total[number] = total[number].add_(part) if number in total else part.float().clone()
    return total


def _polynomials(work: Work, triangles: dict[int, Tensor], steps: Coefficients, *, scale: bool) -> dict[int, Tensor]:
    """Matrix -> upper triangle of Q with Q X = the steps on X; on X / |X| where `scale`. Batched by size."""
    found: dict[int, Tensor] = {}

    def size(number: int) -> int:
        return min(work.layout(number).rows, work.layout(number).columns)

    for short, group in groupby(sorted(triangles, key=lambda n: (size(n), n)), size):
        numbers = list(group)
        gram = unpack_triangle(torch.stack([triangles[n] for n in numbers]), short)
        norm = torch.ones((), device=gram.device)
        if scale:
            trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
            trace = trace.clamp_min(torch.finfo(torch.float32).tiny)
            gram, norm = gram / trace, trace.sqrt()
        found |= dict(zip(numbers, pack_triangle(polynomial(gram, steps) / norm), strict=True))
    return found


def pack_triangle(symmetric: Tensor) -> Tensor:
    """The upper triangle, row by row: [..., m, m] -> [..., m (m+1) / 2]."""
    above, _ = _triangle_indices(symmetric.shape[-1], symmetric.device)
    return symmetric.flatten(-2).index_select(-1, above)


def unpack_triangle(packed: Tensor, size: int) -> Tensor:
    """The symmetric matrix of an upper triangle: the inverse of `pack_triangle`."""
    _, whole = _triangle_indices(size, packed.device)
    return packed.index_select(-1, whole).unflatten(-1, (size, size))


@lru_cache(maxsize=32)
def _triangle_indices(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the triangle lies in the flat matrix, and where each number of the matrix lies in the triangle."""
    row, column = torch.triu_indices(size, size, device=device)
    whole = torch.empty(size, size, dtype=torch.int64, device=device)
    whole[row, column] = whole[column, row] = torch.arange(len(row), device=device)
    return row * size + column, whole.flatten()
