"""Trains a table of configurations, each with several seeds, and keeps one small JSON file a run.

`python tests/benchmarks/ablations.py [--only 'demo/*'] [--seeds 0 1 2] [--ranks 2] [--list]` makes the clips it needs,
once, and trains what has no file yet: stop it at any time and start it again. A run of the demo's size takes about four
minutes on two cores. `step_cost.py` times the steps, and `ablation_report.py` draws what both have kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from hopescale.config.compose import load_config
from hopescale.config.schema import Config
from hopescale.demo import make_clips, train_ranks
from hopescale.errors import ConfigError, Problem, UserError, describe
from hopescale.evaluate import SKILLS
from hopescale.evaluate_run import evaluate_run
from hopescale.model.flops import flops_executed
from hopescale.report.evaluation import read_metrics
from hopescale.run_folder import RunFolder
from tests.benchmarks.ablation_results import RESULTS, keep
from tests.benchmarks.ablation_rows import DATA, ROWS, Row

DIGITS = 5

Bar = Callable[[str], Callable[[int, int], None]]


def chosen_rows(patterns: list[str] | None) -> list[Row]:
    """Rows whose `group/name` fits one of the patterns; all of them without any.

    Raises:
        SystemExit: a pattern fits none.
    """
    for pattern in patterns or ():
        if not any(fnmatchcase(row.label, pattern) for row in ROWS):
            sys.exit(f"--only {pattern}: no row is called so; see --list")
    return [row for row in ROWS if not patterns or any(fnmatchcase(row.label, pattern) for pattern in patterns)]


def unusable(rows: list[Row]) -> Iterator[tuple[Row, str]]:
    """Rows that cannot or need not be trained, and why."""
    first = {row.group: row for row in reversed(ROWS)}
    for row in rows:
        try:
            changed = row.differences() != first[row.group].differences()
        except ConfigError as error:
            yield row, describe(error)
        else:
            if not changed and row != first[row.group]:
                yield row, f"is {first[row.group].label} itself"


def common_settings(row: Row, seed: int, steps: int | None, eval_every: int) -> list[str]:
    """Everything that decides a run's figures, and is kept with them."""
    length = [] if steps is None else [f"train.steps={steps}"]
    # Logged when evaluated, so that every evaluation has a training time.
    return [
        *row.settings,
        f"train.seed={seed}",
        *length,
        f"train.eval_every={eval_every}",
        f"metrics.every={eval_every}",
    ]


def result_path(results: Path, row: Row, seed: int) -> Path:
    """Where the figures of one run are kept."""
    return results / row.group / f"{row.name}-seed{seed}.json"


def train(row: Row, settings: list[str], data: Path, run: Path, ranks: int) -> dict[str, Any]:
    """Train and evaluate one run, from the start, and return its figures.

    Args:
        row: what is trained.
        settings: of the run, as from `common_settings`.
        data: data set.
        run: folder for the run; what an interrupted one left there is thrown away.
        ranks: processes that train.

    Raises:
        UserError: it cannot be trained.
    """
    shutil.rmtree(run, ignore_errors=True)
    # One checkpoint, at the end, and nobody who asks for metrics meanwhile: neither changes a figure.
    plain = load_config(settings).train
    if plain.steps % plain.eval_every:
        rule = f"must divide train.steps={plain.steps}, or the curve ends before the run"
        raise ConfigError(Problem("train.eval_every", plain.eval_every, rule, "give another --eval-every"))
    every = f"checkpoint.every={plain.steps}"
    places = [f"data.path={data}", f"run.dir={run}", every, "metrics.listen=off", "metrics.tensorboard=false"]
    config = load_config([*settings, *places])
    load_before = os.getloadavg()[0]
    train_ranks(run, ranks, [*settings, *places])
    load_after = os.getloadavg()[0]
    result = evaluate_run(run, [])
    return {
        "settings": settings,
        "differences": row.differences(),
        "ranks": ranks,
        "torch": torch.__version__,
        "load": [round(load_before, 2), round(load_after, 2)],
        "parameters": result["run"]["parameters"],
        "flops_executed": step_flops(config) / config.train.global_batch,
        "curve": curve(RunFolder(run).metrics),
        "result": rounded({k: v for k, v in result.items() if k not in ("seconds", "paths", "run")}),
    }


def step_flops(config: Config) -> float:
    """FLOPs of one optimizer step on clips of full length, the optimizer's own left out."""
    clip = flops_executed(config.model, config.objective, config.model.frames, config.parallel.recompute)
    return config.train.global_batch * clip.total


