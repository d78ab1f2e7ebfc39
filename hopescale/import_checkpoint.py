"""Makes a run of an earlier predictor's checkpoint: a run folder that `hopescale eval` and training go on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hopescale.checkpoint.contents import RunState
from hopescale.checkpoint.earlier_names import convert, inferred_sizes, level_multipliers, read_tensors
from hopescale.checkpoint.manager import CheckpointManager
from hopescale.config.compose import load_config, to_tree
from hopescale.config.schema import Config
from hopescale.errors import ConfigError, Problem
from hopescale.model.build import Predictor, build_predictor
from hopescale.model.schema import ModelConfig
from hopescale.optim.m3 import M3
from hopescale.optim.routing import parameter_groups
from hopescale.parallel.process_group import Launch, process_group
from hopescale.run_folder import RunFolder

SAME = (
    "every pass computes what the earlier predictor did, from fresh memories, if its run had {}, which no tensor tells"
)
OTHERWISE = (
    "model.compat=none takes over the weights and nothing else: this model gives them another meaning (memories of "
    "each clip, other gates, actions in every patch), so expect bad predictions until it is trained on"
)


def import_checkpoint(source: Path, out: Path, overrides: Sequence[str], step: int = 0) -> dict[str, Any]:
    """Write a run folder that starts from the weights of an earlier checkpoint.

    Args:
        source: Lightning checkpoint or bare state dict of AC-HOPE-ViT with pure HOPE blocks.
        out: run folder, new or empty.
        overrides: the run's settings. A pick of `experiment` or `model` must have the sizes of the file; without one,
            sizes are read off the file, and `model=ac_hope` tells the rest (`model.compat=none` takes `model=base`).
        step: optimizer steps the checkpoint is said to have behind it; the optimizer starts afresh all the same.

    Returns:
        Run folder and checkpoint, parameters, tensors left unused, and what the weights mean now, with the settings
        that are taken on trust.

    Raises:
        UserError: settings that do not fit together, a file that cannot be read or does not fit them, or a folder that
            holds something already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(Problem("out", out, "is not empty", "name a new or empty folder"))
    found = read_tensors(source)
    config = load_config(_settings(found, overrides))
    with torch.device("meta"):
        wanted = build_predictor(config.model)
    conversion = convert(found, wanted, source)
    model = build_predictor(config.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(conversion.tensors[name])
    checkpoint = _write_run(RunFolder(out), config, model, step)
    return {
        "run": str(out),
        "checkpoint": str(checkpoint),
        "step": step,
        "parameters": sum(p.numel() for p in model.parameters()),
        "compat": config.model.compat,
        "unused": conversion.unused,
        "note": OTHERWISE if config.model.compat == "none" else SAME.format(_on_trust(config.model)),
    }


def _on_trust(model: ModelConfig) -> str:
    """Settings that shape what the earlier predictor computes, and no tensor."""
    settings: dict[str, object] = {
        "state_dim": model.state_dim,
        "memory.chunk_size": model.memory.chunk_size,
        "cms.levels.*.period": [level.period for level in model.cms.levels],
    }
    settings |= {f"ac_hope.{field}": value for field, value in model.ac_hope if field != "clip_backward"}
    if model.ac_hope.rope_heads:
        settings["grid"] = list(model.grid)
    return "; ".join(f"model.{field}={value}" for field, value in settings.items())


def _settings(found: Mapping[str, Tensor], overrides: Sequence[str]) -> list[str]:
    """The given settings, under what the file itself tells unless a pick tells it."""
    keys = {text.partition("=")[0] for text in overrides}
    if keys & {"experiment", "model"}:
        return list(overrides)
    modern = "model.compat=none" in overrides
    sizes = inferred_sizes(found)
    if modern:
        # There is a state token in every file, and the last projection emits whole frames.
        sizes |= {"state_dim": sizes.get("action_dim", 0), "output": "absolute"}
    multipliers = level_multipliers(found)
    if multipliers and not any(key.startswith("model.cms") for key in keys):
        levels = ", ".join(f"{{period: ?, hidden_multiplier: {multiplier:g}}}" for multiplier in multipliers)
        rule = "the file does not tell their periods, nor what else shapes its predictions"
        fix = f"pick experiment=... or model=..., or set model.cms.levels=[{levels}]"
        raise ConfigError(Problem("model.cms.levels", f"{len(multipliers)} levels", rule, fix))
    base = "model=base" if modern else "model=ac_hope"
    return [base, *(f"model.{field}={_typed(value)}" for field, value in sizes.items()), *overrides]


def _typed(value: object) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _write_run(run: RunFolder, config: Config, model: Predictor, step: int) -> Path:
    groups = parameter_groups(model.named_parameters(), config.optimizer, config.model.cms.parameter_periods)
    optimizer = M3(groups, config.optimizer)
    run.path.mkdir(parents=True, exist_ok=True)
    incarnation = run.create()
    with closing(run.claim()), process_group(config.parallel, Launch(), torch.device("cpu")):
        checkpoints = CheckpointManager(run.checkpoints, config.checkpoint.keep, to_tree(config), incarnation)
        with closing(checkpoints):
            folder = checkpoints.save(model, optimizer, RunState(step=step, attempted_steps=step))
        run.write_config(config)
    return folder
