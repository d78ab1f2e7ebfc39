"""Which parameter goes to which optimizer group: an ordered list of rules, first match wins."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from .schema import OptimizerConfig

SHORTEST_SIDE = 8
"""A matrix with a shorter side has too few directions to orthogonalise; m3 leaves it to `embeddings`."""

RULES: tuple[tuple[str, str], ...] = (
    ("*bias", "vectors"),
    ("*norm*", "vectors"),
    ("*_position.weight", "embeddings"),
    ("*.memory.w[12]", "titan"),
    ("*.cms.*", "cms"),
    ("*.attention.*", "attention"),
    ("*.fc[12].weight", "attention"),
    ("*.weight", "projections"),
)


@dataclass(frozen=True)
class Route:
    """Where one parameter went."""

    name: str
    shape: tuple[int, ...]
    group: str


def route(parameters: Iterable[tuple[str, Tensor]], config: OptimizerConfig) -> list[Route]:
    """Sort named parameters into groups by the rules; what m3 cannot orthogonalise in its group goes to `embeddings`.

    Raises:
        ValueError: a parameter that no rule names.
    """
    routes = []
    for name, parameter in parameters:
        group = next((group for pattern, group in RULES if fnmatchcase(name, pattern)), None)
        if group is None:
            raise ValueError(f"no routing rule names parameter {name}; add one to hopescale/optim/routing.py")
        if getattr(config.groups, group).algorithm == "m3" and min(parameter.shape[-2:]) < SHORTEST_SIDE:
            group = "embeddings"
        routes.append(Route(name, tuple(parameter.shape), group))
    return routes


def parameter_groups(parameters: Iterable[tuple[str, Tensor]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Optimizer groups in the order of `optimizer.groups`, leaving out those that own nothing.

    Raises:
        ValueError: m3 is asked for and would own no parameter at all.
    """
    named = dict(parameters)
    routes = route(named.items(), config)
    groups = []
    for name, settings in config.groups:
        members = [r.name for r in routes if r.group == name]
        if not members:
            continue
        decay = config.weight_decay if settings.weight_decay is None else settings.weight_decay
        groups.append(
            {
                "name": name,
                "algorithm": settings.algorithm,
                "params": [named[member] for member in members],
                "param_names": members,
                "lr": config.lr * settings.lr_scale,
                "lr_scale": settings.lr_scale,
                "weight_decay": decay,
            }
        )
    asked = [name for name, settings in config.groups if settings.algorithm == "m3"]
    if asked and not any(group["algorithm"] == "m3" for group in groups):
        raise ValueError(f"m3 is asked for groups {', '.join(asked)}, but this model has no parameters in them")
    return groups


def routing_table(groups: list[dict[str, Any]]) -> str:
    """One line a group: algorithm, tensors, parameters, learning rate, decay."""
    lines = [f"{'group':<12}{'algorithm':<11}{'tensors':>8}{'parameters':>14}{'lr':>11}{'decay':>8}"]
    for group in groups:
        numbers = sum(p.numel() for p in group["params"])
        lines.append(
            f"{group['name']:<12}{group['algorithm']:<11}{len(group['params']):>8}{numbers:>14,}"
            f"{group['lr']:>11.2e}{group['weight_decay']:>8.3g}"
        )
    return "\n".join(lines)
