"""How well `hopescale plan` foresees the seconds of a step from steps on fewer ranks.

`python tests/benchmarks/plan.py [--rounds 3] [--hardware FILE] [--json FILE]` measures steps of several engines, models
and batches on 1, 2 and 4 gloo ranks of one thread each, in turns, fits rates of products, memory and the link to those
of 1 and 2 ranks, with what operators and collectives take to begin, and prints what they foresee of those of 4; with
`--hardware` also a file for `hopescale plan hardware=FILE`, with `--json` a list of {name, ratio, target, met}. Nothing
asserts these numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hopescale.config.compose import load_config
from hopescale.plan.hardware import PRESETS, Hardware, fit
from hopescale.plan.job import Job, job_of
from hopescale.plan.step_time import work_of
from tests.benchmarks.launched import launched
from tests.benchmarks.plan_ranks import CELLS, settings_of

RANKS = (1, 2, 4)
WITHIN = 0.15


def jobs(ranks: int, hardware: Hardware) -> dict[str, Job]:
    """What is measured, by settings."""
    return {
        cell: replace(job_of(load_config(settings_of(cell, ranks))), hardware=hardware)
        for cell in CELLS
        if ranks > 2 or "hsdp" not in cell
    }


def main() -> None:
    """Measure, fit, foresee and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hardware", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    base = replace(PRESETS["cpu"], devices=cores)
    # In turns: a neighbour that comes for a minute slows steps of every number of ranks, and the median leaves it out.
    rounds = [{ranks: launched(ranks, "plan_ranks.py", "2") for ranks in RANKS} for _ in range(arguments.rounds)]
    seconds = {
        ranks: {cell: statistics.median(each[ranks][cell] for each in rounds) for cell in rounds[0][ranks]}
        for ranks in RANKS
    }
    known = [
        (work_of(job.step), seconds[ranks][cell]) for ranks in RANKS[:-1] for cell, job in jobs(ranks, base).items()
    ]
    fitted = fit(base, known, RANKS[-2])
    print(
        f"fitted: {fitted.flops_fp32 / 1e9:.3g} GFLOP/s, {fitted.memory_bandwidth / 1e9:.3g} GB/s of memory, "
        f"{fitted.link_bandwidth / 1e9:.3g} GB/s and {fitted.link_latency * 1e6:.3g} us a collective, "
        f"{fitted.operator_latency * 1e6:.3g} us an operator, {cores} cores"
    )
    print(f"{'step':<58}{'measured':>11}{'foreseen':>11}{'ratio':>8}")
    table: list[dict[str, Any]] = []
    for ranks in RANKS:
        for cell, job in jobs(ranks, fitted).items():
            seen, foreseen = seconds[ranks][cell], job.time.total
            ratio, is_new = foreseen / seen, ranks == RANKS[-1]
            met = abs(ratio - 1) <= WITHIN if is_new else None
            table.append({"name": f"{cell}, {ranks} ranks", "ratio": ratio, "target": WITHIN, "met": met})
            print(f"{table[-1]['name']:<58}{seen:>9.3f} s{foreseen:>9.3f} s{ratio:>8.2f}  {'' if met is None else met}")
    new = [row["ratio"] for row in table if row["met"] is not None]
    print(
        f"{RANKS[-1]} ranks, foreseen / measured: median {statistics.median(new):.2f}, {min(new):.2f} to {max(new):.2f}"
    )
    if arguments.hardware is not None:
        arguments.hardware.write_text(json.dumps(asdict(fitted), indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
