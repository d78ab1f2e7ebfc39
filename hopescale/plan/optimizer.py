"""Who orthogonalises what on ranks you do not have: the optimizer's planner on the layouts an engine would make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

from hopescale.config.schema import Config
from hopescale.errors import ConfigError, Problem
from hopescale.optim.orthogonaliser import schedule_for, with_plan
from hopescale.optim.planner import PlanName, Schedule
from hopescale.optim.schedule_table import bucket_figures, figures_of, schedule_table, table_row
from hopescale.optim.shard_map import Layout, Team

from .spread import Spread

DEVICES = {
    "cuda": "M3 plans for CUDA devices (parallel.device=cpu: for CPUs) by costs that optimizer.plan.* sets:",
    "cpu": "M3 plans for CPUs by costs that optimizer.plan.* sets:",
}
AUTO = "  one plan for all (auto takes gram in fp32 alone, for long matrices where it sends less, and never gather):"
EXACT_PLANS: tuple[PlanName, ...] = tuple(plan for plan in get_args(PlanName) if plan != "block_periodic")


def plan_optimizer(spread: Spread) -> tuple[dict[str, Any], str]:
    """Newton-Schulz of one step in which all m3 groups fire; on CUDA devices unless parallel.device=cpu.

    Args:
        spread: the model over ranks.

    Raises:
        ConfigError: a plan that the configuration forces cannot be used on some matrix.

    Returns:
        Figures and text. Figures have `ranks`, `precision`, `costs`; `buckets`, one row each; `total`; `exact_step`,
        the total of the exact steps of block_periodic, whose other figures are of the steps between, else None; and
        `others`, the totals of every exact plan for all matrices, or why it cannot be used.
    """
    config, device = spread.config, device_of(spread.config)
    layouts, team = spread.layouts(spread.m3_parameters), spread.team
    schedule = schedule_of(spread)
    if schedule is None:
        return {"matrices": 0}, "Newton-Schulz: no group has algorithm m3; optimizer=m3 gives it some"
    lines = [DEVICES[device.type], schedule_table(schedule)]
    exact, period = None, config.optimizer.plan.block_period
    if period is not None:
        exact = figures_of(_planned(config, "auto", layouts, team, device))
        lines.append(f"  of {period} steps {period - 1} are as above, each rank on its own pieces, and one is exact:")
        lines.append(table_row("exact step", exact))
    others: dict[str, Any] = {}
    for plan in EXACT_PLANS if team.size > 1 else ():
        try:
            other = _planned(config, plan, layouts, team, device)
        except ValueError as error:
            others[plan] = str(error)
            text = f"  all {plan:<12} cannot: " + str(error).removeprefix("optimizer.plan.").split(", but")[0]
        else:
            precision = other.newton_schulz.precision
            others[plan] = figures_of(other) | {"precision": precision}
            text = table_row(f"all {plan}", others[plan])
            text += f"  in {precision}" if precision != schedule.newton_schulz.precision else ""
        lines += [*([] if len(others) > 1 else [AUTO]), text]
    figures = {
        "ranks": {"shards": spread.degrees.shard, "copies": spread.degrees.replicate},
        "precision": schedule.newton_schulz.precision,
        "costs": {"device": device.type, **schedule.costs._asdict()},
        "buckets": bucket_figures(schedule),
        "total": figures_of(schedule),
        "exact_step": exact,
        "others": others,
    }
    return figures, "\n".join(lines)


def _planned(
    config: Config, plan: Literal["auto"] | PlanName, layouts: Sequence[Layout], team: Team, device: torch.device
) -> Schedule:
    """The schedule of another strategy.

    Raises:
        ValueError: it cannot be used.
    """
    if plan == "gram" and config.optimizer.newton_schulz.precision == "bf16":
        raise ValueError("optimizer.plan.strategy=gram computes in fp32, but newton_schulz.precision is bf16")
    return schedule_for(layouts, range(len(layouts)), team, with_plan(config.optimizer, plan), device)


def schedule_of(spread: Spread) -> Schedule | None:
    """Who orthogonalises what, as a run would have it; None without a matrix.

    Raises:
        ConfigError: the strategy cannot be used on some.
    """
    layouts = spread.layouts(spread.m3_parameters)
    if not layouts:
        return None
    config = spread.config.optimizer
    try:
        return schedule_for(layouts, range(len(layouts)), spread.team, config, device_of(spread.config))
    except ValueError as error:
        strategy = config.plan.strategy
        rule = str(error).removeprefix(f"optimizer.plan.strategy={strategy} ").removesuffix("; use auto or owner")
        fix = "set optimizer.plan.strategy=auto, or owner"
        raise ConfigError(Problem("optimizer.plan.strategy", strategy, rule, fix)) from None


def device_of(config: Config) -> torch.device:
    """What is planned for."""
    return torch.device("cpu" if "cpu" in (config.parallel.device, config.cluster.hardware) else "cuda")


def check_plan(spread: Spread) -> None:
    """Check that a plan which the configuration forces can be used on every matrix.

    Raises:
        ConfigError: it cannot on some.
    """
    if spread.config.optimizer.plan.strategy != "auto":
        schedule_of(spread)
