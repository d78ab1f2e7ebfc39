"""Newton-Schulz orthogonalisation of batches of matrices."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Coefficients = tuple[tuple[float, float, float], ...]

COEFFICIENTS: dict[str, Coefficients] = {
    # K. Jordan's Muon; torch.optim.Muon's default. Fast, singular values end within about 0.68 .. 1.13.
    "simple": ((3.4445, -4.7750, 2.0315),),
    # Y. You's five-step set, used by dion. Singular values end within about 0.98 .. 1.03.
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}


def orthogonalise(
    matrices: Float[Tensor, "*batch rows columns"], coefficients: Coefficients, steps: int
) -> Float[Tensor, "*batch rows columns"]:
    """Bring every matrix near its polar factor U V^T.

    Each step maps X to a X + (b A + c A A) X with A = X X^T on the shorter side. The result does not depend on the
    scale of a matrix, and is 0 for the zero matrix.

    Args:
        matrices: at least 2-D; leading dims are batch. Computed in fp32 whatever the dtype.
        coefficients: (a, b, c) of each step; repeated from the start when `steps` is larger.
        steps: number of iterations.

    Returns:
        fp32 tensor of the same shape.
    """
    x = matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    # Scaled by the largest entry first: squares of a tiny gradient would underflow in the norm.
    x = x / x.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    for step in range(steps):
        a, b, c = coefficients[step % len(coefficients)]
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


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
