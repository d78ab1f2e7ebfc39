"""Newton-Schulz orthogonalisation of batches of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice, repeat
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .symmetric import symmetric_product

Triple = tuple[float, float, float]
Coefficients = tuple[Triple, ...]
Precision = Literal["fp32", "bf16"]

LONGEST_SEGMENT = 5
"""Steps for which fp32 stays exact on one Gram matrix, to 1e-3 on the worst spectra tried. Of 8 the error is 0.1 on a
matrix of condition 1e4, and 10 can blow up: rounding gives R small negative eigenvalues, which all steps multiply."""

GRAM_FORM_ABOVE = 1.5
"""Longer side / shorter side from which the Gram form does fewer operations: 4 a + 34 against 20 a + 10 times m^3."""


def _safe(table: Sequence[Triple], factor: float) -> Coefficients:
    """A table whose polynomials act on x / factor: what rounding pushes above 1 stays where they converge."""
    return tuple((a / factor, b / factor**3, c / factor**5) for a, b, c in table)


COEFFICIENTS: dict[str, Coefficients] = {
    # K. Jordan's Muon; torch.optim.Muon's default. Fast; singular values end within about 0.68 .. 1.13.
    "simple": ((3.4445, -4.7750, 2.0315),),
    # Y. You's five steps, used by dion and Gram-NS. Singular values end within about 0.98 .. 1.03.
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Polar Express (arXiv 2505.16932), each step the best one for what the steps before leave, with a safety factor of
    # 1.01. Lifts small singular values most; repeats its last step.
    "polar_express": _safe(
        (
            (8.28721, -23.59589, 17.30039),
            (4.10706, -2.94785, 0.54484),
            (3.94869, -2.90890, 0.55182),
            (3.31842, -2.48849, 0.51005),
            (2.30065, -1.66890, 0.41881),
        ),
        1.01,
    ),
    # DeepSeek-V4: eight steps of "simple", then two that bring singular values to 1; meant for 10 steps.
    "deepseek_v4": (*((3.4445, -4.7750, 2.0315),) * 8, *((2.0, -1.5, 0.5),) * 2),
    # The classical cubic iteration, which needs no square of the Gram matrix: exact in the limit, slow to get there.
    "cubic": ((1.5, -0.5, 0.0),),
}

REPEATS_LAST = {"polar_express", "deepseek_v4"}
"""Tables whose last step is for singular values that are near 1 already; the others start over."""


def steps_of(coefficients: str, steps: int) -> Coefficients:
    """The (a, b, c) of each of `steps` iterations of a named table."""
    table = COEFFICIENTS[coefficients]
    if coefficients in REPEATS_LAST:
        return (*table, *repeat(table[-1], max(steps - len(table), 0)))[:steps]
    return tuple(islice(cycle(table), steps))


@torch.no_grad()
def orthogonalise(
    matrices: Float[Tensor, "*batch rows columns"],
    steps: Coefficients,
    precision: Precision = "fp32",
    restart: int = 0,
) -> Float[Tensor, "*batch rows columns"]:
    """Bring every matrix near its polar factor U V^T.

    Each step maps X to a X + (b A + c A A) X with A = X X^T on the shorter side. The result does not depend on the
    scale of a matrix, and is 0 for the zero matrix. Long matrices take the Gram form, which iterates on A alone and
    multiplies X once; in bf16 that would blow up (a rounded A has negative eigenvalues), so bf16 takes the plain form.

    Args:
        matrices: at least 2-D, any float dtype; leading dims are batch.
        steps: (a, b, c) of each iteration.
        precision: of the products; everything else is fp32.
        restart: in the Gram form, iterations after which A is computed anew from X; 0 for as many as fp32 allows.

    Returns:
        fp32 tensor of the same shape.
    """
    x = matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = unit_norm(x.mT if tall else x)
    if precision == "bf16":
        x = _plain(x.bfloat16(), steps).float()
    elif takes_gram_form(x.shape[-2], x.shape[-1]):
        for part in segments(steps, restart):
            x = polynomial(gram_matrix(x), part) @ x
    else:
        x = _plain(x, steps)
    return x.mT if tall else x


def takes_gram_form(rows: int, columns: int) -> bool:
    """Whether the Gram form does fewer operations on a matrix of this shape."""
    return max(rows, columns) > GRAM_FORM_ABOVE * min(rows, columns)


def segments(steps: Coefficients, restart: int) -> list[Coefficients]:
    """Steps between two computations of the Gram matrix, `restart` of them or as many as fp32 allows."""
    size = restart or LONGEST_SEGMENT
    return [steps[start : start + size] for start in range(0, len(steps), size)]


def num_segments(steps: int, restart: int) -> int:
    """How often the Gram matrix is computed."""
    return -(-steps // (restart or LONGEST_SEGMENT))


def unit_norm(x: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch rows columns"]:
    """Every matrix divided by its Frobenius norm; a zero matrix stays as it is."""
    tiny = torch.finfo(torch.float32).tiny
    # Scaled by the largest entry first: squares of a tiny gradient would underflow in the norm.
    x = x / x.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(tiny)
    return x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(tiny)


def _plain(x: Float[Tensor, "*batch short long"], steps: Coefficients) -> Float[Tensor, "*batch short long"]:
    shape = x.shape
    x = x.flatten(0, -3) if x.ndim > 2 else x[None]
    for a, b, c in steps:
        gram = symmetric_product(x, x.mT)
        inner = symmetric_product(gram, gram, gram, beta=b, alpha=c) if c else gram * b
        x = torch.baddbmm(x, inner, x, beta=a)
    return x.view(shape)


def gram_matrix(x: Float[Tensor, "*batch short long"]) -> Float[Tensor, "*batch short short"]:
    """X X^T."""
    if x.ndim == 2:
        return symmetric_product(x[None], x.mT[None])[0]
    flat = x.flatten(0, -3)
    return symmetric_product(flat, flat.mT).view(*x.shape[:-1], x.shape[-2])


def polynomial(gram: Float[Tensor, "*batch short short"], steps: Coefficients) -> Float[Tensor, "*batch short short"]:
    """The Q with Q X = the plain iteration on X, from R = X X^T alone.

    Per step Z = b R + c R^2, Q <- Q (a I + Z), R <- (a I + Z) R (a I + Z); all of them commute. None is made symmetric
    on the way: Q and R would stop being functions of one and the same rounded R, at ten times the error.
    """
    shape = gram.shape
    r = gram.reshape(-1, *shape[-2:])
    q = None
    for number, (a, b, c) in enumerate(steps):
        z = torch.baddbmm(r, r, r, beta=b, alpha=c) if c else r * b
        if q is None:
            q = z.clone()
            q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            q = torch.baddbmm(q, q, z, beta=a)
        if number + 1 < len(steps):
            half = torch.baddbmm(r, r, z, beta=a)
            r = torch.baddbmm(half, half, z, beta=a)
    assert q is not None, "at least one step"
    return q.view(shape)


def flops(short: int, long: int, num_steps: int, *, gram: bool, restart: int = 0) -> int:
    """Operations (2 a multiply-add) on one matrix, for tables with c != 0, without what `symmetric_product` saves."""
    if not gram:
        return num_steps * (4 * short * short * long + 2 * short**3)
    parts = segments(((1.0, 1.0, 1.0),) * num_steps, restart)
    products = sum(8 * len(part) - 6 for part in parts)
    return len(parts) * 4 * short * short * long + products * short**3


def shape_factor(rows: int, columns: int, adjust: str) -> float:
    """Factor on an orthogonalised update, by the shape of the whole matrix.

    original: Jordan's sqrt(max(1, r/c)); match_rms_adamw: Moonlight's 0.2 sqrt(max(r, c)), an update with the
    root mean square of a typical AdamW step; spectral_unclamped: sqrt(r/c).
    """
    if adjust == "original":
        return max(1.0, rows / columns) ** 0.5
    if adjust == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    if adjust == "spectral_unclamped":
        return (rows / columns) ** 0.5
    raise ValueError(f"adjust={adjust!r}: expected original, match_rms_adamw or spectral_unclamped")
