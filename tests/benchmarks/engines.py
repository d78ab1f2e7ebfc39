"""Speed of training under every engine, as ratios to copies on every rank (ddp), which take turns with it.

`python tests/benchmarks/engines.py [--rounds 5] [--json FILE]` trains a phase-5-shaped predictor of 5 M parameters on
random clips, two a rank, on 2 and 4 gloo ranks of one thread each, and prints a table; with `--json` also a file with a
list of {name, ratio, target, met}. Nothing asserts these numbers. Batches lie in memory: what reading costs is in
`data.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPO_ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("engines_ranks.py")
TARGETS = {
    "fsdp": 0.95,
    "hsdp": 0.90,
    "deepspeed_zero1": 0.85,
    "deepspeed_zero2": 0.85,
    "deepspeed_zero3": 0.50,
}
SHARES = ("forward", "backward", "optimizer", "communication")


def measure(ranks: int, rounds: int) -> dict[str, Any]:
    """What the ranks saw, by engine."""
    engines = ["ddp", *(name for name in TARGETS if name != "hsdp" or ranks > 2)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seen.json"
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
        command += [str(PROGRAM), str(out), str(rounds), *(f"parallel={name}" for name in engines)]
        environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=REPO_ROOT, env=environment, check=True)
        return {name.removeprefix("parallel="): seen for name, seen in json.loads(out.read_text()).items()}


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
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
