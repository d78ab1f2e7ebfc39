from __future__ import annotations

from itertools import cycle, islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hopescale.optim.m3_reference import orthogonalise_reference
from hopescale.optim.newton_schulz import (
    COEFFICIENTS,
    LONGEST_SEGMENT,
    Coefficients,
    _plain,
    flops,
    num_segments,
    orthogonalise,
    polynomial,
    segments,
    shape_factor,
    steps_of,
    takes_gram_form,
    unit_norm,
)
from hopescale.optim.schema import OptimizerConfig
from hopescale.optim.symmetric import SMALLEST

TABLES = {
    # Table -> its number of steps, and between what singular values of easy matrices end then, in exact arithmetic.
    "simple": (5, 0.6818, 1.1341),
    "quintic": (5, 0.9777, 1.0319),
    "polar_express": (5, 0.8701, 1.1236),
    "deepseek_v4": (10, 0.9999, 1.0008),
    "cubic": (13, 0.9999, 1.0001),
}
SHAPES = [(96, 24), (24, 96), (65, 33), (33, 65), (40, 33), (33, 40)]
QUINTIC = steps_of("quintic", 5)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_singular_values(values: Tensor, rows: int, columns: int) -> Tensor:
    left, _ = torch.linalg.qr(gaussian(rows, len(values), seed=1, dtype=torch.float64))
    right, _ = torch.linalg.qr(gaussian(columns, len(values), seed=2, dtype=torch.float64))
    return left @ torch.diag(values.double()) @ right.mT


def reference(x: Tensor, name: str, steps: int) -> Tensor:
    config = OptimizerConfig.model_validate({"newton_schulz": {"coefficients": name, "steps": steps}})
    return orthogonalise_reference(x.double(), config)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def band(x: Tensor) -> tuple[float, float]:
    values = torch.linalg.svdvals(x.double())
    return float(values.min()), float(values.max())


def table(name: str) -> Coefficients:
    return steps_of(name, TABLES[name][0])


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("shape", [(192, 48), (48, 192), (96, 33)])
def test_singular_values_of_gaussian_matrices_end_in_the_band_of_the_table(name: str, shape: tuple[int, int]) -> None:
    low, high = band(orthogonalise(gaussian(*shape), table(name)))
    assert low > TABLES[name][1] - 1e-4
    assert high < TABLES[name][2] + 1e-4


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_of_well_conditioned_matrices_end_in_the_band_of_the_table(
    name: str, shape: tuple[int, int]
) -> None:
    x = with_singular_values(torch.linspace(0.3, 1, min(shape)), *shape).float()
    _, lowest, highest = TABLES[name]
    for matrices in (x, torch.stack([x, 5 * x])[None]):
        out = orthogonalise(matrices, table(name))
        assert out.shape == matrices.shape
        low, high = band(out)
        assert low > lowest - 1e-4
        assert high < highest + 1e-4


def test_the_cubic_iteration_is_slow_and_exact_in_the_limit() -> None:
    x = gaussian(192, 48)
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    assert band(orthogonalise(x, steps_of("cubic", 5)))[0] < 0.6
    torch.testing.assert_close(orthogonalise(x, steps_of("cubic", 15)), left @ right, rtol=0, atol=1e-5)


def test_polar_express_lifts_small_singular_values_most() -> None:
    x = with_singular_values(torch.logspace(0, -4, 48), 192, 48).float()
    lifted = {name: band(orthogonalise(x, steps_of(name, 5)))[0] for name in TABLES}
    assert max(lifted, key=lambda name: lifted[name]) == "polar_express"


def test_the_quintic_table_is_closer_to_the_polar_factor_than_the_simple_one() -> None:
    x = with_singular_values(torch.linspace(0.2, 1, 8), 16, 8).float()
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    error = {name: (orthogonalise(x, steps_of(name, 5)) - left @ right).norm() for name in ("quintic", "simple")}
    assert error["quintic"] < 0.3 * error["simple"]


