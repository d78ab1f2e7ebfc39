"""A finished run made of discs sliding under friction: small, but its errors, pixels and features agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FRAMES, GRID, CHANNELS, SIDE = 8, 8, 24, 64
PARTITIONS = ("base", "ice", "walls", "scaling", "kinematics", "compositional")
FRICTION = {"base": 0.80, "ice": 0.98, "walls": 0.80, "scaling": 0.70, "kinematics": 0.85, "compositional": 0.95}


def layer_norm(features: np.ndarray) -> np.ndarray:
    centred = features - features.mean(axis=-1, keepdims=True)
    return (centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)).astype(np.float32)


def positions(partition: str, seed: int, error: float = 0.0) -> np.ndarray:
    """Return disc centres [F, 2] in units of the image side; `error` scales the speed wrongly."""
    random = np.random.default_rng(seed)
    place, angle = random.uniform(0.3, 0.45, 2), random.uniform(0.2, 1.2)
    velocity = random.uniform(0.10, 0.13) * np.array([np.cos(angle), np.sin(angle)]) * (1 - error)
    centres = [place]
    for _ in range(FRAMES - 1):
        centres.append(centres[-1] + velocity)
        if partition in ("walls", "compositional"):
            velocity = np.where((centres[-1] > 0.85) | (centres[-1] < 0.15), -velocity, velocity)
        velocity = velocity * FRICTION.get(partition, 0.8)
    return np.array(centres)


def render(centres: np.ndarray, size: float) -> np.ndarray:
    """Return uint8 pixels [F, SIDE, SIDE, 3]: a dark orange disc with a white mark on a pale table."""
    axis = (np.arange(SIDE) + 0.5) / SIDE
    y, x = np.meshgrid(axis, axis, indexing="ij")
    table = np.stack([0.86 - 0.05 * y, 0.88 - 0.04 * x, 0.84 + 0.02 * x], axis=-1)
    table = table - 0.03 * (((x * 8).astype(int) + (y * 8).astype(int)) % 2)[..., None]
    frames = []
    for cx, cy in centres:
        disc = 1 / (1 + np.exp((np.hypot(x - cx, y - cy) - size) * 120))[..., None]
        mark = 1 / (1 + np.exp((np.hypot(x - cx - size / 2.5, y - cy) - size / 4) * 120))[..., None]
        image = table * (1 - disc) + disc * np.array([0.80, 0.33, 0.12])
        frames.append(image * (1 - mark) + mark * 0.97)
    return (np.array(frames) * 255).astype(np.uint8)


def encode(centres: np.ndarray, size: float) -> np.ndarray:
    """Return LayerNormed features [F, N, E]: a fixed background plus a bump where the disc is."""
    random = np.random.default_rng(7)
    axis = (np.arange(GRID) + 0.5) / GRID
    y, x = np.meshgrid(axis, axis, indexing="ij")
    background = random.normal(size=CHANNELS) + 0.5 * (
        x[..., None] * random.normal(size=CHANNELS) + y[..., None] * random.normal(size=CHANNELS)
    )
    inside, edge = 3 * random.normal(size=CHANNELS), 2 * random.normal(size=CHANNELS)
    maps = []
    for cx, cy in centres:
        distance = np.hypot(x - cx, y - cy)[..., None]
        bump = np.exp(-((distance / (1.1 * size)) ** 2))
        ring = np.exp(-(((distance - 1.5 * size) / (0.7 * size)) ** 2))
        maps.append(background + bump * inside + ring * edge)
    return layer_norm(np.array(maps).reshape(len(centres), GRID * GRID, CHANNELS))


def l1(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return mean L1 per frame, [F]."""
    return np.abs(a - b).mean(axis=(1, 2))


def evaluation_arrays(
    partitions: tuple[str, ...] = PARTITIONS, pixels: bool = True, samples: int = 4
) -> dict[str, np.ndarray]:
    """Return every array of evaluation.npz, computed from simulated discs."""
    sizes = {name: 0.17 if name in ("scaling", "compositional") else 0.12 for name in partitions}
    errors: dict[str, list[np.ndarray]] = {}
    for index, name in enumerate(partitions):
        truth = encode(positions(name, index), sizes[name])
        scale = 0.12 + 0.02 * index

        def rollout(error: float, seed: int = index, name: str = name, truth: np.ndarray = truth) -> np.ndarray:
            return l1(encode(positions(name, seed, error), sizes[name]), truth)[1:]

        still = l1(np.diff(truth, axis=0), np.zeros_like(truth[1:]))
        errors.setdefault("rollout_error", []).append(rollout(scale) + 0.01)
        errors.setdefault("copy_last_error", []).append(l1(np.broadcast_to(truth[0], truth.shape), truth)[1:])
        errors.setdefault("mean_frame_error", []).append(l1(np.broadcast_to(truth.mean(0), truth.shape), truth)[1:])
        errors.setdefault("writes_off_rollout_error", []).append(rollout(scale * 1.8) + 0.012)
        errors.setdefault("shuffled_rollout_error", []).append(rollout(scale * 3.6) + 0.012)
        errors.setdefault("one_step_error", []).append(still * np.linspace(0.55, 0.35, FRAMES - 1))
        errors.setdefault("one_step_copy_last", []).append(still)
    arrays = {name: np.array(rows, dtype=np.float32) for name, rows in errors.items()}
    chosen = [partitions[index % len(partitions)] for index in (0, 1, 2, len(partitions) - 1)][:samples]
    truth = np.stack([encode(positions(name, index), sizes[name]) for index, name in enumerate(chosen)])
    wrong = np.stack([encode(positions(name, index, 0.16), sizes[name]) for index, name in enumerate(chosen)])
    prediction = layer_norm(0.8 * wrong + 0.2 * truth.mean(axis=1, keepdims=True))
    prediction[:, 0] = truth[:, 0]
    depth, decay = np.arange(3)[:, None], np.exp(-np.arange(FRAMES - 1) / 2.5)
    transitions = np.arange(1, FRAMES)
    periods = np.array([1, 3, 7])
    arrays |= {
        "horizons": np.arange(1, FRAMES),
        "partitions": np.array(partitions),
        "sample_keys": np.array([f"{name}-{index:06d}" for index, name in enumerate(chosen)]),
        "sample_partitions": np.array(chosen),
        "sample_truth": truth,
        "sample_prediction": prediction.astype(np.float32),
        "grid": np.array([GRID, GRID]),
        "surprise": (0.3 + 0.15 * depth + (0.9 - 0.2 * depth) * decay).astype(np.float32),
        "surprise_blocks": np.array([1, 3, 5]),
        "cms_active": np.stack([transitions % periods[:, None] == 0] * 3),
        "cms_periods": periods,
    }
    if pixels:
        clips = [render(positions(name, index), sizes[name]) for index, name in enumerate(chosen)]
        arrays["sample_frames"] = np.stack(clips)
    return arrays