def curve(metrics: Path) -> dict[str, list[float | None]]:
    """Columns of equal length: step and seconds of training so far, loss since the last row, and held-out skills.

    Args:
        metrics: a metrics.jsonl in which every evaluated step was logged too.
    """
    records, _ = read_metrics(metrics)
    logged = {record["step"]: record for record in records if record["kind"] == "train"}
    columns: dict[str, list[float | None]] = {}
    for record in records:
        if record["kind"] == "eval":
            beside = logged[record["step"]]
            row = {"step": record["step"], "train_seconds": beside["train_seconds_total"], "loss": beside["loss"]}
            for name, value in (row | {skill: record.get(skill) for skill in SKILLS}).items():
                columns.setdefault(name, []).append(rounded(value))
    return columns


def rounded(value: Any) -> Any:
    """The same JSON value with floats of few digits."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return round(value, DIGITS) if isinstance(value, float) else value


def make_data(name: str, divisor: int, root: Path, bar: Bar) -> Path:
    """The data set of a key of `DATA`, with so many times fewer clips; made if it is not there."""
    spec = DATA[name]
    if divisor > 1:
        train, heldout = (max(count // divisor, 1) for count in (spec.num_train, spec.num_heldout))
        spec, name = replace(spec, num_train=train, num_heldout=heldout), f"{name}-{divisor}"
    return make_clips(spec, root, name, bar, {}, [])[1].absolute()


def stored(path: Path, settings: list[str]) -> bool:
    """Whether a run's figures are there.

    Raises:
        SystemExit: they are of other settings.
    """
    if not path.is_file():
        return False
    kept = json.loads(path.read_text())["settings"]
    if kept != settings:
        odd = sorted({*kept} ^ {*settings})
        sys.exit(f"{path} is of other settings ({', '.join(odd)}): delete it, or name another folder with --results")
    return True


def show(rows: list[Row], seeds: list[int], results: Path) -> None:
    """Print what there is to train, and what is done."""
    why = {row.label: reason for row, reason in unusable(rows)}
    for row in rows:
        done = [str(seed) for seed in seeds if result_path(results, row, seed).is_file()]
        state = why[row.label] if row.label in why else f"done: {' '.join(done) or '-'}"
        print(f"{row.label:<24} {' '.join(row.settings):<72} {state}")


def run_queue(rows: list[Row], arguments: argparse.Namespace, bar: Bar) -> int:
    """Train what is missing, all rows with one seed before the next, and return the exit code."""
    refused = dict(unusable(rows))
    failed = 0
    for row, reason in refused.items():
        print(f"left out {row.label}: {reason}", file=sys.stderr)
    for seed in arguments.seeds:
        for row in rows:
            settings = common_settings(row, seed, arguments.steps, arguments.eval_every)
            kept = result_path(arguments.results, row, seed)
            if row in refused or stored(kept, settings):
                continue
            print(f"== {row.label} seed {seed}", flush=True)
            run = arguments.runs.absolute() / row.group / f"{row.name}-seed{seed}"
            try:
                data = make_data(row.data, arguments.divide_clips, arguments.data, bar)
                figures = train(row, settings, data, run, arguments.ranks)
            except UserError as error:
                print(f"{row.label} seed {seed} failed: {describe(error)}", file=sys.stderr)
                failed += 1
                continue
            keep(kept, {"group": row.group, "name": row.name, "seed": seed, **figures})
            if not arguments.keep_runs:
                shutil.rmtree(run)
    # A row that equals its group's first is no failure.
    return 1 if failed or any(not reason.endswith("itself") for reason in refused.values()) else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="GROUP/NAME", help="row, or pattern like 'hidden/*'")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="optimizer steps; the experiment's own if left out")
    parser.add_argument("--eval-every", type=int, default=25, help="steps between two points of a curve")
    parser.add_argument("--ranks", type=int, choices=[1, 2], default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--data", type=Path, default=Path("data/demo"), help="folder of all clips, shared with the demo"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"), help="folder for runs while they train")
    parser.add_argument("--keep-runs", action="store_true", help="keep run folders")
    parser.add_argument("--divide-clips", type=int, default=1, metavar="N", help="train on N times fewer clips, to try")
    parser.add_argument("--list", action="store_true", help="print rows and what is done, train nothing")
    return parser.parse_args()


def main() -> None:
    """Train what is missing, or list it."""
    from hopescale.cli import progress

    arguments = parse()
    rows = chosen_rows(arguments.only)
    if arguments.list:
        show(rows, arguments.seeds, arguments.results)
    else:
        sys.exit(run_queue(rows, arguments, progress))


if __name__ == "__main__":
    main()
