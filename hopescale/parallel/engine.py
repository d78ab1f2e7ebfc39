"""What a training step asks of whoever spreads the model over ranks: the same few calls of FSDP2 and of DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hopescale.config.schema import Config
from hopescale.model.build import Predictor
from hopescale.optim.m3 import M3
from hopescale.optim.routing import parameter_groups

from .fsdp import free_gathered, reduce_gradients_in_backward, shard_model
from .materialise import materialise
from .mesh import SHARDS, build_mesh, degrees_of


class Engine(Protocol):
    """A model spread over ranks, and its optimizer."""

    model: nn.Module
    """To be called; its parameters may be whole, pieces, or nothing but placeholders."""
    optimizer: M3
    """Over the parameters as this rank holds them; gradients are there within `step`."""
    shards: int
    """Ranks that hold one copy of the parameters between them."""
    shard_group: dist.ProcessGroup | None
    """Those ranks; None where each holds all."""

    def begin_micro_batch(self, *, last: bool) -> None:
        """Say that a forward and backward come, and whether they are the last of their step."""
        ...

    def backward(self, objective: Tensor) -> None:
        """Add the gradients of a micro-batch; those of the last one are summed over ranks."""
        ...

    def step(self, update: Callable[[], None]) -> None:
        """Run an update of the parameters while their gradients are in `.grad`, and drop the gradients.

        An engine that finds gradients that are not finite by itself may leave `update` out, on all ranks.
        """
        ...

    def finish_evaluation(self) -> None:
        """Free what forwards without backward have gathered."""
        ...

    def take_loaded(self) -> None:
        """Take over parameters that a checkpoint was loaded into."""
        ...


class TorchEngine:
    """FSDP2, HSDP or copies on every rank; also a plain model on one rank alone."""

    def __init__(self, model: nn.Module, optimizer: M3) -> None:
        """Take a model, sharded or not, and an optimizer over its parameters."""
        self.model, self.optimizer = model, optimizer
        self.shards, self.shard_group = _shards_of(model)

    def begin_micro_batch(self, *, last: bool) -> None:
        """See `Engine`."""
        reduce_gradients_in_backward(self.model, last)

    def backward(self, objective: Tensor) -> None:
        """See `Engine`."""
        objective.backward()

    def step(self, update: Callable[[], None]) -> None:
        """See `Engine`."""
        update()
        self.optimizer.zero_grad(set_to_none=True)

    def finish_evaluation(self) -> None:
        """See `Engine`."""
        free_gathered(self.model)

    def take_loaded(self) -> None:
        """See `Engine`: they were loaded in place."""


def open_engine(model: Predictor, config: Config, device: torch.device, world_size: int) -> Engine:
    """Spread a model over all ranks as `parallel` says, and make its optimizer.

    Args:
        model: A predictor built inside `parameters_on_meta`, to be given its first numbers; has `blocks`.
        config: Of the run.
        device: Where it is to be.
        world_size: Ranks.
    """
    degrees = degrees_of(config.parallel, world_size)
    if config.parallel.engine == "deepspeed":
        from .deepspeed import DeepSpeedEngine

        materialise(model, device, config.train.seed)
        return DeepSpeedEngine(model, config, device)
    shard_model(model, list(model.blocks), build_mesh(device, degrees), config.parallel)
    materialise(model, device, config.train.seed)
    groups = parameter_groups(model.named_parameters(), config.optimizer, config.model.cms.parameter_periods)
    return TorchEngine(model, M3(groups, config.optimizer))


def _shards_of(model: nn.Module) -> tuple[int, dist.ProcessGroup | None]:
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            if SHARDS not in (mesh.mesh_dim_names or ()):
                return 1, None
            return mesh[SHARDS].size(), mesh.get_group(SHARDS)
    return 1, None
