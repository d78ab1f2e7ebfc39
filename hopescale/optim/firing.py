"""One step of one parameter group that fires: what takes part, on which gradients, and how far it moves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .state import local, local_gradient


class Moved(NamedTuple):
    """How far a firing moved a group: sums over this rank's pieces, in fp64."""

    change: Tensor
    """Of the squares of what was added to the parameters, decay included."""
    before: Tensor
    """Of the squares of the parameters before."""


@dataclass
class Firing:
    """A firing of a group; lists are of the parameters that take part, unless it says otherwise."""

    index: int
    """Of the group."""
    group: dict[str, Any]
    number: int
    """Of firings so far, this one included."""
    taking_part: list[int]
    """Parameters, by their number in the group."""
    gradients: list[Tensor]
    """fp32, local, read only; in a slow group their sums since the last firing."""
    is_measured: bool
    moves: list[Moved] = field(default_factory=list)

    @property
    def parameters(self) -> list[Tensor]:
        """Those that take part."""
        return [self.group["params"][n] for n in self.taking_part]

    def for_all(self, tensors: list[Tensor]) -> list[Tensor]:
        """The same, flat, with zeros for the parameters of the group that do not take part."""
        given = dict(zip(self.taking_part, tensors, strict=True))
        everyone = [local(p) for p in self.group["params"]]
        return [
            given[n].reshape(-1) if n in given else torch.zeros(p.numel(), dtype=torch.float32, device=p.device)
            for n, p in enumerate(everyone)
        ]

    def of_taking_part(self, tensors: list[Tensor]) -> list[Tensor]:
        """The inverse of `for_all`."""
        return [tensors[n].view(local(p).shape) for n, p in zip(self.taking_part, self.parameters, strict=True)]

    def parts_to_move(self) -> list[list[int]]:
        """Which of the parameters taking part are moved together: all or, measured, one by one."""
        numbers = list(range(len(self.taking_part)))
        return [[n] for n in numbers] if self.is_measured else [numbers] if numbers else []

    @contextmanager
    def measuring(self, weights: list[Tensor]) -> Iterator[None]:
        """Measure how far what is done inside moves some weights, if this firing is measured."""
        before = [weight.clone() for weight in weights] if self.is_measured else []
        yield
        for old, weight in zip(before, weights, strict=self.is_measured):
            size = old.norm(dtype=torch.float64).square()
            self.moves.append(Moved(old.sub_(weight).norm(dtype=torch.float64).square(), size))

    def moved(self) -> Moved | None:
        """How far the group moved, if that was measured."""
        if not self.moves:
            return None
        change, before = zip(*self.moves, strict=True)
        return Moved(torch.stack(change).sum(), torch.stack(before).sum())

    def empty_sums(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Of a slow group that has fired."""
        if self.group["period"] > 1:
            torch._foreach_zero_([local(state[p]["period_sum"]) for p in self.group["params"]])


def count_step(
    group: dict[str, Any], index: int, state: Mapping[Tensor, dict[str, Any]], report_in: int | None
) -> Firing | None:
    """Count a step of a group, add its gradients to what waits if it is a slow one, and say what fires, if it does."""
    group["num_steps"] += 1
    number, rest = divmod(group["num_steps"], group["period"])
    having = [n for n, p in enumerate(group["params"]) if p.grad is not None]
    gradients = [local_gradient(group["params"][n]) for n in having]
    if group["period"] > 1:
        if gradients:
            torch._foreach_add_([local(state[group["params"][n]]["period_sum"]) for n in having], gradients)
        having = list(range(len(group["params"])))
        gradients = [local(state[p]["period_sum"]) for p in group["params"]]
    if rest:
        return None
    is_measured = report_in is not None and report_in < group["period"]
    return Firing(index, group, number, having, [gradient.float() for gradient in gradients], is_measured)
