"""What `hopescale plan` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hopescale.config.compose import load_config
from hopescale.errors import ConfigError, Problem

from .job import Job, figures_of, job_of, sweep_rows
from .model import describe_plan, plan_model
from .optimizer import plan_optimizer
from .spread import Spread, model_of
from .text import describe_job, sweep_table

SHORT = ("nodes", "gpus_per_node", "hardware")
"""Settings of `cluster` that need not say so here."""


def plan_command(overrides: Sequence[str], *, sweep: bool, plot: Path | None) -> tuple[dict[str, Any], str]:
    """Figures and text of a planned job, or of a sweep up to it.

    Args:
        overrides: settings; those of `cluster` may be short.
        sweep: whether to plan for 1, 2, 4 ... ranks and every recompute mode instead.
        plot: PNG to draw the sweep into.

    Raises:
        ConfigError: a setting is wrong, or the job cannot be.
        MissingExtra: matplotlib is needed for the plot, and not installed.
    """
    config = load_config([f"cluster.{text}" if text.partition("=")[0] in SHORT else text for text in overrides])
    if plot is not None and not plot.absolute().parent.is_dir():
        rule = f"the folder {plot.absolute().parent} does not exist"
        raise ConfigError(Problem("--plot", plot, rule, "make it, or name a file in another one"))
    if config.model.compat != "none" and not sweep and config.cluster.ranks == 1:
        newton_schulz, table = plan_optimizer(Spread(config, model_of(config), 1))
        figures = {**plan_model(config), "newton_schulz": newton_schulz}
        return figures, f"{describe_plan(figures)}\n\n{table}"
    job = job_of(config)
    if sweep:
        return _swept(job, config.run.name, plot)
    newton_schulz, table = plan_optimizer(job.spread)
    figures = {**plan_model(config), "newton_schulz": newton_schulz, "job": figures_of(job)}
    return figures, "\n\n".join([describe_plan(figures), describe_job(job), table])


def _swept(job: Job, name: str, plot: Path | None) -> tuple[dict[str, Any], str]:
    rows = sweep_rows(job)
    text = sweep_table(rows)
    if plot is not None:
        from .plot import plot_sweep

        plot_sweep(rows, f"{name} on {job.hardware.name}", job.hardware.memory_bytes, plot)
        text += f"\n{plot}"
    return {"sweep": rows}, text