@pytest.mark.parametrize("name", TABLES)
def test_singular_vectors_are_kept_and_values_follow_the_polynomial(name: str) -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    left, _ = torch.linalg.qr(gaussian(7, 4, seed=1, dtype=torch.float64))
    right, _ = torch.linalg.qr(gaussian(5, 4, seed=2, dtype=torch.float64))
    out = orthogonalise(left @ torch.diag(values) @ right.mT, steps_of(name, 6))
    expected = values / values.norm()
    for a, b, c in steps_of(name, 6):
        expected = a * expected + b * expected**3 + c * expected**5
    torch.testing.assert_close(left.mT @ out.double() @ right, torch.diag(expected), rtol=0, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(name=st.sampled_from(list(TABLES)), steps=st.integers(1, 20))
def test_past_the_end_a_table_starts_over_or_repeats_its_last_step(name: str, steps: int) -> None:
    rows = COEFFICIENTS[name]
    if name in ("polar_express", "deepseek_v4"):
        expected = [rows[min(number, len(rows) - 1)] for number in range(steps)]
    else:
        expected = list(islice(cycle(rows), steps))
    assert list(steps_of(name, steps)) == expected


def test_tables_of_ten_steps_and_of_a_safety_factor_are_what_they_come_from() -> None:
    assert COEFFICIENTS["deepseek_v4"][:8] == COEFFICIENTS["simple"] * 8
    # The factor of 1.01 moves the point that a step maps to, not the map: p(1.01 x) is the published polynomial of x.
    a, b, c = COEFFICIENTS["polar_express"][0]
    for x in (0.1, 0.5, 0.9):
        scaled = a * (1.01 * x) + b * (1.01 * x) ** 3 + c * (1.01 * x) ** 5
        assert scaled == pytest.approx(8.28721 * x - 23.59589 * x**3 + 17.30039 * x**5)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("shape", [(9, 6), (10, 6), (6, 10), (9, 9), (7, 13), (31, 5), (3, 4), (1, 5)])
def test_both_forms_are_the_reference(name: str, shape: tuple[int, int]) -> None:
    x = gaussian(*shape, dtype=torch.float64)
    expected = reference(x, name, 6)
    short = unit_norm(x.mT if shape[0] > shape[1] else x)
    for form in (_plain(short, steps_of(name, 6)), polynomial(short @ short.mT, steps_of(name, 6)) @ short):
        out = form.mT if shape[0] > shape[1] else form
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    # In fp32 rounding grows with what a step adds to a small singular value.
    torch.testing.assert_close(orthogonalise(x, steps_of(name, 6)).double(), expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize("short", [2, 6, 64])
def test_the_gram_form_is_for_matrices_more_than_one_and_a_half_times_as_long_as_wide(short: int) -> None:
    long = short * 3 // 2
    assert not takes_gram_form(short, long)
    assert not takes_gram_form(long, short)
    assert takes_gram_form(short, long + 1)
    assert takes_gram_form(long + 1, short)
    assert flops(short, long + 1, 5, gram=True) <= flops(short, long + 1, 5, gram=False)


SPECTRA = {
    "gaussian": gaussian(192, 48, dtype=torch.float64),
    "condition 1e4": with_singular_values(torch.logspace(0, -4, 48), 192, 48),
    "rank 16 on a floor": with_singular_values(
        torch.cat([torch.linspace(1, 0.5, 16), torch.full((32,), 1e-3)]), 192, 48
    ),
    "power law": with_singular_values(1 / torch.arange(1, 49), 192, 48),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", ["simple", "quintic", "polar_express"])
def test_the_gram_form_is_exact_in_fp32_whatever_the_spectrum(name: str, spectrum: str) -> None:
    # Measured: up to 4e-6 (Gaussian), 8e-4 (condition 1e4), 6e-4 (floor), 2e-5 (power law); with restarts up to 2e-5.
    x = SPECTRA[spectrum].float()
    expected = reference(x, name, 5)
    assert relative(orthogonalise(x, steps_of(name, 5)), expected) < 1e-3
    for restart in (1, 2):
        assert relative(orthogonalise(x, steps_of(name, 5), restart=restart), expected) < 5e-5


@pytest.mark.parametrize("spectrum", ["condition 1e4", "rank 16 on a floor", "power law"])
def test_the_gram_form_is_exact_on_large_matrices_too(spectrum: str) -> None:
    # Products of sides from 256 on are taken in blocks; this is the shape of a memory of phase 5.
    side, long = 384, 1536
    assert side > SMALLEST
    values = {
        "condition 1e4": torch.logspace(0, -4, side),
        "rank 16 on a floor": torch.cat([torch.linspace(1, 0.5, 16), torch.full((side - 16,), 1e-3)]),
        "power law": 1 / torch.arange(1, side + 1),
    }
    x = with_singular_values(values[spectrum], side, long).float()
    assert relative(orthogonalise(x, QUINTIC), reference(x, "quintic", 5)) < 1e-3


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", ["simple", "quintic", "polar_express"])
def test_bf16_products_keep_near_the_update_and_its_singular_values_bounded(name: str, spectrum: str) -> None:
    # Measured: 0.02 (Gaussian), 0.17 (condition 1e4), 0.36 (floor, of singular values bf16 cannot tell), 0.014.
    x = SPECTRA[spectrum].float()
    expected, out = reference(x, name, 5), orthogonalise(x, steps_of(name, 5), "bf16")
    assert out.dtype == torch.float32
    assert relative(out, expected) < (0.4 if spectrum == "rank 16 on a floor" else 0.2)
    assert band(out)[1] < band(expected)[1] + 2e-2


@pytest.mark.parametrize("name", TABLES)
def test_bf16_bands_are_those_of_the_table_widened(name: str) -> None:
    x = with_singular_values(torch.linspace(0.3, 1, 48), 192, 48).float()
    low, high = band(orthogonalise(x, table(name), "bf16"))
    assert low > TABLES[name][1] - 3e-2
    assert high < TABLES[name][2] + 3e-2


@pytest.mark.parametrize("restart", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(48, 12), (12, 48), (2, 31, 7), (9, 9)])
def test_restarts_change_nothing_but_rounding(restart: int, shape: tuple[int, ...]) -> None:
    x = gaussian(*shape)
    whole = orthogonalise(x, QUINTIC)
    torch.testing.assert_close(orthogonalise(x, QUINTIC, restart=restart), whole, rtol=0, atol=2e-4)
    assert torch.equal(orthogonalise(x, QUINTIC, restart=5), whole)


@settings(max_examples=50, deadline=None)
@given(steps=st.integers(1, 20), restart=st.integers(0, 20))
def test_segments_are_all_steps_in_parts_of_the_restart(steps: int, restart: int) -> None:
    parts = segments(steps_of("quintic", steps), restart)
    assert [step for part in parts for step in part] == list(steps_of("quintic", steps))
    size = restart or LONGEST_SEGMENT
    assert len(parts) == num_segments(steps, restart) == -(-steps // size)
    assert all(len(part) == size for part in parts[:-1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("exponent", [-120, -40, -1, 40, 100])
@pytest.mark.parametrize("shape", [(3, 10, 6), (2, 6, 7)])
def test_scaling_by_a_power_of_two_changes_no_bit(precision: str, exponent: int, shape: tuple[int, ...]) -> None:
    x = gaussian(*shape)
    scaled = orthogonalise(2.0**exponent * x, QUINTIC, "bf16" if precision == "bf16" else "fp32")
    assert torch.equal(scaled, orthogonalise(x, QUINTIC, "bf16" if precision == "bf16" else "fp32"))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-3, 1e3, 1e12, 1e30])
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("shape", [(3, 10, 6), (9, 7)])
def test_the_scale_of_a_matrix_does_not_matter(name: str, scale: float, shape: tuple[int, ...]) -> None:
    x = gaussian(*shape)
    torch.testing.assert_close(
        orthogonalise(scale * x, steps_of(name, 5)), orthogonalise(x, steps_of(name, 5)), rtol=0, atol=1e-4
    )


def test_matrices_of_a_batch_do_not_mix() -> None:
    x = gaussian(3, 10, 6)
    x[1] *= 1e-20
    together = orthogonalise(x, QUINTIC)
    for one, expected in zip(together, x, strict=True):
        torch.testing.assert_close(one, orthogonalise(expected, QUINTIC), rtol=0, atol=1e-5)
    x[1] = 0
    assert not orthogonalise(x, QUINTIC)[1].any()
    assert torch.equal(orthogonalise(x, QUINTIC)[::2], together[::2])


@pytest.mark.parametrize("shape", [(20, 8), (8, 20), (9, 8), (8, 9), (8, 8)])
def test_orthogonal_transforms_of_either_side_carry_over(shape: tuple[int, int]) -> None:
    x = with_singular_values(torch.linspace(0.3, 1, 8), *shape).float()
    left, _ = torch.linalg.qr(gaussian(shape[0], shape[0], seed=3))
    right, _ = torch.linalg.qr(gaussian(shape[1], shape[1], seed=4))
    rows, columns = (torch.randperm(size, generator=torch.Generator().manual_seed(5)) for size in shape)
    out = orthogonalise(x, QUINTIC)
    torch.testing.assert_close(orthogonalise(left @ x @ right, QUINTIC), left @ out @ right, rtol=0, atol=1e-5)
    torch.testing.assert_close(orthogonalise(x[rows][:, columns], QUINTIC), out[rows][:, columns], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(20, 8), (8, 20), (9, 8), (8, 9), (8, 8), (2, 3, 8, 5)])
def test_transposing_and_negating_carry_over(shape: tuple[int, ...]) -> None:
    x = gaussian(*shape)
    out = orthogonalise(x, QUINTIC)
    torch.testing.assert_close(orthogonalise(x.mT, QUINTIC).mT, out, rtol=0, atol=1e-4)
    assert torch.equal(orthogonalise(-x, QUINTIC), -out)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (4, 7), (2, 4, 4)])
