"""What every plan is given besides its bucket, and which matrices pass between which ranks."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist
from torch import Tensor

from hopescale.optim.newton_schulz import Coefficients, Precision, steps_of
from hopescale.optim.planner import EVERY, Bucket, Place, Schedule
from hopescale.optim.shard_map import Layout, Piece

Task = Generator[None, None, None]
"""Yields while an exchange is under way."""


@dataclass(frozen=True)
class Work:
    """One bucket of a schedule, seen from one rank."""

    schedule: Schedule
    bucket: Bucket
    rank: int
    """In the team, and in the process group."""
    group: dist.ProcessGroup | None
    """None for a team of one rank."""

    @property
    def steps(self) -> Coefficients:
        """Of Newton-Schulz."""
        config = self.schedule.newton_schulz
        return steps_of(config.coefficients, config.steps)

    @property
    def precision(self) -> Precision:
        """Of Newton-Schulz."""
        precision = self.schedule.newton_schulz.precision
        assert precision != "auto", "resolved before scheduling"
        return precision

    @property
    def restart(self) -> int:
        """Of the Gram form."""
        return self.schedule.newton_schulz.restart

    def layout(self, number: int) -> Layout:
        """Of the parameter that a matrix of the bucket belongs to."""
        position, _ = self.bucket.matrices[number]
        return self.schedule.layouts[self.bucket.members[position]]

    def piece(self, number: int, rank: int) -> Piece:
        """What a rank holds of a matrix of the bucket."""
        _, matrix = self.bucket.matrices[number]
        return self.layout(number).pieces[self.schedule.team.slots[rank]][matrix]

    def size(self, number: int, rank: int) -> int:
        """Numbers that a rank holds of a matrix of the bucket."""
        _, matrix = self.bucket.matrices[number]
        return self.layout(number).sizes[self.schedule.team.slots[rank]][matrix]

    @cached_property
    def mine(self) -> list[int]:
        """Matrices that this rank works on."""
        return [n for n, place in enumerate(self.bucket.places) if self._at(self.rank, place)]

    @cached_property
    def to_workers(self) -> list[list[int]]:
        """Rank -> matrices of which this rank sends it its pieces, to be worked on there."""
        return [self._between(self.rank, rank) for rank in range(self.schedule.team.size)]

    @cached_property
    def from_holders(self) -> list[list[int]]:
        """Rank -> matrices of which it sends its pieces to this rank."""
        return [self._between(rank, self.rank) for rank in range(self.schedule.team.size)]

    @cached_property
    def to_holders(self) -> list[list[int]]:
        """Rank -> matrices of which this rank sends it what came of its pieces."""
        return [self._back(self.rank, rank) for rank in range(self.schedule.team.size)]

    @cached_property
    def from_workers(self) -> list[list[int]]:
        """Rank -> matrices of which it sends this rank what came of its pieces."""
        return [self._back(rank, self.rank) for rank in range(self.schedule.team.size)]

    def _between(self, holder: int, worker: int) -> list[int]:
        """A worker hears from the holders of its own replica."""
        team = self.schedule.team
        if team.replicas[holder] != team.replicas[worker]:
            return []
        return [n for n, place in enumerate(self.bucket.places) if self._at(worker, place) and self.size(n, holder)]

    def _back(self, worker: int, holder: int) -> list[int]:
        """Where each replica has a worker of its own, a holder hears from that one; else from the only one there is."""
        team = self.schedule.team
        near = team.replicas[holder] == team.replicas[worker]
        return [
            n
            for n, place in enumerate(self.bucket.places)
            if (near or place.replica != EVERY) and self._at(worker, place) and self.size(n, holder)
        ]

    def _at(self, rank: int, place: Place) -> bool:
        team = self.schedule.team
        return place.replica in (EVERY, team.replicas[rank]) and place.slot in (EVERY, team.slots[rank])

    def views(self, number: int, locals_: list[Tensor]) -> list[Tensor]:
        """This rank's boxes of a matrix, as rectangles of its flat local tensors."""
        position, _ = self.bucket.matrices[number]
        flat = locals_[position]
        return [
            flat[box.offset : box.offset + box.numel].view(box.bottom - box.top, box.right - box.left)
            for box in self.piece(number, self.rank)
        ]
