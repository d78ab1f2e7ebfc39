from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hopescale.optim.newton_schulz import COEFFICIENTS, orthogonalise, shape_factor, steps_of

BANDS = {"simple": (0.67, 1.15), "quintic": (0.96, 1.04)}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_singular_values(values: Tensor, rows: int, columns: int) -> Tensor:
    left, _ = torch.linalg.qr(gaussian(rows, len(values), seed=1))
    right, _ = torch.linalg.qr(gaussian(columns, len(values), seed=2))
    return left @ torch.diag(values) @ right.mT


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(48, 12), (12, 48), (9, 9), (5, 48, 12), (2, 3, 8, 20)])
def test_singular_values_end_near_one(name: str, shape: tuple[int, ...]) -> None:
    x = gaussian(*shape) + 3 * torch.eye(*shape[-2:])
    out = orthogonalise(x, steps_of(name, 5))
    assert out.shape == x.shape
    values = torch.linalg.svdvals(out)
    low, high = BANDS[name]
    assert values.min() > low
    assert values.max() < high


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_singular_vectors_are_kept(name: str) -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 0.5])
    left, _ = torch.linalg.qr(gaussian(7, 4, seed=1))
    right, _ = torch.linalg.qr(gaussian(5, 4, seed=2))
    inner = left.mT @ orthogonalise(left @ torch.diag(values) @ right.mT, steps_of(name, 5)) @ right
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), rtol=0, atol=1e-5)
    assert (inner.diagonal() > 0.6).all()


def test_the_quintic_set_is_closer_to_the_polar_factor_than_the_simple_one() -> None:
    x = with_singular_values(torch.linspace(0.2, 1, 8), 16, 8)
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    error = {name: (orthogonalise(x, steps_of(name, 5)) - left @ right).norm() for name in COEFFICIENTS}
    assert error["quintic"] < 0.3 * error["simple"]


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-3, 1e3, 1e12, 1e30])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_the_scale_of_a_matrix_does_not_matter(name: str, scale: float) -> None:
    x = gaussian(3, 10, 6)
    torch.testing.assert_close(
        orthogonalise(scale * x, steps_of(name, 5)), orthogonalise(x, steps_of(name, 5)), rtol=1e-3, atol=1e-4
    )


def test_matrices_of_a_batch_do_not_mix() -> None:
    x = gaussian(3, 10, 6)
    x[1] *= 1e-20
    together = orthogonalise(x, steps_of("quintic", 5))
    for one, expected in zip(together, x, strict=True):
        torch.testing.assert_close(one, orthogonalise(expected, steps_of("quintic", 5)), rtol=1e-4, atol=1e-5)


def test_transposing_and_negating_carry_over() -> None:
    x, coefficients = gaussian(10, 6), COEFFICIENTS["quintic"]
    out = orthogonalise(x, coefficients, 5)
    torch.testing.assert_close(orthogonalise(x.mT, coefficients, 5).mT, out, rtol=1e-4, atol=1e-5)
    assert torch.equal(orthogonalise(-x, coefficients, 5), -out)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (2, 4, 4)])
def test_a_zero_matrix_stays_zero(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    assert torch.equal(orthogonalise(x, steps_of("quintic", 5)), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_result_is_fp32_and_the_input_is_left_alone(dtype: torch.dtype) -> None:
    x = gaussian(6, 4).to(dtype)
    before = x.clone()
    assert orthogonalise(x, COEFFICIENTS["simple"], 5).dtype == torch.float32
    assert torch.equal(x, before)


def test_steps_past_the_table_start_over() -> None:
    x, coefficients = gaussian(6, 4), COEFFICIENTS["quintic"]
    assert torch.equal(orthogonalise(x, coefficients, 7), orthogonalise(x, coefficients + coefficients[:2], 7))
    assert not torch.equal(orthogonalise(x, coefficients, 7), orthogonalise(x, coefficients, 5))


@pytest.mark.parametrize(
    ("adjust", "rows", "columns", "factor"),
    [
        ("original", 16, 4, 2.0),
        ("original", 4, 16, 1.0),
        ("match_rms_adamw", 16, 4, 0.8),
        ("match_rms_adamw", 4, 16, 0.8),
        ("spectral_unclamped", 16, 4, 2.0),
        ("spectral_unclamped", 4, 16, 0.5),
    ],
)
def test_shape_factors(adjust: str, rows: int, columns: int, factor: float) -> None:
    assert shape_factor(rows, columns, adjust) == pytest.approx(factor)


def test_an_unknown_adjustment_is_refused() -> None:
    with pytest.raises(ValueError, match="spectral_unclamped"):
        shape_factor(2, 2, "orginal")