def test_a_zero_matrix_stays_zero(precision: str, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    assert torch.equal(orthogonalise(x, QUINTIC, "bf16" if precision == "bf16" else "fp32", restart=2), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(6, 4), (6, 2)])
def test_the_result_is_fp32_and_the_input_is_left_alone(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = gaussian(*shape).to(dtype)
    before = x.clone()
    assert orthogonalise(x, QUINTIC).dtype == torch.float32
    assert torch.equal(x, before)


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 2**20))
def test_an_update_goes_downhill_and_is_bounded(rows: int, columns: int, seed: int) -> None:
    gradient = gaussian(rows, columns, seed=seed)
    out = orthogonalise(gradient, QUINTIC)
    assert (gradient * out).sum() > 0
    assert band(out)[1] < 1.2


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("restart", [0, 1, 2, 3])
@pytest.mark.parametrize("steps", [1, 4, 5])
def test_flops_are_those_of_the_products(gram: bool, restart: int, steps: int) -> None:
    batch, short, long = 3, 8, 32 if gram else 11
    with FlopCounterMode(display=False) as counter:
        orthogonalise(gaussian(batch, long, short), steps_of("simple", steps), restart=restart)
    assert counter.get_total_flops() == batch * flops(short, long, steps, gram=gram, restart=restart)


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
