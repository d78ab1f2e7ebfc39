"""M3 on one plain matrix, written for reading: what `m3.py` must equal.

k levels of momentum, each with its own period. Between its updates a level's gradients wait in a buffer; at step
t (from 0) level l drains if t mod period_l = 0. The weighted sum of all levels, idle ones included, is orthogonalised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .newton_schulz import COEFFICIENTS, orthogonalise, shape_factor
from .schema import OptimizerConfig


def m3_reference(
    weight: Tensor, gradients: Sequence[Tensor], config: OptimizerConfig, lr: float, weight_decay: float
) -> Tensor:
    """The weight [rows, columns] after one M3 step per gradient."""
    momentum = [torch.zeros_like(weight) for _ in config.levels]
    buffer = [torch.zeros_like(weight) for _ in config.levels]
    for step, gradient in enumerate(gradients):
        for number, level in enumerate(config.levels):
            buffer[number] = buffer[number] + gradient
            if step % level.period == 0:
                waited = level.period if step else 1
                drained = buffer[number] / waited if config.drain == "mean" else buffer[number]
                momentum[number] = level.eta * momentum[number] + level.theta * drained
                buffer[number] = torch.zeros_like(weight)
        direction = torch.zeros_like(weight)
        for number, level in enumerate(config.levels):
            ahead = config.nesterov and number == 0
            part = gradient + level.eta * (momentum[0] - gradient) if ahead else momentum[number]
            direction = direction + level.weight * part
        update = orthogonalise(direction, COEFFICIENTS[config.newton_schulz.coefficients], config.newton_schulz.steps)
        weight = weight * (1 - lr * weight_decay) - lr * shape_factor(*weight.shape, config.adjust) * update
    return weight
