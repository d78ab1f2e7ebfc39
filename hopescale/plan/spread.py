"""How an engine spreads the parameters of a model over ranks, in numbers alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from hopescale.config.schema import Config
from hopescale.model.build import build_predictor
from hopescale.optim.flat_piece import cut
from hopescale.optim.routing import parameter_groups
from hopescale.optim.shard_map import Layout, Team, flat_ranges, sharded, whole
from hopescale.parallel.deepspeed import KEPT_WHOLE, ZERO_ALIGNMENT
from hopescale.parallel.fsdp import shard_dim
from hopescale.parallel.mesh import Degrees, degrees_of

NUMBER_BYTES = 4
"""Of a parameter, a gradient, a number of optimizer state."""
UNEVEN = 1.1
"""Times an even share from which on padding is worth a line."""


class Parameter(NamedTuple):
    """One parameter of the model."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Numbers of the whole."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Model:
    """The parameters of a predictor, and the optimizer's groups of them."""

    parameters: tuple[Parameter, ...]
    """In the model's order."""
    groups: tuple[dict[str, Any], ...]
    """Of the optimizer; their `params` are on the meta device."""
    num_blocks: int

    @property
    def numel(self) -> int:
        """Numbers of all parameters."""
        return sum(parameter.numel for parameter in self.parameters)

    @cached_property
    def blocks(self) -> list[list[Parameter]]:
        """Parameters of each block."""
        return [[p for p in self.parameters if p.name.startswith(f"blocks.{n}.")] for n in range(self.num_blocks)]

    @cached_property
    def block_numels(self) -> list[int]:
        """Numbers of each block."""
        return [sum(p.numel for p in block) for block in self.blocks]

    @cached_property
    def ends(self) -> list[Parameter]:
        """Parameters of no block."""
        return [p for p in self.parameters if not p.name.startswith("blocks.")]


def model_of(config: Config) -> Model:
    """The model of a configuration, built on the meta device.

    Raises:
        ConfigError: as `parameter_groups` says.
    """
    with torch.device("meta"):
        predictor = build_predictor(config.model)
    groups = parameter_groups(predictor.named_parameters(), config.optimizer, config.model.cms.parameter_periods)
    named = tuple(Parameter(name, tuple(p.shape)) for name, p in predictor.named_parameters() if p.requires_grad)
    return Model(named, tuple(groups), len(predictor.blocks))


