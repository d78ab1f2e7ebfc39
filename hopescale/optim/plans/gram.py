"""The Gram plan: pieces stay where they are, and only symmetric matrices of the shorter side travel.

With the longer side cut, X X^T of a matrix is the sum of that of its pieces, and so is its trace, |X|^2. Everyone
sends the upper triangle of its part to the owner, the owner sums them in the order of slots and sends back the
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
from hopescale.optim.planner import message_size

from .work import Task, Work


def orthogonalise_by_gram(work: Work, locals_: list[Tensor]) -> Task:
    """Exchange Gram matrices for polynomials, once for each part between restarts."""
    device = locals_[0].device
    wire = torch.bfloat16 if work.schedule.config.gram_wire == "bf16" else torch.float32
    pieces = _Pieces(work, locals_)
    for number, part in enumerate(segments(work.steps, work.restart)):
        first = number == 0
        grams = _exchange(work, pieces.grams(scaled=first), work.to_workers, work.from_holders, wire, device)
        yield
        polynomials = _polynomials(work, _summed(work, grams.wait()), part, scaled=first)
        del grams
        answers = _exchange(work, polynomials, work.to_holders, work.from_workers, wire, device)
        del polynomials
        yield
        pieces.multiply(_by_matrix(work, answers.wait()))
        del answers


def _exchange(
    work: Work,
    messages: dict[int, Tensor],
    sent: list[list[int]],
    received: list[list[int]],
    wire: torch.dtype,
    device: torch.device,
) -> Exchange:
    parts = [[messages[n] for n in peer] for peer in sent]
    return Exchange(work.group, parts, [sum(_size(work, n) for n in peer) for peer in received], wire, device)


def _size(work: Work, number: int) -> int:
    """Numbers of a message about one matrix: a triangle, and the power of two that it is scaled by."""
    return message_size(min(work.layout(number).rows, work.layout(number).columns))


class _Pieces:
    """This rank's pieces of the matrices of a bucket, in its flat local tensors."""

    def __init__(self, work: Work, locals_: list[Tensor]) -> None:
        self.batches: list[tuple[list[int], Tensor]] = []
        """Numbers of matrices -> their pieces [matrices, short, long], in place; a batch has pieces of one size that
        lie one after the other."""
        for position, matrices in groupby(range(len(work.bucket.matrices)), lambda n: work.bucket.matrices[n][0]):
            numbers = [n for n in matrices if work.size(n, work.rank)]
            while numbers:
                (box,), together = work.piece(numbers[0], work.rank), 1
                while together < len(numbers):
                    (other,) = work.piece(numbers[together], work.rank)
                    if (other.numel, other.offset) != (box.numel, box.offset + together * box.numel):
                        break
                    together += 1
                flat = locals_[position][box.offset : box.offset + together * box.numel]
                pieces = flat.view(together, box.bottom - box.top, box.right - box.left)
                by_rows = work.layout(numbers[0]).cut_side == "rows"
                self.batches.append((numbers[:together], pieces.mT if by_rows else pieces))
                numbers = numbers[together:]

    def grams(self, *, scaled: bool) -> dict[int, Tensor]:
        """Matrix -> upper triangle of X X^T of this rank's piece, and the exponent of 2 that X was divided by before.

        Squares of very small or large gradients would leave fp32's range.
        """
        found: dict[int, Tensor] = {}
        for numbers, x in self.batches:
            exponent = torch.zeros(len(numbers), device=x.device)
            if scaled:
                exponent = torch.frexp(x.abs().amax(dim=(-2, -1))).exponent.float()
            triangles = pack_triangle(gram_matrix(_divided(x, exponent)))
            found |= dict(zip(numbers, torch.cat([triangles, exponent[:, None]], dim=1), strict=True))
        return found

    def multiply(self, messages: dict[int, Tensor]) -> None:
        """X <- Q X / 2^exponent in place."""
        for numbers, x in self.batches:
            message = torch.stack([messages[n] for n in numbers]).float()
            x.copy_(unpack_triangle(message[:, :-1], x.shape[-2]) @ _divided(x, message[:, -1]))


