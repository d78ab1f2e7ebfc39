"""Measures a finished run on every held-out clip and leaves result.json and the arrays the report draws."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data_pipeline.cache import write_json
from data_pipeline.pixels.frames import read_frames
from data_pipeline.reader.clips import ClipReader
from hopescale.checkpoint import contents
from hopescale.checkpoint.manager import load_tensors
from hopescale.checkpoint.manifest import verify
from hopescale.checkpoint.staging import committed
from hopescale.config.compose import validate, with_overrides
from hopescale.config.schema import Config
from hopescale.errors import CheckpointError, ConfigError, Problem
from hopescale.evaluate import Errors, held_out_errors, rollout, summarise, surprise_by_frame
from hopescale.model.build import HOPE_BLOCKS, Predictor, build_predictor
from hopescale.model.predictor import normalise
from hopescale.model.teaching import at_step
from hopescale.parallel.process_group import Launch, choose_device, prepare_process
from hopescale.preflight import open_held_out
from hopescale.run_folder import RunFolder

NUM_SAMPLES = 4


def evaluate_run(path: Path, overrides: Sequence[str], pixels: Path | None = None) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run in this process.

    Args:
        path: run folder.
        overrides: settings that differ from the run's, e.g. data.path for data that moved.
        pixels: folder of the pixels the clips were encoded from, for the report's filmstrips.

    Returns:
        What result.json holds: means over partitions, one row a partition, baselines, seconds and paths.

    Raises:
        UserError: no usable run, checkpoint or data.
    """
    began = time.monotonic()
    run = RunFolder(path)
    if not path.is_dir():
        raise ConfigError(Problem("run", path, "does not exist", "name a run folder"))
    _check_overrides(overrides)
    checkpoint = newest(run.checkpoints)
    manifest = verify(checkpoint)
    config = with_overrides(validate(manifest["config"]), overrides)
    device = choose_device(config.parallel, Launch())
    prepare_process(config.parallel, Launch(), device)
    held_out = open_held_out(config)
    model = build_predictor(config.model).to(device).eval()
    load_tensors(checkpoint, contents.tensors(model, None))
    predictor = at_step(model, config.model.cms, manifest["state"]["step"])

    jump_horizons = config.objective.jump_horizons if config.model.can_jump else 0
    errors = held_out_errors(
        predictor,
        held_out,
        jump_horizons=jump_horizons,
        jump_context=config.objective.jump_context,
        device=device,
        ablations=True,
    )
    partitions = sorted(set(held_out.partitions))
    run.report.mkdir(parents=True, exist_ok=True)
    _write_arrays(run.report / "evaluation.npz", config, model, predictor, held_out, errors, device, pixels)
    result = {
        **summarise(errors, partitions),
        "seconds": {"eval": round(time.monotonic() - began, 2)},
        "paths": {"run": str(path), "checkpoint": str(checkpoint), "data": config.data.path},
        "run": {
            "step": manifest["state"]["step"],
            "clips": manifest["state"]["attempted_steps"] * config.train.global_batch,
            "world_size": manifest["world_size"],
            "block_pattern": "-".join(config.model.block_pattern),
            "parameters": sum(p.numel() for p in model.parameters()),
            "command": f"hopescale eval {path}",
        },
    }
    write_json(run.result, result)
    return result


def _check_overrides(overrides: Sequence[str]) -> None:
    """Only where the data lies and where to compute may differ; anything else would be ignored or mislead."""
    bad = [text for text in overrides if not text.startswith(("data.", "parallel."))]
    if bad:
        rule = "an evaluation takes data.* and parallel.* only; all else comes from the checkpoint"
        raise ConfigError([Problem("override", text, rule, "leave it out") for text in bad])


def newest(root: Path) -> Path:
    """The newest committed checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    found = committed(root)
    if not found:
        raise CheckpointError(
            Problem("checkpoint", root, "holds no committed checkpoint", "train first, or name another run")
        )
    return found[0]


@torch.no_grad()
def _write_arrays(
    path: Path,
    config: Config,
    model: Predictor,
    predictor: nn.Module,
    reader: ClipReader,
    errors: Errors,
    device: torch.device,
    pixels: Path | None,
) -> None:
    partitions = sorted(set(reader.partitions))
    clips = reader.read(_sample_rows(reader)).to(device)
    truth = normalise(clips.features)
    predicted = torch.cat([truth[:, :1], rollout(predictor, clips)], dim=1)
    hope = [(n, b) for n, b in enumerate(model.blocks) if isinstance(b, HOPE_BLOCKS)]
    active = [b.cms.active_levels(reader.frames - 1) for _, b in hope if b.cms is not None]
    levels = config.model.cms.levels if active else ()
    arrays: dict[str, Any] = {
        "horizons": np.arange(1, reader.frames),
        "partitions": np.array(partitions),
        "grid": np.array(config.model.grid),
        "sample_keys": np.array(clips.keys),
        "sample_partitions": np.array(clips.partitions),
        "sample_truth": truth.cpu().numpy(),
        "sample_prediction": predicted.cpu().numpy(),
        "surprise": surprise_by_frame(predictor, reader, config.model.memory.chunk_size, device),
        "surprise_blocks": np.array([n for n, _ in hope], dtype=np.int64),
        "cms_active": np.array(active, dtype=bool).reshape(len(active), len(levels), reader.frames - 1),
        "cms_periods": np.array([level.period for level in levels], dtype=np.int64),
    }
    names = {
        "rollout_error": "rollout",
        "copy_last_error": "copy_last",
        "mean_frame_error": "mean_frame",
        "one_step_error": "one_step",
        "one_step_copy_last": "one_step_copy_last",
        "writes_off_rollout_error": "rollout_writes_off",
        "shuffled_rollout_error": "rollout_shuffled",
    }
    arrays |= {array: errors.mean(name).float().numpy() for array, name in names.items()}
    frames = None if pixels is None else read_frames(pixels, clips.keys, reader.frames)
    if frames is not None:
        arrays["sample_frames"] = frames
    part = path.with_name("evaluation.part.npz")
    np.savez_compressed(part, **arrays)
    os.replace(part, path)


def _sample_rows(reader: ClipReader) -> np.ndarray:
    """The first whole clip of a few partitions, spread over their sorted names."""
    first: dict[str, int] = {}
    for row in np.argsort(-reader.lengths, kind="stable"):
        first.setdefault(reader.partitions[row], int(row))
    names = sorted(first)
    return np.array([first[names[i * len(names) // NUM_SAMPLES]] for i in range(min(NUM_SAMPLES, len(names)))])
