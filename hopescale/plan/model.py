"""Parameters, FLOPs and bytes of a configuration, without data and without memory for the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hopescale.config.schema import Config
from hopescale.model.flops import flops_executed, flops_reference
from hopescale.model.memory_flops import Flops
from hopescale.model.objective_schema import ObjectiveConfig
from hopescale.model.passes import Pass, active_frames
from hopescale.optim.state import state_tensors

from .activations import clip_bytes
from .spread import NUMBER_BYTES, model_of

STORED = ("parameters", "gradients", "optimizer_state")
HOST = "host_state"
"""What optimizer.slow_levels=offloaded leaves in host memory."""


def plan_model(config: Config) -> dict[str, Any]:
    """All figures of one model, unsharded, and of one clip as long as the model or `data.frames` allows.

    Returns:
        `parameters`; `groups`, one row an optimizer group; `bytes` of the model as it trains, their total without
        `host_state`, which is in no device's memory; `clip`; of one clip
        `branches` of the objective, `flops_reference`, `flops_executed` and `bytes_per_clip`, the last two None with
        `model.compat`, whose arithmetic is another; `curriculum`, these figures again from each of its phases on.
    """
    model = config.model
    frames = min(config.data.frames or model.frames, model.frames)
    groups = _groups(config)
    stored = {name: sum(group[f"{name}_bytes"] for group in groups) for name in STORED}
    start, *later = [_per_clip(config, objective, frames) for objective in config.objective.stages]
    return {
        "parameters": sum(group["parameters"] for group in groups),
        "groups": groups,
        "bytes": stored | {"total": sum(stored.values()), HOST: sum(group[f"{HOST}_bytes"] for group in groups)},
        "clip": {
            "frames": frames,
            "transitions": frames - 1,
            "tokens_per_frame": model.num_tokens,
            "cms_active_frames": [active_frames(model, n, Pass(frames - 1)) for n in range(len(model.cms.levels))],
        },
        **start,
        "curriculum": later,
    }


def _groups(config: Config) -> list[dict[str, Any]]:
    """One row an optimizer group."""
    rows = []
    for group in model_of(config).groups:
        numbers = sum(p.numel() for p in group["params"])
        kept, on_host = state_tensors(group, config.optimizer)
        rows.append(
            {
                "name": group["name"],
                "algorithm": group["algorithm"],
                "parameters": numbers,
                "parameters_bytes": sum(p.nbytes for p in group["params"]),
                "gradients_bytes": numbers * NUMBER_BYTES,
                "optimizer_state_bytes": kept * numbers * NUMBER_BYTES,
                f"{HOST}_bytes": on_host * numbers * NUMBER_BYTES,
            }
        )
    return rows


def _per_clip(config: Config, objective: ObjectiveConfig, frames: int) -> dict[str, Any]:
    model, parallel = config.model, config.parallel
    figures: dict[str, Any] = {
        "branches": [name for name, weight in objective.weights.items() if weight],
        "flops_reference": _figures(flops_reference(model, objective, frames)),
        "flops_executed": None,
        "bytes_per_clip": None,
    }
    if model.compat == "none":
        executed = flops_executed(model, objective, frames, parallel.recompute)
        figures["flops_executed"] = _figures(executed)
        figures["bytes_per_clip"] = asdict(clip_bytes(model, objective, frames, parallel.recompute, parallel.precision))
    return figures


def _figures(flops: Flops) -> dict[str, float]:
    return asdict(flops) | {"total": flops.total}


def describe_plan(plan: dict[str, Any]) -> str:
    """The figures as text."""
    clip = plan["clip"]
    lines = [f"{plan['parameters']:,} parameters", ""]
    stored = (*STORED, HOST) if plan["bytes"][HOST] else STORED
    headers = ["bytes", "gradients", "optimizer", "on the host"][: len(stored)]
    lines.append(f"{'group':<14}{'algorithm':<11}{'parameters':>15}" + _columns(headers))
    for row in plan["groups"]:
        sizes = [_bytes(row[f"{name}_bytes"]) for name in stored]
        lines.append(f"{row['name']:<14}{row['algorithm']:<11}{row['parameters']:>15,}" + _columns(sizes))
    lines.append(f"{'all':<25}{plan['parameters']:>15,}" + _columns([_bytes(plan["bytes"][name]) for name in stored]))
    lines += ["", f"One clip: {clip['frames']} frames of {clip['tokens_per_frame']} tokens"]
    if active := clip["cms_active_frames"]:
        lines[-1] += f"; CMS levels touch {', '.join(map(str, active))} of {clip['transitions']} frames"
    lines += ["", *_describe_clip(plan, "from the start")]
    for number, phase in enumerate(plan["curriculum"], 1):
        lines += ["", *_describe_clip(phase, f"from phase {number} of the curriculum on")]
    return "\n".join(lines)


def _describe_clip(figures: dict[str, Any], when: str) -> list[str]:
    lines = [f"{' + '.join(figures['branches'])}, {when}"]
    lines.append(f"  {'FLOPs':<14}" + _columns(["forward", "backward", "recomputed", "total"]))
    for name in ("reference", "executed"):
        flops = figures[f"flops_{name}"]
        if flops is not None:
            lines.append(f"  {name:<14}" + _columns([_flops(value) for value in flops.values()]))
    kept = figures["bytes_per_clip"]
    if kept is not None:
        fast, block = _bytes(kept["fast_state"]), _bytes(kept["block_input"])
        most = _bytes(kept["together"])
        lines.append(f"  {most} kept and worked on in backward (fast weights {fast}, a block's input {block})")
    return lines


def _columns(cells: Sequence[str]) -> str:
    return "".join(f"{cell:>13}" for cell in cells)


def _flops(value: float) -> str:
    return f"{value / 1e12:,.3f} T" if value >= 1e12 else f"{value / 1e9:,.3f} G"


def _bytes(value: float) -> str:
    return f"{value / 2**30:,.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.2f} MiB"
