"""Newton-Schulz of many sharded matrices at once: layouts, schedules and the work on them, for one team of ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .pipeline import Turns
from .planner import PlanName, Schedule, costs_of, make_schedule
from .plans.block import orthogonalise_pieces
from .plans.gram import orthogonalise_by_gram
from .plans.whole import orthogonalise_whole
from .plans.work import Task, Work
from .schema import NewtonSchulzConfig, OptimizerConfig
from .shard_map import Layout, Team, layout_of, team_of

logger = logging.getLogger(__name__)


class Orthogonaliser:
    """Orthogonalises the matrices of parameters that one team of ranks holds together.

    A schedule is made once for every set of parameters that is asked for together; the ranks compare it before use.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        team: Team,
        config: OptimizerConfig,
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
        self.newton_schulz = with_precision(config.newton_schulz, device)
        self._made: dict[tuple[tuple[int, ...], bool], Schedule] = {}
        self._agreed: dict[tuple[tuple[int, ...], bool], list[Work]] = {}
        self.schedule(range(len(layouts)), exact=True)
        if config.plan.strategy == "block_periodic":
            self.schedule(range(len(layouts)), exact=False)
            logger.warning(
                "optimizer.plan.strategy=block_periodic is not exact: %d of %d steps orthogonalise each rank's own "
                "pieces, so results depend on the number of ranks",
                *((config.plan.block_period or 0) - 1, config.plan.block_period),
            )

    def schedule(self, members: Sequence[int], *, exact: bool) -> Schedule:
        """Who does what for some of the parameters; pure, and the same on every rank."""
        key = (tuple(members), exact)
        if key not in self._made:
            plan = self.config.plan
            if exact and plan.strategy == "block_periodic":
                plan = plan.model_copy(update={"strategy": "auto", "block_period": None})
            costs = costs_of(plan, self.device.type)
            self._made[key] = make_schedule(self.layouts, members, self.team, self.newton_schulz, plan, costs)
        return self._made[key]

    def tasks(self, members: Sequence[int], directions: Mapping[int, Tensor], *, exact: bool = True) -> list[Turns]:
        """One task a bucket, for `take_turns`.

        Args:
            members: parameters, by their place; the same ones on every rank.
            directions: of each, the flat fp32 local tensor that is orthogonalised in place.
            exact: False for the steps of block_periodic on pieces.

        Raises:
            RuntimeError: the ranks do not agree on the schedule; told when it is first used.
        """
        key = (tuple(members), exact)
        if key not in self._agreed:
            schedule = self.schedule(members, exact=exact)
            agree(schedule, self.group, self.device)
            self._agreed[key] = [Work(schedule, bucket, self.rank, self.group) for bucket in schedule.buckets]
        return [
            self._plan(work.bucket.plan)(work, [directions[member] for member in work.bucket.members])
            for work in self._agreed[key]
        ]

    def _plan(self, plan: PlanName) -> Callable[[Work, list[Tensor]], Task]:
        if plan == "gram":
            return orthogonalise_by_gram
        if plan == "block_periodic":
            return partial(orthogonalise_pieces, adjust=self.config.adjust)
        return orthogonalise_whole


def with_precision(config: NewtonSchulzConfig, device: torch.device) -> NewtonSchulzConfig:
    """The same with `auto` resolved for a device: bf16 where it multiplies bf16 itself.

    Without a CUDA device at hand, planning for one takes it to be one that does.
    """
    if config.precision != "auto":
        return config
    if device.type == "cuda":
        native = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return config.model_copy(update={"precision": "bf16" if native else "fp32"})


def agree(schedule: Schedule, group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Check that all ranks made the same schedule.

    Raises:
        RuntimeError: some did not; on every rank.
    """
    if group is None:
        return
    mine = torch.frombuffer(bytearray.fromhex(schedule.fingerprint), dtype=torch.uint8).to(device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group)
    odd = [rank for rank, theirs in enumerate(everyone) if not torch.equal(theirs, everyone[0])]
    if odd:
        raise RuntimeError(
            f"ranks {odd} plan Newton-Schulz otherwise than rank 0: they differ in configuration, parameters or version"
        )


def orthogonalisers(
    named: Sequence[tuple[str, Tensor]], config: OptimizerConfig, group: dist.ProcessGroup | None
) -> list[tuple[Orthogonaliser, list[int]]]:
    """Parameters by the team that holds them, as an orthogonaliser each, with their places in `named`.

    Args:
        named: parameters of at least 2 dims.
        config: of the optimizer.
        group: ranks that hold the parameters together; None takes all ranks for sharded ones, and leaves each rank to
            itself for plain ones.

    Raises:
        ValueError: a placement that M3 does not know, a mesh of other ranks than the group's, or a strategy that
            cannot be used.
    """
    by_team: dict[Team, list[int]] = {}
    groups: dict[Team, dist.ProcessGroup | None] = {}
    for place, (_, parameter) in enumerate(named):
        team, shared = Team.of_one(), None
        if isinstance(parameter, DTensor) and parameter.device_mesh.size() > 1:
            shared = group or dist.group.WORLD
            assert shared is not None, "a mesh of several ranks has a default group"
            team = team_of(parameter, dist.get_process_group_ranks(shared))
        elif group is not None and not isinstance(parameter, DTensor) and dist.get_world_size(group) > 1:
            team, shared = Team.of_copies(dist.get_world_size(group)), group
        by_team.setdefault(team, []).append(place)
        groups[team] = shared
    return [
        (
            Orthogonaliser(
                [layout_of(*named[place]) for place in places],
                team,
                config,
                named[places[0]][1].device,
                groups[team],
            ),
            places,
        )
        for team, places in by_team.items()
    ]
