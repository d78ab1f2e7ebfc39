"""Products of which is known that they are symmetric, at two thirds of the operations.

For Gram matrices and their polynomials in the plain form. Inside the Gram form it costs accuracy: see `polynomial`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

PARTS = 3
SMALLEST = 256
"""Side from which fewer operations outweigh smaller products: on one CPU thread Newton-Schulz is 1.2 to 1.3 times as
fast at 384, and slower at 96."""


def symmetric_product(
    x: Float[Tensor, "batch side inner"],
    y: Float[Tensor, "batch inner side"],
    add: Float[Tensor, "batch side side"] | None = None,
    *,
    beta: float = 1.0,
    alpha: float = 1.0,
) -> Float[Tensor, "batch side side"]:
    """The sum beta add + alpha x y, given that it is symmetric.

    On a CPU, blocks below the diagonal of a large product are copied from above it. A GPU takes the whole product:
    there one launch more costs what a third of a product of this size does.
    """
    batch, side, _ = x.shape
    if x.device.type != "cpu" or side < SMALLEST or x.dtype != torch.float32:
        return torch.bmm(x, y) if add is None else torch.baddbmm(add, x, y, beta=beta, alpha=alpha)
    out = x.new_empty(batch, side, side)
    edges = [side * part // PARTS for part in range(PARTS + 1)]
    for start, end in pairwise(edges):
        block = out[:, start:end, start:]
        if add is None:
            torch.bmm(x[:, start:end], y[:, :, start:], out=block)
        else:
            torch.baddbmm(
                add[:, start:end, start:], x[:, start:end], y[:, :, start:], beta=beta, alpha=alpha, out=block
            )
        out[:, end:, start:end].copy_(out[:, start:end, end:].mT)
    return out
