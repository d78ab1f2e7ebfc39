"""Newton-Schulz of many sharded matrices at once: layouts, schedules and the work on them, for one team of ranks."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .flat_piece import FlatPiece
from .pipeline import Turns
from .planner import PlanName, Schedule, costs_of, make_schedule
from .plans.block import orthogonalise_pieces
from .plans.gram import orthogonalise_by_gram
from .plans.whole import orthogonalise_whole
from .plans.work import Task, Work
from .schema import M3Config, NewtonSchulzConfig
from .shard_map import Layout, Team, layout_of, team_of

logger = logging.getLogger(__name__)


class Orthogonaliser:
    """Orthogonalises the matrices of parameters that one team of ranks holds together.

    A schedule is made once for every set of parameters that is asked for together, the same on every rank.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        team: Team,
        config: M3Config,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Check that the strategy can be used on every parameter.

        Args:
            layouts: of the parameters.
            team: of the ranks that hold them, in the order of the process group.
            config: of the optimizer.
            device: where the parameters are.
            group: of the team's ranks; None for one rank alone.

        Raises:
            ValueError: the strategy cannot be used on some parameter.
        """
        self.layouts, self.team, self.config, self.device, self.group = layouts, team, config, device, group
        self.rank = dist.get_rank(group) if group is not None else 0
        self._made: dict[tuple[tuple[int, ...], bool], Schedule] = {}
        self._works: dict[tuple[tuple[int, ...], bool], list[Work]] = {}
        self.schedule(range(len(layouts)), exact=True)
        if config.plan.strategy == "block_periodic":
            self.schedule(range(len(layouts)), exact=False)
            log = logger.warning if self.rank == 0 else logger.debug
            log(
                "optimizer.plan.strategy=block_periodic is not exact: %d of %d steps orthogonalise each rank's own "
                "pieces, so results depend on the number of ranks",
                *((config.plan.block_period or 0) - 1, config.plan.block_period),
            )

    def schedule(self, members: Sequence[int], *, exact: bool) -> Schedule:
        """Who does what for some of the parameters; pure, and the same on every rank."""
        key = (tuple(members), exact)
        if key not in self._made:
            inexact = self.config.plan.strategy == "block_periodic"
            config = with_plan(self.config, "auto") if exact and inexact else self.config
            self._made[key] = schedule_for(self.layouts, members, self.team, config, self.device)
        return self._made[key]

    def tasks(self, members: Sequence[int], directions: Mapping[int, Tensor], *, exact: bool = True) -> list[Turns]:
        """One task a bucket, for `take_turns`.

        Args:
            members: parameters, by their place; the same ones on every rank.
            directions: of each, the flat fp32 local tensor that is orthogonalised in place.
            exact: False for the steps of block_periodic on pieces.
        """
        key = (tuple(members), exact)
        if key not in self._works:
            schedule = self.schedule(members, exact=exact)
            self._works[key] = [Work(schedule, bucket, self.rank, self.group) for bucket in schedule.buckets]
        return [
            self._plan(work.bucket.plan)(work, [directions[member] for member in work.bucket.members])
            for work in self._works[key]
        ]

    def _plan(self, plan: PlanName) -> Callable[[Work, list[Tensor]], Task]:
        if plan == "gram":
            return orthogonalise_by_gram
        if plan == "block_periodic":
            return partial(orthogonalise_pieces, adjust=self.config.adjust)
        return orthogonalise_whole


def schedule_for(
    layouts: Sequence[Layout], members: Sequence[int], team: Team, config: M3Config, device: torch.device
) -> Schedule:
    """The schedule of some parameters on a kind of device.

    Raises:
        ValueError: the strategy cannot be used on some of them.
    """
    newton_schulz, costs = with_precision(config, device), costs_of(config.plan, device.type)
    return make_schedule(layouts, members, team, newton_schulz, config.plan, costs)


def with_plan(config: M3Config, strategy: Literal["auto"] | PlanName) -> M3Config:
    """The same with another strategy than block_periodic for all matrices."""
    plan = config.plan.model_copy(update={"strategy": strategy, "block_period": None})
    return config.model_copy(update={"plan": plan})


def with_precision(config: M3Config, device: torch.device) -> NewtonSchulzConfig:
    """The same with `auto` resolved for a device: bf16 where it multiplies bf16 itself.

    Without a CUDA device at hand, planning for one takes it to be one that does.
    """
    if config.newton_schulz.precision != "auto":
        return config.newton_schulz
    if config.plan.strategy == "gram" or config.newton_schulz.restart:
        # What bf16 has no use for.
        return config.newton_schulz.model_copy(update={"precision": "fp32"})
    if device.type == "cuda":
        native = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return config.newton_schulz.model_copy(update={"precision": "bf16" if native else "fp32"})


def agree(told: str, group: dist.ProcessGroup, device: torch.device) -> None:
    """Check that all ranks of a group say the same.

    Raises:
        RuntimeError: some do not; on every rank.
    """
    digest = hashlib.sha256(told.encode()).digest()
    mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group)
    odd = [rank for rank, theirs in enumerate(everyone) if not torch.equal(theirs, everyone[0])]
    if odd:
        raise RuntimeError(
            f"ranks {odd} have another optimizer than rank 0: they differ in configuration, parameter groups, version, "
            "or in hardware where newton_schulz.precision=auto picks by it"
        )


def group_of(parameter: Tensor, group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The ranks that hold a parameter together: those given, of its mesh, or all; None for a rank's own parameter."""
    if isinstance(parameter, FlatPiece):
        return parameter.spec.group if len(parameter.spec.ranges) > 1 else None
    if not isinstance(parameter, DTensor) or parameter.device_mesh.size() == 1:
        plain = group is not None and not isinstance(parameter, DTensor) and dist.get_world_size(group) > 1
        return group if plain else None
    mesh = parameter.device_mesh
    return group or (mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD)


def orthogonalisers(
    named: Sequence[tuple[str, Tensor]], config: M3Config, group: dist.ProcessGroup | None
) -> list[tuple[Orthogonaliser, list[int]]]:
    """Parameters by the team that holds them, as an orthogonaliser each, with their places in `named`.

    Args:
        named: parameters of at least 2 dims.
        config: of the optimizer.
        group: ranks that hold the parameters together; None takes the ranks of their meshes for sharded ones, and
            leaves each rank to itself for plain ones.

    Raises:
        ValueError: a placement that M3 does not know, a mesh of other ranks than the group's, or a strategy that
            cannot be used.
    """
    by_team: dict[tuple[Team, dist.ProcessGroup | None], list[int]] = {}
    for place, (_, parameter) in enumerate(named):
        shared, team = group_of(parameter, group), Team.of_one()
        if shared is not None:
            ranks = dist.get_process_group_ranks(shared)
            spread = isinstance(parameter, DTensor | FlatPiece)
            team = team_of(parameter, ranks) if spread else Team.of_copies(len(ranks))
        by_team.setdefault((team, shared), []).append(place)
    return [
        (
            Orthogonaliser(
                [layout_of(*named[place]) for place in places],
                team,
                config,
                named[places[0]][1].device,
                shared,
            ),
            places,
        )
        for (team, shared), places in by_team.items()
    ]
