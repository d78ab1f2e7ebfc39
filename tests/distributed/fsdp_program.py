"""Run by torchrun: FSDP2 against the same steps on the whole, unsharded model. Rank 0 writes what it saw as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from data_pipeline.batch import ClipBatch, StepBatches
from data_pipeline.order import micro_batches
from hopescale.config.compose import load_config
from hopescale.config.schema import Config
from hopescale.model.init import initialise
from hopescale.model.predictor import HopePredictor
from hopescale.optim.m3 import M3
from hopescale.optim.routing import parameter_groups
from hopescale.parallel.engine import TorchEngine
from hopescale.parallel.process_group import choose_device, end_process, process_group, read_launch
from hopescale.train import build
from hopescale.train_step import micro_losses, objective_share, train_step
from tests.sharded import whole

NUM_STEPS = 4
GLOBAL_BATCH = 5  # divides neither by 2 nor by 4
OVERRIDES = [
    "model.encoder_dim=12",
    "model.grid=[2,3]",
    "model.frames=5",
    "model.state_dim=3",
    "model.width=24",
    "model.block_pattern=[S,H,T,H]",
    "model.memory.heads=2",
    "model.memory.hidden_multiplier=1.5",
    "model.attention.heads=2",
    "model.spatial_mixing=true",
    "objective.jump_horizons=2",
    "objective.jump_context=2",
    "objective.rollout={weight: 0.5, context: 2, steps: 3}",
    f"train.global_batch={GLOBAL_BATCH}",
    "train.micro_batch=2",
    f"train.steps={NUM_STEPS}",
    "optimizer.lr=1e-3",
    "optimizer.newton_schulz.precision=fp32",
    "optimizer.levels=[{period: 1, eta: 0.9, theta: 0.1},{period: 2, eta: 0.9, theta: 0.1}]",
]


def clips(config: Config, first: int, count: int) -> ClipBatch:
    """Clips of the global batch by place, the same on every rank; one of them is shorter."""
    model, places = config.model, torch.arange(first, first + count)
    drawn = [torch.Generator().manual_seed(1000 + int(place)) for place in places]

    def normal(*shape: int) -> Tensor:
        return torch.stack([torch.randn(*shape, generator=g) for g in drawn])

    return ClipBatch(
        features=3 * normal(model.frames, model.num_patches, model.encoder_dim),
        actions=normal(model.frames - 1, model.action_dim),
        states=normal(model.frames, model.state_dim),
        lengths=torch.where(places == 1, model.frames - 1, model.frames),
        weights=torch.ones(count),
        positions=places,
        keys=[str(int(place)) for place in places],
        partitions=["base"] * count,
    )


def batches(config: Config, step: int, rank: int, world_size: int) -> StepBatches:
    """A rank's micro-batches of one global batch, filled up with a clip of weight 0 where a rank has fewer."""
    micro = []
    for offset, count in micro_batches(GLOBAL_BATCH, rank, world_size, config.train.micro_batch or GLOBAL_BATCH):
        batch = clips(config, step * GLOBAL_BATCH + offset, max(count, 1))
        micro.append(batch if count else batch.without_weight())
    lengths = clips(config, step * GLOBAL_BATCH, GLOBAL_BATCH).lengths
    return StepBatches(step, lengths.numpy(), micro)


def backward(model: nn.Module, share: StepBatches, config: Config) -> dict[str, Tensor]:
    """Whole gradients of one global batch, without a step."""
    for micro in share.micro:
        objective_share(micro_losses(model, micro, config, 0), share, config).backward()
    gradients = {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def distance(a: Tensor, b: Tensor) -> float:
    """Relative Frobenius distance."""
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


def train(model: nn.Module, optimizer: M3, config: Config, rank: int, world_size: int) -> list[float]:
    losses = []
    for step in range(NUM_STEPS):
        share = batches(config, step, rank, world_size)
        objective = train_step(TorchEngine(model, optimizer), share, config, attempt=step, step=step).objective
        if world_size > 1:
            dist.all_reduce(objective)
        losses.append(float(objective))
    return losses


def main(out: Path, optimizer_file: str) -> None:
    launch = read_launch()
    config = load_config([*OVERRIDES, f"optimizer={optimizer_file}"])
    device = choose_device(config.parallel, launch)
    with process_group(config.parallel, launch, device):
        reference = HopePredictor(config.model)
        initialise(reference, config.train.seed)
        initial = {name: p.detach().clone() for name, p in reference.named_parameters()}
        reference_optimizer = M3(parameter_groups(reference.named_parameters(), config.optimizer), config.optimizer)
        reference_gradients = backward(reference, batches(config, 0, 0, 1), config)

        gradients: dict[str, dict[str, Tensor]] = {}
        sharded, optimizer = None, None
        for recompute in ("none", "block"):
            variant = load_config([*OVERRIDES, f"optimizer={optimizer_file}", f"parallel.recompute={recompute}"])
            engine = build(variant, device, launch.world_size)
            sharded, optimizer = engine.model, engine.optimizer
            gradients[recompute] = backward(sharded, batches(config, 0, launch.rank, launch.world_size), config)
        assert sharded is not None
        assert optimizer is not None

        reference_losses = train(reference, reference_optimizer, config, 0, 1)
        losses = train(sharded, optimizer, config, launch.rank, launch.world_size)
        weights = {name: whole(p.detach()) for name, p in sharded.named_parameters()}
        expected = dict(reference.named_parameters())
        parameters = list(sharded.parameters())
        seen = {
            "loss_error": max(abs(a - b) / abs(b) for a, b in zip(losses, reference_losses, strict=True)),
            "gradient_errors": {n: distance(g, reference_gradients[n]) for n, g in gradients["none"].items()},
            "weight_errors": {n: distance(w, expected[n].detach()) for n, w in weights.items()},
            "without_gradient": sorted(set(expected) - set(gradients["none"])),
            "recompute_differs": [n for n, g in gradients["none"].items() if not torch.equal(g, gradients["block"][n])],
            "never_moved": [n for n, w in weights.items() if torch.equal(w, initial[n])],
            "all_sharded": all(isinstance(p, DTensor) and p.placements[0].is_shard() for p in parameters),
            "state_sharded": all(
                isinstance(p, DTensor) and isinstance(t, DTensor) and t.placements == p.placements
                for p in parameters
                for key, t in optimizer.state[p].items()
                if key != "step"
            ),
            "local_share": sum(p.to_local().numel() for p in parameters if isinstance(p, DTensor))
            / sum(p.numel() for p in parameters),
        }
        if launch.is_first:
            out.write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
    end_process(0)
