"""AdamW on lists of local tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def adamw_step(
    weights: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    steps: Sequence[float],
    *,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One step of AdamW (arXiv 1711.05101) in place of `weights` and of both fp32 moments.

    Args:
        weights: local tensors of any float dtype.
        gradients: of the same shapes and any float dtype; read only.
        first: moving averages of gradients.
        second: moving averages of their squares.
        steps: of each weight, this one included.
        lr: learning rate.
        weight_decay: decoupled decay per unit of learning rate.
        beta1: share of `first` that is kept.
        beta2: share of `second` that is kept.
        eps: added to the root.
    """
    gradients = [gradient.float() for gradient in gradients]
    torch._foreach_mul_(weights, 1 - lr * weight_decay)
    torch._foreach_lerp_(first, gradients, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
    scale = torch._foreach_sqrt(second)
    torch._foreach_div_(scale, [(1 - beta2**step) ** 0.5 for step in steps])
    torch._foreach_add_(scale, eps)
    torch._foreach_addcdiv_(weights, first, scale, [-lr / (1 - beta1**step) for step in steps])
