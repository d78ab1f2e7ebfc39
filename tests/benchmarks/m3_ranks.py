"""Run by torchrun for `m3.py`: contenders take turns on sharded matrices; rank 0 writes what it saw as JSON."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from hopescale.optim.m3 import M3
from hopescale.optim.schema import OptimizerConfig
from hopescale.parallel.fsdp import shard_dim
from hopescale.parallel.process_group import end_process
from tests.benchmarks.m3_contenders import SHAPES, Step, gather, gradients, muon, ours
from tests.sharded import recorded_exchanges

PLACEMENTS = ("Shard(0)", "Shard(1)", "the longer side")


def main(out: Path, rounds: int) -> None:
    dist.init_process_group("gloo")
    seen = {
        "contenders": [contend(precision, place, rounds) for precision in ("fp32", "bf16") for place in PLACEMENTS],
        "against_one": [case for precision in ("fp32", "bf16") for case in against_one(precision, rounds)],
        "balance": balance(),
    }
    if dist.get_rank() == 0:
        out.write_text(json.dumps(seen))
    dist.destroy_process_group()


def config_of(precision: str, **plan: Any) -> OptimizerConfig:
    newton_schulz = {"precision": precision, "coefficients": "simple"}
    levels = [{"period": 1, "eta": 0.9, "theta": 0.1}]
    return OptimizerConfig.model_validate({"levels": levels, "newton_schulz": newton_schulz, "plan": plan})


def placed(placement: str) -> Callable[[torch.Tensor], torch.Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fixed = {"Shard(0)": 0, "Shard(1)": 1}.get(placement)

    def place(tensor: torch.Tensor) -> torch.Tensor:
        dim = shard_dim(tuple(tensor.shape), mesh.size()) if fixed is None else fixed
        return distribute_tensor(tensor.clone(), mesh, [Shard(dim)])

    return place


def parameters(place: Callable[[torch.Tensor], torch.Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(place(torch.zeros(shape))) for shape in SHAPES]


def contend(precision: str, placement: str, rounds: int) -> dict[str, Any]:
    """Seconds of each contender's step in each round, and what it communicates."""
    place, config = placed(placement), config_of(precision)
    grads = [place(gradient) for gradient in gradients()]
    own = parameters(place)
    contenders = {
        "ours": ours(own, grads, config),
        "muon": muon(parameters(place), grads, precision),
        "gather": gather(parameters(place), grads, config),
    }
    seconds = turns(list(contenders.values()), rounds, wall_seconds)
    (schedule,) = M3([{"params": own, "algorithm": "m3"}], config).schedules()
    with recorded_exchanges() as sent:
        contenders["ours"]()
    planned = sum(s.total[dist.get_rank()] for traffic in schedule.traffic for s in traffic)
    with CommDebugMode() as muons:
        contenders["muon"]()
    return {
        "precision": precision,
        "placement": placement,
        "plans": "+".join(dict.fromkeys(bucket.plan for bucket in schedule.buckets)),
        "seconds": dict(zip(contenders, seconds, strict=True)),
        "muon_collectives": muons.get_total_counts(),
        "collectives_a_bucket": len(sent) / len(schedule.buckets),
        "bytes_ratio": sum(sent) / planned,
    }


def against_one(precision: str, rounds: int) -> list[dict[str, Any]]:
    """Seconds of all ranks together against those of one rank that has everything, plus those of packing.

    Wall clock where every rank has a core to itself, else seconds of processors. Packing is what a sharded step without
    Newton-Schulz (which hands back what it is given) takes longer than an unsharded one without.
    """
    wall = dist.get_world_size() == 2
    place, config = placed("the longer side"), config_of(precision, strategy="owner")
    grads = gradients()
    sharded = ours(parameters(place), [place(gradient) for gradient in grads], config)
    alone = ours([nn.Parameter(torch.zeros(shape)) for shape in SHAPES], grads, config_of(precision))
    measure, clock = (wall_seconds, time.perf_counter) if wall else (processor_seconds, time.process_time)
    ranks = dist.get_world_size() if wall else 1
    together, packed = (
        ranks * statistics.median(times) for times in turns([sharded, without_iterating(sharded)], rounds, measure)
    )
    # One rank at a time: what one rank takes alone must not be measured beside others of its kind.
    single = bare = 1.0
    if dist.get_rank() == 0:
        single, bare = (
            statistics.median(times)
            for times in turns([alone, without_iterating(alone)], rounds, lambda step: seconds_of(step, clock))
        )
    dist.barrier()
    name = "wall-clock seconds" if wall else "processor seconds"
    return [{"precision": precision, "measure": name, "ratio": together / (single + max(packed - bare, 0.0))}]


def without_iterating(step: Step) -> Step:
    """The same step, with a Newton-Schulz that hands back what it is given."""

    def run() -> None:
        with patch("hopescale.optim.plans.whole.orthogonalise", lambda x, *_: x.float()):
            step()

    return run


def seconds_of(step: Step, clock: Callable[[], float]) -> float:
    began = clock()
    step()
    return clock() - began


def turns(steps: Sequence[Step], rounds: int, measure: Callable[[Step], float]) -> list[list[float]]:
    """What each step takes in each round, after one round that does not count; equal on all ranks."""
    found: list[list[float]] = [[] for _ in steps]
    for number in range(rounds + 1):
        for times, step in zip(found, steps, strict=True):
            taken = measure(step)
            if number:
                times.append(taken)
    return found


def wall_seconds(step: Step) -> float:
    """Of the slowest rank."""
    dist.barrier()
    began = time.perf_counter()
    step()
    return reduced(time.perf_counter() - began, dist.ReduceOp.MAX)


def processor_seconds(step: Step) -> float:
    """Of all ranks together."""
    dist.barrier()
    began = time.process_time()
    step()
    return reduced(time.process_time() - began, dist.ReduceOp.SUM)


def reduced(number: float, operation: Any) -> float:
    tensor = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(tensor, operation)
    return float(tensor)


def balance() -> float:
    """Operations of the busiest rank, an even share = 1."""
    place = placed("the longer side")
    (schedule,) = M3([{"params": parameters(place), "algorithm": "m3"}], config_of("fp32")).schedules()
    of_ranks = [sum(done) for done in zip(*schedule.flops, strict=True)]
    return max(of_ranks) / statistics.mean(of_ranks)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    main(Path(sys.argv[1]), int(sys.argv[2]))
    end_process(0)
