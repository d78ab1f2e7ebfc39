from __future__ import annotations

import pytest

from hopescale.parallel.fsdp import shard_dim


@pytest.mark.parametrize(
    ("shape", "degree", "dim"),
    [
        # The longer of two matrix dims that both divide; the first of two equal ones.
        ((64, 16), 4, 0),
        ((16, 64), 4, 1),
        ((16, 16), 4, 0),
        # The shorter one where only it divides.
        ((66, 16), 4, 1),
        ((16, 66), 4, 0),
        # Stacks of matrices: never the stack's own dims, even if they divide.
        ((5, 1, 64, 16), 4, 2),
        ((5, 4, 16, 64), 4, 3),
        ((8, 8, 6, 12), 4, 3),
        ((5, 64, 16), 2, 1),
        ((64, 6, 8), 4, 2),
        ((4, 64, 7, 9), 4, 1),
        # Neither divides: dim 0, the only one that may be uneven.
        ((7, 9), 4, 0),
        ((5, 2, 7, 9), 4, 0),
        # Too short to give every rank something.
        ((2, 2), 4, 0),
        ((2, 8), 4, 1),
        # Vectors, scalars, and one rank.
        ((12,), 4, 0),
        ((7,), 4, 0),
        ((), 4, 0),
        ((3, 5), 1, 1),
        ((5, 3), 1, 0),
    ],
)
def test_shard_dim_is_the_longest_matrix_dim_that_divides(shape: tuple[int, ...], degree: int, dim: int) -> None:
    assert shard_dim(shape, degree) == dim
