"""One optimizer for the whole predictor: M3 for matrices, AdamW for the rest, chosen per parameter group.

M3 sums momenta of several time scales and orthogonalises the sum (Newton-Schulz), as Muon does with one. State lies
eagerly beside each parameter and is sharded like it. A sharded matrix is gathered for Newton-Schulz, so the result
is that of the unsharded optimizer whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from .newton_schulz import COEFFICIENTS, orthogonalise, shape_factor
from .schema import OptimizerConfig


class Moved(NamedTuple):
    """How far a firing moved a group: sums over this rank's pieces, in fp64."""

    change: Tensor
    """Of the squares of what was added to the parameters, decay included."""
    before: Tensor
    """Of the squares of the parameters before."""


class M3(torch.optim.Optimizer):
    """M3 and AdamW behind one `step`.

    Groups need the keys `params`, `algorithm` ("m3" or "adamw"), `lr`, `weight_decay`. A matrix is (parameter, leading
    index): leading dims of an m3 parameter are a batch of matrices. Decay is decoupled: w <- w (1 - lr decay) first.

    A group of `period` C (default 1) fires on every C-th step: it then moves once, on the sum of the C gradients and at
    the rate of that step. In between they wait in the state `period_sum`. Decay, Adam's corrections and the pulse of
    M3's levels count firings. `group["num_steps"]` counts steps, of which num_steps // C fired; a step that is not
    taken (non-finite gradients) moves nothing and counts nowhere.

    Raises:
        ValueError: a group without parameters, a period below 1, a parameter twice, an m3 parameter with fewer than 2
            dims, or a complex or integer parameter.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], config: OptimizerConfig) -> None:
        self.config = config
        groups = [{"num_steps": 0, "period": 1, **group} for group in groups]
        for group in groups:
            _check_group(group)
        super().__init__(groups, {"lr": config.lr, "weight_decay": config.weight_decay})
        self.moved: list[Moved | None] = [None] * len(self.param_groups)
        """How far each group moved on the last step, where that was measured."""
        for group in self.param_groups:
            for parameter in group["params"]:
                names = self._state_names(group)
                self.state[parameter] = {name: torch.zeros_like(parameter, dtype=torch.float32) for name in names}

    def _state_names(self, group: dict[str, Any]) -> list[str]:
        waiting = ["period_sum"] if group["period"] > 1 else []
        if group["algorithm"] == "adamw":
            return ["exp_avg", "exp_avg_sq", *waiting]
        slow = [n for n, level in enumerate(self.config.levels) if level.period > 1]
        momenta = [f"momentum_{n}" for n in range(len(self.config.levels))]
        return [*momenta, *(f"buffer_{n}" for n in slow), *waiting]

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, report_in: int | None = None
    ) -> float | None:
        """Take one step from the gradients in `.grad`, which are read and left as they are.

        A parameter without gradient takes no part: it does not move, and what it has waiting goes on waiting.

        Args:
            closure: computes the loss and its gradients first.
            report_in: steps from this one to the next report; a group whose last firing until then is this one leaves
                in `moved` how far it moved, at the cost of a copy of one parameter at a time. None for no report.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.moved = [None] * len(self.param_groups)
        for number, group in enumerate(self.param_groups):
            group["num_steps"] += 1
            firing, left = divmod(group["num_steps"], group["period"])
            parameters = [p for p in group["params"] if p.grad is not None]
            gradients = self._waiting(group, parameters)
            if left or not parameters:
                continue
            if report_in is not None and report_in < group["period"]:
                self.moved[number] = self._fire_measured(group, firing, parameters, gradients)
            else:
                self._fire(group, firing, parameters, gradients)
            if group["period"] > 1:
                torch._foreach_zero_(gradients)
        return loss

    def _fire(self, group: dict[str, Any], firing: int, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        """Firing number `firing` (from 1) of a group."""
        (self._adamw if group["algorithm"] == "adamw" else self._m3)(group, firing, parameters, gradients)

    def _fire_measured(
        self, group: dict[str, Any], firing: int, parameters: list[Tensor], gradients: list[Tensor]
    ) -> Moved:
        """The same parameter by parameter, so that only one of them is ever held twice."""
        change, size = [], []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            local = _local(parameter)
            before = local.clone()
            self._fire(group, firing, [parameter], [gradient])
            size.append(before.norm(dtype=torch.float64))
            change.append(before.sub_(local).norm(dtype=torch.float64))
        return Moved(torch.stack(change).square().sum(), torch.stack(size).square().sum())

    def _waiting(self, group: dict[str, Any], parameters: list[Tensor]) -> list[Tensor]:
        """What the next firing is to act on, on the local pieces: the gradients, in a slow group their sums so far."""
        gradients = [_local(p.grad) for p in parameters]
        if group["period"] == 1 or not parameters:
            return gradients
        sums = [_local(self.state[p]["period_sum"]) for p in parameters]
        torch._foreach_add_(sums, gradients)
        return sums

    def _m3(self, group: dict[str, Any], firing: int, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        """Firing number `firing` (from 1) of an m3 group."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            direction = self._direction(firing - 1, gradient, self.state[parameter])
            update = self._orthogonal(direction, parameter)
            rows, columns = parameter.shape[-2:]
            local = _local(parameter)
            local.mul_(1 - group["lr"] * group["weight_decay"])
            local.add_(update.to(local.dtype), alpha=-group["lr"] * shape_factor(rows, columns, self.config.adjust))

    def _direction(self, step: int, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        """Advance all levels by one gradient (element by element, on the local piece) and return their sum."""
        gradient = gradient.float()
        direction = torch.zeros_like(gradient)
        for number, level in enumerate(self.config.levels):
            momentum = _local(state[f"momentum_{number}"])
            if level.period == 1:
                momentum.mul_(level.eta).add_(gradient, alpha=level.theta)
            else:
                buffer = _local(state[f"buffer_{number}"]).add_(gradient)
                if step % level.period == 0:
                    # The first drain holds one gradient: every level fires on step 0.
                    waited = level.period if step and self.config.drain == "mean" else 1
                    momentum.mul_(level.eta).add_(buffer, alpha=level.theta / waited)
                    buffer.zero_()
            if number == 0 and self.config.nesterov:
                momentum = torch.lerp(gradient, momentum, level.eta)
            direction.add_(momentum, alpha=level.weight)
        return direction

    def _orthogonal(self, direction: Tensor, parameter: Tensor) -> Tensor:
        """The local piece of the orthogonalised whole."""
        newton_schulz = self.config.newton_schulz
        coefficients = COEFFICIENTS[newton_schulz.coefficients]
        if not isinstance(parameter, DTensor):
            return orthogonalise(direction, coefficients, newton_schulz.steps)
        mesh, placements = parameter.device_mesh, parameter.placements
        sharded = DTensor.from_local(
            direction, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        whole = orthogonalise(sharded.full_tensor(), coefficients, newton_schulz.steps)
        return distribute_tensor(whole.contiguous(), mesh, placements, src_data_rank=None).to_local()

    def _adamw(self, group: dict[str, Any], firing: int, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        """Firing number `firing` (from 1) of an adamw group."""
        adam = self.config.adam
        weights = [_local(p) for p in parameters]
        gradients = [gradient.float() for gradient in gradients]
        first = [_local(self.state[p]["exp_avg"]) for p in parameters]
        second = [_local(self.state[p]["exp_avg_sq"]) for p in parameters]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(first, gradients, 1 - adam.beta1)
        torch._foreach_mul_(second, adam.beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - adam.beta2)
        scale = torch._foreach_sqrt(second)
        torch._foreach_div_(scale, (1 - adam.beta2**firing) ** 0.5)
        torch._foreach_add_(scale, adam.eps)
        torch._foreach_addcdiv_(weights, first, scale, -group["lr"] / (1 - adam.beta1**firing))


def _local(tensor: Tensor | None) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return cast(Tensor, tensor)


def _check_group(group: dict[str, Any]) -> None:
    name = group.get("name", "unnamed")
    group["params"] = list(group["params"])
    if not group["params"]:
        raise ValueError(f"optimizer group {name} has no parameters")
    if group["period"] < 1:
        raise ValueError(f"optimizer group {name} has period {group['period']}; it must be at least 1")
    if len(set(map(id, group["params"]))) < len(group["params"]):
        raise ValueError(f"optimizer group {name} holds a parameter twice")
    for parameter in group["params"]:
        if not parameter.is_floating_point():
            raise ValueError(f"optimizer group {name} holds a {parameter.dtype} parameter; only real floats train")
        if group["algorithm"] == "m3" and parameter.ndim < 2:
            raise ValueError(f"optimizer group {name} holds a {parameter.ndim}-D parameter; m3 takes matrices")
