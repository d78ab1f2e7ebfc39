from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hopescale.optim.symmetric import SMALLEST, symmetric_product

SIDES = [1, 7, SMALLEST - 1, SMALLEST, SMALLEST + 1, SMALLEST + 2]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_product_of_a_matrix_with_its_transpose_is_that_of_bmm(side: int, batch: int) -> None:
    x = normal(batch, side, 40)
    found = symmetric_product(x, x.mT)
    torch.testing.assert_close(found, x @ x.mT, rtol=0, atol=1e-4)
    assert side < SMALLEST or torch.equal(found, found.mT)


@pytest.mark.parametrize("side", SIDES)
def test_products_of_matrices_that_commute_are_added_to_another(side: int) -> None:
    x = normal(2, side, side) / side**0.5
    r = x @ x.mT
    z = 0.5 * r - 0.25 * r @ r
    before = r.clone()
    found = symmetric_product(r, z, r, beta=2.0, alpha=-3.0)
    torch.testing.assert_close(found, 2 * before - 3 * before @ z, rtol=0, atol=2e-4)
    assert torch.equal(r, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_take_the_whole_product(dtype: torch.dtype) -> None:
    x = normal(2, SMALLEST, 40).to(dtype)
    assert torch.equal(symmetric_product(x, x.mT), torch.bmm(x, x.mT))
    add = normal(2, SMALLEST, SMALLEST).to(dtype)
    expected = torch.baddbmm(add, x, x.mT, beta=0.5, alpha=2.0)
    assert torch.equal(symmetric_product(x, x.mT, add, beta=0.5, alpha=2.0), expected)
