"""Which parameter goes to which optimizer group: an ordered list of rules, first match wins."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from torch import Tensor

from hopescale.errors import ConfigError, Problem

from .schema import OptimizerConfig

SHORTEST_SIDE = 8
"""A matrix with a shorter side has too few directions to orthogonalise; m3 leaves it to `embeddings`."""

RULES: tuple[tuple[str, str], ...] = (
    ("*bias", "vectors"),
    ("*norm*", "vectors"),
    ("*_position.weight", "embeddings"),
    ("*.memory.w[12]", "titan"),
    ("*.memory.longterm.w[12]", "titan"),
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
        ConfigError: parameters that no rule names, or rules of the configuration that name no parameter.
    """
    own = [(rule.pattern, rule.group) for rule in config.routes]
    unused, nameless = dict(own), []
    routes = []
    for name, parameter in parameters:
        matching = ((pattern, group) for pattern, group in (*own, *RULES) if fnmatchcase(name, pattern))
        pattern, group = next(matching, ("", None))
        unused.pop(pattern, None)
        if group is None:
            nameless.append(name)
            continue
        if getattr(config.groups, group).algorithm == "m3":
            if parameter.ndim < 2:
                group = "vectors"
            elif min(parameter.shape[-2:]) < SHORTEST_SIDE:
                group = "embeddings"
        routes.append(Route(name, tuple(parameter.shape), group))
    if unused or nameless:
        raise ConfigError([*_unused_problem(unused), *_nameless_problem(nameless, config)])
    return routes


def _unused_problem(patterns: Collection[str]) -> Iterator[Problem]:
    if patterns:
        rule = "names no parameter of this model, or none that the routes before it leave"
        yield Problem("optimizer.routes", ", ".join(patterns), rule, "correct these patterns, or drop their routes")


def _nameless_problem(names: Sequence[str], config: OptimizerConfig) -> Iterator[Problem]:
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        rule = f"says no group for {shown}, and neither do the built-in rules"
        fix = f"add a route like {{pattern: {names[0]}, group: projections}}"
        yield Problem("optimizer.routes", _patterns(config), rule, fix)


def _idle_problem(asked: Sequence[str], config: OptimizerConfig) -> Problem:
    rule = f"leaves m3 without a matrix: its groups {', '.join(asked)} own no parameter of this model"
    if not config.routes:
        return Problem("optimizer.groups", f"m3 for {', '.join(asked)}", rule, "set optimizer=adamw")
    return Problem(
        "optimizer.routes", _patterns(config), rule, "route fewer parameters elsewhere, or set optimizer=adamw"
    )


def _patterns(config: OptimizerConfig) -> str:
    return ", ".join(f"{route.pattern} -> {route.group}" for route in config.routes) or "[]"


def parameter_groups(
    parameters: Iterable[tuple[str, Tensor]],
    config: OptimizerConfig,
    periods: Mapping[str, int] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """Optimizer groups in the order of `optimizer.groups`, leaving out those that own nothing.

    Args:
        parameters: named parameters of the model.
        config: of the optimizer.
        periods: name pattern -> period that its parameters get instead of their group's, first match first. Those with
            another period P than their group make a group of their own, GROUP_P, with all other settings of GROUP.

    Raises:
        ConfigError: m3 is asked for and would own no parameter at all; or as `route` says.
    """
    named = dict(parameters)
    routes = route(named.items(), config)
    groups = []
    for name, settings in config.groups:
        by_period: dict[int, list[str]] = {}
        for member in (r.name for r in routes if r.group == name):
            own = (period for pattern, period in periods.items() if fnmatchcase(member, pattern))
            by_period.setdefault(next(own, settings.period), []).append(member)
        decay = config.weight_decay if settings.weight_decay is None else settings.weight_decay
        beta1 = config.adam.beta1 if settings.beta1 is None else settings.beta1
        beta2 = config.adam.beta2 if settings.beta2 is None else settings.beta2
        for period, members in sorted(by_period.items()):
            groups.append(
                {
                    "name": name if period == settings.period else f"{name}_{period}",
                    "algorithm": settings.algorithm,
                    "params": [named[member] for member in members],
                    "param_names": members,
                    "lr": config.lr * settings.lr_scale,
                    "lr_scale": settings.lr_scale,
                    "weight_decay": decay,
                    **({"betas": (beta1, beta2)} if settings.algorithm == "adamw" else {}),
                    "period": period,
                }
            )
    asked = [name for name, settings in config.groups if settings.algorithm == "m3"]
    if asked and not any(group["algorithm"] == "m3" for group in groups):
        raise ConfigError(_idle_problem(asked, config))
    return groups


def routing_table(groups: list[dict[str, Any]]) -> str:
    """One line a group: algorithm, tensors, parameters, learning rate, decay, and the period where one is above 1."""
    width = max([12, *(len(group["name"]) + 2 for group in groups)])
    slow = any(group["period"] > 1 for group in groups)
    header = f"{'group':<{width}}{'algorithm':<11}{'tensors':>8}{'parameters':>14}{'lr':>11}{'decay':>8}"
    lines = [header + (f"{'period':>8}" if slow else "")]
    for group in groups:
        numbers = sum(p.numel() for p in group["params"])
        lines.append(
            f"{group['name']:<{width}}{group['algorithm']:<11}{len(group['params']):>8}{numbers:>14,}"
            f"{group['lr']:>11.2e}{group['weight_decay']:>8.3g}" + (f"{group['period']:>8}" if slow else "")
        )
    return "\n".join(lines)
