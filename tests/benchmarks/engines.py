"""Speed of training under every engine, as ratios to copies on every rank (ddp), which take turns with it.

`python tests/benchmarks/engines.py [--rounds 5] [--json FILE]` trains a phase-5-shaped predictor of 5 M parameters and
256 tokens a frame on random clips, one a rank, on 2 and 4 gloo ranks of one thread each, and prints a table; then what
a step of the demo on 2 ranks spends beside computing. With `--json` also a file with a list of {name, ratio, target,
met}. Nothing asserts these numbers. Forward, backward and optimizer add up to the step; communication is what its
collectives take by themselves, wherever they run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from data_pipeline.shard import shard
from tests.benchmarks.launched import launched
from tests.feature_folders import write_features

TARGETS = {
    "fsdp": 0.95,
    "hsdp": 0.90,
    "deepspeed_zero1": 0.85,
    "deepspeed_zero2": 0.85,
    "deepspeed_zero3": 0.50,
}
SHARES = ("forward", "backward", "optimizer", "communication")
DEMO = ["train.steps=70", "train.eval_every=0", "checkpoint.every=0", "metrics.port=0", "metrics.tensorboard=false"]
BESIDE = 0.01
"""Most of a demo step that metrics and control may take."""


def measure(ranks: int, rounds: int) -> dict[str, Any]:
    """What the ranks saw, by engine."""
    engines = ["ddp", *(name for name in TARGETS if name != "hsdp" or ranks > 2)]
    seen = launched(ranks, "engines_ranks.py", str(rounds), *(f"parallel={name}" for name in engines))
    return {name.removeprefix("parallel="): each for name, each in seen.items()}


def beside_computing() -> list[dict[str, Any]]:
    """Shares of a step of the demo, read from real shards and recorded as ever."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        features = write_features(folder / "features", per_split=48, grid=(8, 8), channels=112, lengths=(8,))
        shard(features, folder / "data")
        settings = ["experiment=demo", f"data.path={folder / 'data'}", f"run.dir={folder / 'run'}", *DEMO]
        seen = launched(2, "demo_ranks.py", *settings)
    shares = {"data": seen["data"], "metrics and control": seen["metrics"] + seen["control"]}
    targets = {"metrics and control": BESIDE}
    return [
        {
            "name": f"demo, 2 ranks: {what} / step",
            "ratio": round(share, 4),
            "target": targets.get(what),
            "met": share <= targets[what] if what in targets else None,
        }
        for what, share in shares.items()
    ]


def rows(ranks: int, seen: dict[str, Any]) -> list[dict[str, Any]]:
    """One row an engine."""
    found = []
    for name, engine in seen.items():
        pairs = zip(seen["ddp"]["rounds"], engine["rounds"], strict=True)
        ratio, target = statistics.median(ddp / own for ddp, own in pairs), TARGETS.get(name)
        found.append(
            {
                "name": f"{name}, {ranks} ranks",
                "ratio": round(ratio, 3),
                "target": target,
                "met": None if target is None else ratio >= target,
                "clips_per_second": round(engine["clips_per_second"], 3),
                "shares": {what: round(engine["shares"][what], 3) for what in SHARES},
            }
        )
    return found


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    table = [row for ranks in (2, 4) for row in rows(ranks, measure(ranks, arguments.rounds))]
    print(f"{'engine':<26}{'clips/s':>9}{'to ddp':>8}{'target':>8}  met  " + "".join(f"{what:>14}" for what in SHARES))
    for row in table:
        target = "" if row["target"] is None else f">= {row['target']:.2f}"
        met = {None: "", True: "yes", False: "NO"}[row["met"]]
        shares = "".join(f"{row['shares'][what]:>14.0%}" for what in SHARES)
        print(f"{row['name']:<26}{row['clips_per_second']:>9.2f}{row['ratio']:>8.2f}{target:>8}  {met:<3}  {shares}")
    beside = beside_computing()
    for row in beside:
        limit = "" if row["met"] is None else f"<= {row['target']:g}  {'yes' if row['met'] else 'NO'}"
        print(f"{row['name']:<42}{row['ratio']:>8.2%}  {limit}")
    table += beside
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
