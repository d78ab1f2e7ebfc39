"""What M3 orthogonalises: momentum on several time scales, element by element on local tensors.

`levels` (k levels of period f, eta, theta, weight): a level takes in the gradients that waited in its buffer when its
period divides the firing, S <- eta S + theta b, and the weighted sum of all levels, resting ones included, is the
direction. `paper` (arXiv 2512.24695, Algorithm 1): a fast and a slow momentum that are orthogonalised apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .schema import M3Config, MomentumLevel, PaperConfig

States = dict[str, list[Tensor]]
"""State name -> local tensors, one a parameter."""


def state_names(config: M3Config) -> list[str]:
    """What a parameter of an m3 group keeps, each of its shape, fp32."""
    if config.form == "paper":
        second = ["second_moment"] if config.paper_form.denominator == "elementwise" else []
        return ["momentum_0", "momentum_1", "buffer_1", "slow_update", *second]
    slow = _slow_levels(config)
    momenta = [f"momentum_{n}" for n in range(len(config.levels))]
    total = ["slow_sum"] if config.slow_levels == "offloaded" else []
    return [*momenta, *(f"buffer_{n}" for n in slow), *total]


def waits_in_host_memory(name: str, config: M3Config) -> bool:
    """Whether a state is needed only when a slow level fires, and is to wait in host memory until then."""
    if config.slow_levels != "offloaded" or config.form == "paper":
        return False
    slow = _slow_levels(config)
    return name in {f"momentum_{n}" for n in slow} | {f"buffer_{n}" for n in slow[1:]}


def _slow_levels(config: M3Config) -> list[int]:
    return [n for n, level in enumerate(config.levels) if level.period > 1]


def advance_levels(config: M3Config, firing: int, gradients: list[Tensor], states: States) -> list[Tensor]:
    """Advance all levels by one gradient and return the directions, in tensors of their own.

    Args:
        config: of the optimizer.
        firing: of the group, from 0; all levels take part in the first.
        gradients: fp32 local tensors; read only.
        states: as `state_names` names them; changed in place.
    """
    directions: list[Tensor] = []
    for number, level in enumerate(config.levels):
        if level.period > 1:
            continue
        momenta = states[f"momentum_{number}"]
        torch._foreach_mul_(momenta, level.eta)
        torch._foreach_add_(momenta, gradients, alpha=level.theta)
        ahead = config.nesterov and number == 0
        parts = torch._foreach_lerp(gradients, momenta, level.eta) if ahead else momenta
        directions = _add_up(directions, parts, level.weight)
    if config.slow_levels == "offloaded":
        _advance_offloaded(config, firing, gradients, states)
        torch._foreach_add_(directions, states["slow_sum"])
        return directions
    _advance_slow(config, firing, gradients, states)
    for number in _slow_levels(config):
        directions = _add_up(directions, states[f"momentum_{number}"], config.levels[number].weight)
    return directions


def _add_up(total: list[Tensor], parts: list[Tensor] | tuple[Tensor, ...], weight: float) -> list[Tensor]:
    if not total:
        return list(torch._foreach_mul(parts, weight))
    torch._foreach_add_(total, parts, alpha=weight)
    return total


def _advance_slow(config: M3Config, firing: int, gradients: list[Tensor], states: States) -> None:
    """Let gradients wait in the buffers, and drain those of the levels that are due.

    Plain buffers each take in every gradient. Cascaded ones take in what the level before drained, which is the same
    sum where periods are nested, and fewer passes.
    """
    arriving = gradients
    for number in _slow_levels(config):
        level, buffers = config.levels[number], states[f"buffer_{number}"]
        torch._foreach_add_(buffers, arriving)
        due = firing % level.period == 0
        if due:
            _drain(config, level, firing, buffers, states[f"momentum_{number}"])
        if config.buffers == "cascaded":
            if not due:
                return
            arriving = [buffer.clone() for buffer in buffers] if number != _slow_levels(config)[-1] else []
        if due:
            torch._foreach_zero_(buffers)


def _drain(config: M3Config, level: MomentumLevel, firing: int, buffers: list[Tensor], momenta: list[Tensor]) -> None:
    # The first drain holds one gradient: every level fires on firing 0.
    waited = level.period if firing and config.drain == "mean" else 1
    torch._foreach_mul_(momenta, level.eta)
    torch._foreach_add_(momenta, buffers, alpha=level.theta / waited)


def _advance_offloaded(config: M3Config, firing: int, gradients: list[Tensor], states: States) -> None:
    """The same with three tensors a parameter on the device whatever the number of levels: momentum, buffer, slow sum.

    Other momenta and buffers come from host memory when the first slow level fires, and go back.
    """
    slow = _slow_levels(config)
    first = slow[0]
    if firing % config.levels[first].period:
        torch._foreach_add_(states[f"buffer_{first}"], gradients)
        return
    # One parameter at a time: no more than one's cold tensors are on the device.
    for number, gradient in enumerate(gradients):
        own = {name: [tensors[number]] for name, tensors in states.items()}
        cold = [name for name in states if waits_in_host_memory(name, config)]
        here = {name: [own[name][0].to(gradient.device, non_blocking=True)] for name in cold}
        _advance_slow(config, firing, [gradient], own | here)
        torch._foreach_zero_(own["slow_sum"])
        for level in slow:
            torch._foreach_add_(own["slow_sum"], here[f"momentum_{level}"], alpha=config.levels[level].weight)
        for name in cold:
            if own[name][0] is not here[name][0]:
                own[name][0].copy_(here[name][0], non_blocking=True)
    if gradients[0].is_cuda:
        # Whoever saves a checkpoint reads host memory without asking the device.
        torch.cuda.current_stream(gradients[0].device).synchronize()


def advance_paper(config: PaperConfig, gradients: list[Tensor], states: States) -> list[Tensor]:
    """Advance the fast momentum, the second moment and the slow level's buffer; return the fast directions."""
    ema = config.momentum == "ema"
    fast = states["momentum_0"]
    if ema:
        torch._foreach_mul_(fast, config.beta1)
    torch._foreach_add_(fast, gradients, alpha=1 - config.beta1 if ema else config.beta1)
    torch._foreach_add_(states["buffer_1"], gradients)
    if "second_moment" in states:
        second = states["second_moment"]
        if ema:
            torch._foreach_mul_(second, config.beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - config.beta2 if ema else config.beta2)
    return [momentum.clone() for momentum in fast]


def finish_paper_update(config: PaperConfig, updates: list[Tensor], states: States) -> None:
    """Add the slow momentum's share to the orthogonalised fast one, and divide by the second moment's root."""
    if not updates:
        return
    torch._foreach_add_(updates, states["slow_update"], alpha=config.alpha)
    if "second_moment" in states:
        scale = torch._foreach_sqrt(states["second_moment"])
        torch._foreach_add_(scale, config.eps)
        torch._foreach_div_(updates, scale)


def slow_level_is_due(config: PaperConfig, firing: int) -> bool:
    """Whether the slow momentum takes in its buffer after this firing (from 0), to act from the next one on."""
    return (firing + 1) % config.period == 0


def advance_paper_slow(config: PaperConfig, states: States) -> list[Tensor]:
    """Drain the buffer into the slow momentum and return its directions."""
    if not states["momentum_1"]:
        return []
    ema = config.momentum == "ema"
    slow, buffers = states["momentum_1"], states["buffer_1"]
    if ema:
        torch._foreach_mul_(slow, config.beta3)
    torch._foreach_add_(slow, buffers, alpha=1 - config.beta3 if ema else config.beta3)
    torch._foreach_zero_(buffers)
    return [momentum.clone() for momentum in slow]
