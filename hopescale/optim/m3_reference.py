"""M3 on one plain matrix, written for reading: what `m3.py` must equal.

k levels of momentum, each with its own period. Between its updates a level's gradients wait in a buffer; at step
t (from 0) level l drains if t mod period_l = 0. The weighted sum of all levels, idle ones included, is orthogonalised.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from .newton_schulz import shape_factor, steps_of
from .schema import M3Config


def m3_reference(
    weight: Float[Tensor, "r c"],
    gradients: Sequence[Float[Tensor, "r c"]],
    config: M3Config,
    lr: float,
    weight_decay: float,
) -> Float[Tensor, "r c"]:
    """The weight after one M3 step per gradient, in the dtype of the weight."""
    momentum, buffer = ([0 * weight for _ in config.levels] for _ in range(2))
    for step, gradient in enumerate(gradients):
        for number, level in enumerate(config.levels):
            buffer[number] = buffer[number] + gradient
            if step % level.period == 0:
                waited = level.period if step and config.drain == "mean" else 1
                momentum[number] = level.eta * momentum[number] + level.theta * buffer[number] / waited
                buffer[number] = 0 * weight
        parts = list(momentum)
        if config.nesterov:
            parts[0] = gradient + config.levels[0].eta * (momentum[0] - gradient)
        direction = sum((level.weight * part for level, part in zip(config.levels, parts, strict=True)), 0 * weight)
        update = orthogonalise_reference(direction, config)
        weight = weight * (1 - lr * weight_decay) - lr * shape_factor(*weight.shape, config.adjust) * update
    return weight


def orthogonalise_reference(matrix: Float[Tensor, "r c"], config: M3Config) -> Float[Tensor, "r c"]:
    """Newton-Schulz as it is written, on the side the matrix happens to have."""
    x = matrix / matrix.norm().clamp_min(1e-30)
    for a, b, c in steps_of(config.newton_schulz.coefficients, config.newton_schulz.steps):
        gram = x @ x.mT
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x
