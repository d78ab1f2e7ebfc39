"""Run by torchrun: slow groups on shards against whole parameters. Rank 0 writes what it saw as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from hopescale.checkpoint.contents import tensors
from hopescale.config.compose import load_config
from hopescale.model.init import initialise
from hopescale.model.predictor import HopePredictor
from hopescale.optim.m3 import M3
from hopescale.optim.routing import parameter_groups
from hopescale.parallel.process_group import choose_device, end_process, process_group, read_launch
from hopescale.train import build
from tests.distributed.fsdp_program import NUM_STEPS, OVERRIDES, distance, train
from tests.sharded import whole

SLOW = [
    "model.block_pattern=[S,H]",
    "model.cms.mode=param_period",
    # In four steps the first level fires twice; the second, and the memories, fire once and then wait.
    "model.cms.levels=[{period: 2, hidden_multiplier: 1.0},{period: 3, hidden_multiplier: 1.0}]",
    "optimizer.groups.titan.period=3",
]


def main(out: Path) -> None:
    launch = read_launch()
    config = load_config([*OVERRIDES, *SLOW])
    device = choose_device(config.parallel, launch)
    with process_group(config.parallel, launch, device):
        engine = build(config, device, launch.world_size)
        model, optimizer = engine.model, engine.optimizer
        train(model, optimizer, config, launch.rank, launch.world_size)
        reference = HopePredictor(config.model)
        initialise(reference, config.train.seed)
        groups = parameter_groups(reference.named_parameters(), config.optimizer, config.model.cms.parameter_periods)
        reference_optimizer = M3(groups, config.optimizer)
        train(reference, reference_optimizer, config, 0, 1)

        expected = tensors(reference, reference_optimizer)
        found = {name: whole(tensor) for name, tensor in tensors(model, optimizer).items()}
        sums = [t for s in optimizer.state.values() for n, t in s.items() if n == "period_sum"]
        seen = {
            "steps": NUM_STEPS,
            "groups": [group["name"] for group in optimizer.param_groups],
            "errors": {name: distance(found[name], expected[name]) for name in found},
            "waiting": sorted(n for n, t in found.items() if n.endswith("period_sum") and bool(t.any())),
            "sharded": all(isinstance(t, DTensor) and t.to_local().numel() < t.numel() for t in sums),
        }
        if launch.is_first:
            out.write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    end_process(0)