@dataclass(frozen=True)
class Spread:
    """A model over some ranks, as `parallel` says."""

    config: Config
    model: Model
    world_size: int

    @cached_property
    def degrees(self) -> Degrees:
        """Copies, and ranks that hold one between them.

        Raises:
            ConfigError: they do not arrange so many ranks.
        """
        return degrees_of(self.config.parallel, self.world_size)

    @property
    def engine(self) -> str:
        """fsdp, ddp or zero0 to zero3; fsdp on one rank alone is ddp, as nothing is sharded."""
        parallel = self.config.parallel
        if parallel.engine == "deepspeed":
            return f"zero{parallel.zero_stage}"
        return "ddp" if self.degrees.shard == 1 else "fsdp"

    @property
    def team(self) -> Team:
        """As M3 sees the ranks."""
        if self.degrees.shard == 1:
            return Team.of_copies(self.world_size) if self.world_size > 1 else Team.of_one()
        return Team.of_shards(self.degrees.shard, self.degrees.replicate)

    def layouts(self, parameters: Sequence[Parameter]) -> list[Layout]:
        """Where the pieces of some parameters of at least two dims lie."""
        shards = self.degrees.shard
        if shards == 1:
            return [whole(p.name, p.shape) for p in parameters]
        if self.engine == "fsdp":
            return [sharded(p.name, p.shape, [(shard_dim(p.shape, shards), shards)]) for p in parameters]
        return [flat_ranges(p.name, p.shape, self.zero_ranges[p.name]) for p in parameters]

    @cached_property
    def zero_ranges(self) -> dict[str, list[tuple[int, int, int]]]:
        """Parameter -> rank -> (start, stop, offset in the rank's flat buffer), as ZeRO 1 to 3 cut them."""
        return dict(self._zero_3() if self.engine == "zero3" else self._zero_1_and_2())

    def _zero_1_and_2(self) -> Iterator[tuple[str, list[tuple[int, int, int]]]]:
        part, first = self.padded // self.world_size, 0
        for parameter in self.model.parameters:
            placed = cut(first, parameter.numel, part, self.world_size)
            yield parameter.name, [(*held, at) for held, at in zip(*placed, strict=True)]
            first += parameter.numel

    def _zero_3(self) -> Iterator[tuple[str, list[tuple[int, int, int]]]]:
        offset = 0
        for parameter in self.model.parameters:
            part = -(-parameter.numel // self.world_size)
            yield parameter.name, [(*held, offset) for held in cut(0, parameter.numel, part, self.world_size).ranges]
            offset += part

    @property
    def padded(self) -> int:
        """Numbers of the flat buffer that ZeRO 1 and 2 cut into equal parts."""
        unit = ZERO_ALIGNMENT * self.world_size
        return -(-self.model.numel // unit) * unit

    def held(self, parameters: Sequence[Parameter], times: Sequence[int] | None = None) -> int:
        """Numbers that the rank with most holds of some parameters, padding included; of each so many tensors."""
        shards, counts = self.degrees.shard, times or [1] * len(parameters)
        if shards == 1:
            return sum(n * p.numel for n, p in zip(counts, parameters, strict=True))
        if self.engine == "fsdp":
            return sum(n * _padded_shard(p.shape, shards) for n, p in zip(counts, parameters, strict=True))
        if self.engine == "zero3":
            return sum(n * -(-p.numel // self.world_size) for n, p in zip(counts, parameters, strict=True))
        ranges = [(n, self.zero_ranges[p.name]) for n, p in zip(counts, parameters, strict=True)]
        return max(sum(n * (r[rank][1] - r[rank][0]) for n, r in ranges) for rank in range(self.world_size))

    @property
    def padding(self) -> float:
        """Times an even share that the rank with most holds of the parameters, with what fills them up."""
        return self.held(self.model.parameters) * self.degrees.shard / self.model.numel

    def uneven_shards(self) -> str | None:
        """What to say where many ranks share parameters whose dims they do not divide, and what to do about it."""
        if self.padding <= UNEVEN or self.engine != "fsdp":
            return None
        shards = self.degrees.shard
        said = f"a rank holds and sends {self.padding:.1f} times an even share: {shards} shards do not divide most"
        for fewer in (n for n in range(shards - 1, 1, -1) if self.world_size % n == 0):
            parallel = self.config.parallel.model_copy(update={"shard": fewer, "replicate": None})
            config = self.config.model_copy(update={"parallel": parallel})
            if Spread(config, self.model, self.world_size).padding <= UNEVEN:
                return f"{said} parameters; parallel=fsdp parallel.shard={fewer} would"
        return f"{said} parameters; another number of ranks would"

    def is_kept_whole(self, parameter: Parameter) -> bool:
        """Whether ZeRO 3 leaves a parameter on every rank."""
        limit = self.config.parallel.zero_optimization.get("stage3_param_persistence_threshold", KEPT_WHOLE)
        return parameter.numel <= limit

    @property
    def kept_whole(self) -> int:
        """Numbers that ZeRO 3 leaves on every rank."""
        return sum(p.numel for p in self.model.parameters if self.is_kept_whole(p))

    @property
    def m3_parameters(self) -> list[Parameter]:
        """Those of the optimizer's m3 groups, in its order."""
        named = {p.name: p for p in self.model.parameters}
        return [named[name] for g in self.model.groups if g["algorithm"] == "m3" for name in g["param_names"]]


def _padded_shard(shape: tuple[int, ...], shards: int) -> int:
    dim = shard_dim(shape, shards)
    return math.prod(shape) // shape[dim] * -(-shape[dim] // shards)
