"""Run by torchrun: steps of every engine, taking turns in one process group. Rank 0 writes what it saw as JSON."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from data_pipeline.batch import StepBatches
from hopescale.config.compose import load_config
from hopescale.config.schema import Config
from hopescale.parallel.engine import Engine
from hopescale.parallel.process_group import choose_device, end_process, process_group, read_launch
from hopescale.train import build
from hopescale.train_step import train_step
from tests.clip_batches import clips_for, step_of
from tests.presets import PHASE_5_OF_5M

# As many tokens as the encoder gives: how much communication weighs depends on them.
MODEL = [*PHASE_5_OF_5M, "model.grid=[16,16]", "train.micro_batch=1", "train.steps=1000"]
CLIPS = 1
"""Of a rank in a step."""
REPEATS = 5


@dataclass
class Timed:
    """An engine whose calls are timed."""

    engine: Engine
    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "backward": 0.0, "optimizer": 0.0})
    _began: float = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def begin_micro_batch(self, *, last: bool) -> None:
        self.engine.begin_micro_batch(last=last)
        self._began = time.perf_counter()

    def backward(self, objective: torch.Tensor) -> None:
        now = time.perf_counter()
        self.seconds["forward"] += now - self._began
        self.engine.backward(objective)
        self.seconds["backward"] += time.perf_counter() - now

    def step(self, update: Any) -> None:
        with self._into("optimizer"):
            self.engine.step(update)

    @contextmanager
    def _into(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - began


class Collectives(TorchDispatchMode):
    """Keeps the collectives that run while it is on, with tensors of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls.append((func, *tree_map_only(Tensor, torch.zeros_like, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))

    def run(self) -> None:
        """All of them again, one after the other."""
        for func, args, kwargs in self.calls:
            for work in tree_leaves(func(*args, **kwargs)):
                if not isinstance(work, Tensor):
                    work.wait()


def communication(engine: Any, batch: StepBatches, config: Config) -> float:
    """Seconds that the collectives of a step take by themselves, no rank waiting for what another one computes."""
    with Collectives() as seen:
        train_step(engine, batch, config, attempt=0, step=0)
    spent = []
    for _ in range(REPEATS):
        dist.barrier()
        began = time.perf_counter()
        seen.run()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


def main(out: Path, rounds: int, names: list[str]) -> None:
    launch = read_launch()
    configs = {
        name: load_config([*MODEL, f"train.global_batch={CLIPS * launch.world_size}", *name.split()]) for name in names
    }
    first = next(iter(configs.values()))
    device = choose_device(first.parallel, launch)
    with process_group(first.parallel, launch, device):
        engines = {name: Timed(build(config, device, launch.world_size)) for name, config in configs.items()}
        batch = step_of(clips_for(first.model, CLIPS))
        batch = StepBatches(0, batch.lengths.repeat(launch.world_size), batch.micro)
        times: dict[str, list[float]] = {name: [] for name in names}
        for number in range(rounds + 1):
            for name, engine in engines.items():
                if number == 1:
                    engine.seconds = dict.fromkeys(engine.seconds, 0.0)
                dist.barrier()
                began = time.perf_counter()
                train_step(cast(Engine, engine), batch, configs[name], attempt=number, step=number)
                dist.barrier()
                if number:
                    times[name].append(time.perf_counter() - began)
        seen = {}
        for name, engine in engines.items():
            step = statistics.median(times[name])
            shares = {what: spent / sum(times[name]) for what, spent in engine.seconds.items()}
            talking = communication(engine, batch, configs[name])
            seen[name] = {
                "rounds": times[name],
                "clips_per_second": CLIPS * launch.world_size / step,
                "shares": shares | {"communication": talking / step},
                "parameters": sum(p.numel() for group in engine.optimizer.param_groups for p in group["params"]),
            }
    if launch.is_first:
        out.write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    end_process(0)