def result_of(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return result.json for the arrays."""

    def scores(rows: slice) -> dict[str, Any]:
        one = float(arrays["one_step_error"][rows].sum() / arrays["one_step_copy_last"][rows].sum())
        far = float(arrays["rollout_error"][rows, -1].sum() / arrays["copy_last_error"][rows, -1].sum())
        off = float(arrays["writes_off_rollout_error"][rows, -1].sum() / arrays["rollout_error"][rows, -1].sum())
        shuffled = float(arrays["shuffled_rollout_error"][rows, -1].sum() / arrays["rollout_error"][rows, -1].sum())
        return {
            "skill_one_step": 1 - one,
            "skill_far": 1 - far,
            "skill_jump": 0.9 * (1 - far),
            "shuffled_ratio_one_step": 1.31,
            "shuffled_ratio_far": shuffled,
            "writes_off_ratio_one_step": 1.08,
            "writes_off_ratio_far": off,
            "baselines": {
                "copy_last_one_step": float(arrays["one_step_copy_last"][rows].mean()),
                "copy_last_far": float(arrays["copy_last_error"][rows, -1].mean()),
                "mean_frame_one_step": float(arrays["mean_frame_error"][rows].mean()),
                "mean_frame_far": float(arrays["mean_frame_error"][rows, -1].mean()),
            },
        }

    names = [str(name) for name in arrays["partitions"]]
    return scores(slice(None)) | {
        "seconds": {"data": 21.4, "train": 171.9, "evaluate": 9.8},
        "paths": {"checkpoint": "checkpoints/step-000000400"},
        "partitions": {name: scores(slice(index, index + 1)) for index, name in enumerate(names)},
        "run": {"name": "demo", "seed": 0, "command": "hopescale demo", "parameters": 1_234_567},
    }


CONFIG = """\
run: {name: demo, dir: runs/demo}
data: {path: data/demo, view: null}
model: {block_pattern: THTHTH, width: 128, memory: {heads: 4, scope: clip}, cms: {mode: token, levels: [1, 3, 7]}}
optimizer: {algorithm: m3, learning_rate: 0.003}
train: {steps: 400, global_batch: 32, seed: 0, eval_every: 100}
"""


def metrics_lines(steps: int = 400) -> list[str]:
    """Return training lines every second step and evaluations every hundred."""
    random = np.random.default_rng(0)
    lines = []
    for step in range(2, steps + 1, 2):
        noise = np.exp(0.05 * random.normal(size=2))
        teacher, jump = (0.22 + 0.6 * np.exp(-step / 60)) * noise[0], (0.34 + 0.5 * np.exp(-step / 90)) * noise[1]
        losses = {"loss": teacher + jump, "loss_teacher": teacher, "loss_jump": jump}
        lines.append(json.dumps({"kind": "train", "step": step, "time": 1.7e9 + step, **losses}))
        if step % 100 == 0:
            rise = 1 - np.exp(-step / 150)
            skills = {"skill_one_step": 0.5 * rise - 0.05, "skill_far": 0.62 * rise - 0.1, "skill_jump": 0.55 * rise}
            lines.append(json.dumps({"kind": "eval", "step": step, **skills}))
    return lines


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    return evaluation_arrays()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder shared by the tests of one file, which leave its inputs as they are."""
    return write_run(tmp_path_factory.mktemp("finished") / "run", evaluation_arrays())


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a run folder and returns its path."""

    def make(
        partitions: tuple[str, ...] = PARTITIONS, pixels: bool = True, samples: int = 4, **changes: np.ndarray
    ) -> Path:
        return write_run(tmp_path / "run", evaluation_arrays(partitions, pixels, samples), changes)

    return make


def write_run(run: Path, arrays: dict[str, np.ndarray], changes: dict[str, np.ndarray] | None = None) -> Path:
    """Write a run folder around the arrays of an evaluation; `changes` replace some of them on disk."""
    (run / "report").mkdir(parents=True)
    (run / "config.yaml").write_text(CONFIG)
    (run / "metrics.jsonl").write_text("\n".join(metrics_lines()) + "\n")
    (run / "result.json").write_text(json.dumps(result_of(arrays)))
    np.savez(run / "report" / "evaluation.npz", **(arrays | (changes or {})))  # pyright: ignore
    return run
