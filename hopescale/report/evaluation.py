"""Read what a report needs from a run folder, and say which command makes a file that is missing."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data_pipeline.errors import Problem, UserError

_PER_HORIZON = (
    "rollout_error",
    "copy_last_error",
    "mean_frame_error",
    "writes_off_rollout_error",
    "shuffled_rollout_error",
)
_PER_STEP = ("one_step_error", "one_step_copy_last")


@dataclass(frozen=True)
class Evaluation:
    """Arrays of RUN/report/evaluation.npz; errors are mean L1 between LayerNormed features.

    P partitions, H horizons, T transitions, K sample clips of F frames, N = grid[0] * grid[1] patch tokens,
    E channels, L memory blocks.
    """

    horizons: np.ndarray  # [H] int
    partitions: list[str]  # [P]
    rollout_error: np.ndarray  # [P, H]
    copy_last_error: np.ndarray  # [P, H]
    mean_frame_error: np.ndarray  # [P, H]
    writes_off_rollout_error: np.ndarray  # [P, H]
    shuffled_rollout_error: np.ndarray  # [P, H]
    one_step_error: np.ndarray  # [P, T]
    one_step_copy_last: np.ndarray  # [P, T]
    sample_keys: list[str]  # [K]
    sample_partitions: list[str]  # [K]
    sample_truth: np.ndarray  # [K, F, N, E]
    sample_prediction: np.ndarray  # [K, F, N, E]; frame 0 is the truth
    sample_frames: np.ndarray | None  # [K, F, height, width, 3] uint8
    grid: tuple[int, int]
    surprise: np.ndarray  # [L, T]
    surprise_blocks: np.ndarray  # [L] int
    cms_active: np.ndarray  # [blocks, levels, F - 1] bool
    cms_periods: np.ndarray  # [levels] frames


@dataclass(frozen=True)
class RunRecord:
    """Everything a report shows about one run.

    Attributes:
        folder: the run folder.
        config: resolved config, nested by section.
        config_text: the same file as written.
        metrics: lines of metrics.jsonl, one per (kind, step): the last one where a resumed run repeated a step.
        unreadable_lines: lines of metrics.jsonl that are not JSON objects (a killed writer leaves half a line).
        result: result.json.
        evaluation: report/evaluation.npz.
    """

    folder: Path
    config: dict[str, Any]
    config_text: str
    metrics: list[dict[str, Any]]
    unreadable_lines: int
    result: dict[str, Any]
    evaluation: Evaluation


def load_run(run: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        UserError: a file is missing or unreadable; every such file is listed, each with the command that makes it.
    """
    run = Path(run)
    made_by = {
        "config.yaml": f"hopescale train ... run.dir={run}",
        "metrics.jsonl": f"hopescale train ... run.dir={run}",
        "result.json": f"hopescale eval {run}",
        "report/evaluation.npz": f"hopescale eval {run}",
    }
    missing = [
        Problem(field="run.dir", value=str(run / name), rule="the report needs this file", fix=f"run `{command}`")
        for name, command in made_by.items()
        if not (run / name).is_file()
    ]
    if missing:
        raise UserError(missing)
    config_text = (run / "config.yaml").read_text(encoding="utf-8")
    metrics, unreadable = read_metrics(run / "metrics.jsonl")
    try:
        config = yaml.safe_load(config_text) or {}
    except yaml.YAMLError as error:
        raise _unreadable(run / "config.yaml", "YAML", made_by["config.yaml"]) from error
    try:
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise _unreadable(run / "result.json", "JSON", made_by["result.json"]) from error
    for name, value in (("config.yaml", config), ("result.json", result)):
        if not isinstance(value, dict):
            raise _unreadable(run / name, "one mapping", made_by[name])
    return RunRecord(run, config, config_text, metrics, unreadable, result, read_evaluation(run))


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the records of a metrics.jsonl sorted by step, and the number of lines that could not be read.

    A run that resumed from a checkpoint writes the steps after it again; the later line wins.
    """
    records: dict[tuple[str, int], dict[str, Any]] = {}
    unreadable = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            records[str(record["kind"]), int(record["step"])] = record
        except (ValueError, KeyError, TypeError):
            unreadable += 1
    return [records[key] for key in sorted(records, key=lambda key: (key[1], key[0]))], unreadable


def read_evaluation(run: Path) -> Evaluation:
    """Read and check RUN/report/evaluation.npz.

    Raises:
        UserError: the archive is unreadable, an array is missing, or shapes disagree.
    """
    path = run / "report" / "evaluation.npz"
    command = f"hopescale eval {run}"
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _unreadable(path, "an npz archive without pickled objects", command) from error
    optional = {"sample_frames"}
    absent = [name for name in Evaluation.__dataclass_fields__ if name not in arrays and name not in optional]
    if absent:
        raise _unreadable(path, f"complete (no array named {', '.join(absent)})", command)
    texts = {name: [str(text) for text in arrays[name]] for name in ("partitions", "sample_keys", "sample_partitions")}
    numbers = {name: arrays[name] for name in Evaluation.__dataclass_fields__ if name in arrays and name not in texts}
    rows, columns = (int(side) for side in numbers.pop("grid"))
    frames = numbers.pop("sample_frames", None)
    evaluation = Evaluation(**texts, **numbers, grid=(rows, columns), sample_frames=frames)
    _check_shapes(evaluation, path, command)
    return evaluation


def _check_shapes(evaluation: Evaluation, path: Path, command: str) -> None:
    partitions, horizons = len(evaluation.partitions), len(evaluation.horizons)
    samples = len(evaluation.sample_keys)
    truth = evaluation.sample_truth.shape
    broken = [name for name in _PER_HORIZON if getattr(evaluation, name).shape != (partitions, horizons)]
    broken += [
        name
        for name in _PER_STEP
        if getattr(evaluation, name).shape != (partitions, evaluation.one_step_error.shape[-1])
    ]
    if len(truth) != 4 or truth[0] != samples or truth[2] != evaluation.grid[0] * evaluation.grid[1]:
        broken.append("sample_truth")
    if evaluation.sample_prediction.shape != truth:
        broken.append("sample_prediction")
    if len(evaluation.sample_partitions) != samples:
        broken.append("sample_partitions")
    if evaluation.sample_frames is not None and (
        evaluation.sample_frames.ndim != 5 or evaluation.sample_frames.shape[:2] != truth[:2]
    ):
        broken.append("sample_frames")
    if evaluation.surprise.size and len(evaluation.surprise) != len(evaluation.surprise_blocks):
        broken.append("surprise")
    if evaluation.cms_active.size and evaluation.cms_active.shape[1:2] != evaluation.cms_periods.shape:
        broken.append("cms_active")
    if not partitions or not horizons:
        broken.append("partitions")
    if broken:
        raise _unreadable(path, f"consistent (shape of {', '.join(broken)})", command)


def _unreadable(path: Path, expected: str, command: str) -> UserError:
    return UserError(
        Problem(field="run.dir", value=str(path), rule=f"the file must be {expected}", fix=f"run `{command}` again")
    )