def _divided(x: Tensor, exponent: Tensor) -> Tensor:
    """X / 2^exponent, matrix by matrix; in two steps, for the power may be out of range where X is near its end."""
    half = torch.div(exponent, 2, rounding_mode="floor")
    return x * torch.exp2(-half)[:, None, None] * torch.exp2(half - exponent)[:, None, None]


def _by_matrix(work: Work, received: list[Tensor]) -> dict[int, Tensor]:
    """Matrix -> its polynomial."""
    found: dict[int, Tensor] = {}
    for numbers, flat in zip(work.from_workers, received, strict=True):
        found |= dict(zip(numbers, flat.split([_size(work, n) for n in numbers]), strict=True))
    return found


def _summed(work: Work, received: list[Tensor]) -> dict[int, Tensor]:
    """Matrix that this rank works on -> the sum of all parts of its triangle, and their common exponent, fp32.

    Parts are added in the order of slots, so that replicas of an owner come to the same bits.
    """
    parts: dict[int, list[Tensor]] = {}
    for rank in sorted(range(work.schedule.team.size), key=work.schedule.team.slots.__getitem__):
        numbers = work.from_holders[rank]
        sizes = [_size(work, n) for n in numbers]
        for number, part in zip(numbers, received[rank].split(sizes), strict=True):
            parts.setdefault(number, []).append(part.float())
    total: dict[int, Tensor] = {}
    for number, some in parts.items():
        exponent = torch.stack([part[-1] for part in some]).max()
        total[number] = torch.zeros_like(some[0])
        for part in some:
            # A part that is 2^63 times smaller than another adds nothing to it in fp32.
            total[number].add_(part * torch.exp2(2 * (part[-1] - exponent).clamp_min(-63)))
        total[number][-1] = exponent
    return total


def _polynomials(work: Work, messages: dict[int, Tensor], steps: Coefficients, *, scaled: bool) -> dict[int, Tensor]:
    """Matrix -> upper triangle of Q with Q X = the steps on X, on X / |X| where `scaled`, and X's exponent.

    Batched by size.
    """
    found: dict[int, Tensor] = {}

    def short_side(number: int) -> int:
        return min(work.layout(number).rows, work.layout(number).columns)

    for short, group in groupby(sorted(messages, key=lambda n: (short_side(n), n)), short_side):
        numbers = list(group)
        message = torch.stack([messages[n] for n in numbers])
        gram, norm = unpack_triangle(message[:, :-1], short), torch.ones((), device=message.device)
        if scaled:
            trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
            trace = trace.clamp_min(torch.finfo(torch.float32).tiny)
            gram, norm = gram / trace, trace.sqrt()
        q = polynomial(gram, steps) / norm
        # Symmetric but for rounding, of which the mean of both triangles keeps less than either.
        q = (q + q.mT) / 2
        found |= dict(zip(numbers, torch.cat([pack_triangle(q), message[:, -1:]], dim=1), strict=True))
    return found


def pack_triangle(symmetric: Tensor) -> Tensor:
    """The upper triangle, row by row: [..., m, m] -> [..., m (m+1) / 2]."""
    above, _ = _triangle_indices(symmetric.shape[-1], symmetric.device)
    return symmetric.flatten(-2).index_select(-1, above)


def unpack_triangle(packed: Tensor, size: int) -> Tensor:
    """The symmetric matrix of an upper triangle: the inverse of `pack_triangle`."""
    _, whole = _triangle_indices(size, packed.device)
    return packed.index_select(-1, whole).unflatten(-1, (size, size))


@lru_cache(maxsize=8)
def _triangle_indices(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the triangle lies in the flat matrix, and where each number of the matrix lies in the triangle."""
    row, column = torch.triu_indices(size, size, device=device)
    whole = torch.empty(size, size, dtype=torch.int32, device=device)
    whole[row, column] = whole[column, row] = torch.arange(len(row), dtype=torch.int32, device=device)
    return (row * size + column).int(), whole.flatten()
