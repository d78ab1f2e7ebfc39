"""What a step of M3 costs beside other ways to orthogonalise sharded matrices, and what it would on more ranks.

`python tests/benchmarks/m3.py [--rounds 7] [--json]` runs on 2, 3 and 4 gloo ranks of one thread each, all contenders
taking turns in one process group, on the CMS and projection matrices of two blocks of `experiment=phase4`. Nothing
asserts these numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch

from hopescale.config.compose import load_config
from hopescale.optim.schema import OptimizerConfig
from hopescale.plan.optimizer import plan_optimizer
from hopescale.plan.spread import Spread, model_of
from tests.benchmarks.launched import launched
from tests.benchmarks.m3_contenders import SHAPES, gradients, ours
from tests.benchmarks.turns import ratio_in_turns

MODELS = {"43 M": "phase4", "1 B": "hope_1b", "2 B": "hope_2b"}
WORLDS = ((8, 1), (64, 1), (512, 1), (8, 8), (8, 64))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one object as the last line")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rows = levels(arguments.rounds)
    for ranks in (2, 3, 4):
        rows += on_ranks(ranks, arguments.rounds)
    print(f"{'what':<88}{'ratio':>8}  {'target':<10}met")
    for row in rows:
        met = "" if row["met"] is None else "yes" if row["met"] else "NO"
        print(f"{row['name']:<88}{row['ratio']:>8.3g}  {row['target']:<10}{met}")
    print(f"\n{on_paper()}")
    if arguments.json:
        print(json.dumps(rows))


def row(name: str, ratio: float, target: str = "") -> dict[str, Any]:
    """One line of the table; a target is like '<= 1.2'."""
    sign, _, bound = target.partition(" ")
    met = None if not target else ratio <= float(bound) if sign == "<=" else ratio >= float(bound)
    return {"name": name, "ratio": ratio, "target": target, "met": met}


def levels(rounds: int) -> list[dict[str, Any]]:
    """A step with four time scales against one with one, unsharded."""
    found = []
    for precision in ("fp32", "bf16"):
        steps = []
        for periods in ((1, 4, 16, 64), (1,)):
            config = OptimizerConfig.model_validate(
                {
                    "levels": [{"period": period} for period in periods],
                    "newton_schulz": {"precision": precision},
                }
            )
            steps.append(ours([torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES], gradients(), config))
        found.append(
            row(f"one rank, {precision}: four levels / one level", ratio_in_turns(steps[0], steps[1], rounds), "<= 1.2")
        )
    return found


def on_ranks(ranks: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of a torchrun of `m3_ranks.py`."""
    seen = launched(ranks, "m3_ranks.py", str(rounds))
    found = []
    for case in seen["contenders"]:
        where = f"{ranks} ranks, {case['precision']}, {case['placement']}"
        ours_, muon, gather = (case["seconds"][name] for name in ("ours", "muon", "gather"))
        muon_ratio = statistics.median(a / b for a, b in zip(muon, ours_, strict=True))
        gather_ratio = statistics.median(a / b for a, b in zip(gather, ours_, strict=True))
        target = ">= 4" if ranks == 4 or (ranks == 2 and case["precision"] == "bf16") else ">= 2" if ranks == 2 else ""
        found.append(row(f"{where}: torch.optim.Muon / M3 ({case['plans']})", muon_ratio, target))
        found.append(row(f"{where}: a gather a matrix / M3", gather_ratio, ">= 1.3" if ranks == 4 else ""))
        found.append(row(f"{where}: collectives of torch.optim.Muon a step", case["muon_collectives"]))
        found.append(row(f"{where}: collectives of M3 a bucket", case["collectives_a_bucket"], "<= 2"))
        found.append(row(f"{where}: bytes sent / those planned", case["bytes_ratio"], "<= 1"))
    for case in seen["against_one"]:
        name = f"{ranks} ranks, {case['precision']}: {case['measure']} of all ranks / (unsharded + packing)"
        found.append(row(name, case["ratio"], "<= 1.15"))
    found.append(row(f"{ranks} ranks: operations of the busiest rank / an even share", seen["balance"], "<= 1.1"))
    return found


def on_paper() -> str:
    """Bytes and FLOPs of the busiest rank on machines nobody has here, from the optimizer's own planner."""
    numbers = f"{'exchanges':>10}{'GFLOP':>10}{'of an even share':>18}{'MiB sent':>11}"
    lines = [f"{'parameters':<16}{'ranks':<10}{'plan':<14}{numbers}"]
    for name, experiment in MODELS.items():
        for shards, copies in WORLDS:
            arranged = [f"parallel.shard={shards}", f"parallel.replicate={copies}"]
            config = load_config([f"experiment={experiment}", "optimizer=m3", *arranged])
            figures, _ = plan_optimizer(Spread(config, model_of(config), shards * copies))
            total = figures["total"]
            plans = "+".join(dict.fromkeys(bucket["plan"] for bucket in figures["buckets"]))
            ranks = f"{shards}" if copies == 1 else f"{shards} x {copies}"
            share = total["flops"] * shards * copies / total["flops_of_all_ranks"]
            model = f"{experiment}, {name}"
            lines.append(
                f"{model:<16}{ranks:<10}{plans:<14}{total['exchanges']:>10}{total['flops'] / 1e9:>10.2f}"
                f"{share:>18.2f}{total['bytes_sent'] / 2**20:>11.2f}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
