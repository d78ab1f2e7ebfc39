"""The `cluster` section of the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, PositiveInt

from hopescale.errors import Problem
from hopescale.slurm.schema import NAME, SlurmFields


class ClusterConfig(SlurmFields):
    """The machines of a run: planned for by `hopescale plan`, asked for by `hopescale slurm`, checked at the start."""

    name: Annotated[str, Field(pattern=NAME)] = "local"
    """Name of the cluster, by which metrics of several are told apart."""
    nodes: PositiveInt | None = None
    """Machines; null leaves it to the launcher, and plans for one. A run started on another number is refused."""
    gpus_per_node: PositiveInt | None = None
    """Ranks of a machine, each with a GPU of its own, or CPU ranks; null leaves it to the launcher, and plans for one.
    A run started with another number is refused."""
    hardware: str | None = None
    """What a rank has, for planning: a100, h100, h200, b200, l40s, cpu, or a JSON file of the same
    figures; null plans for h100, or cpu with parallel.device=cpu."""

    @property
    def ranks(self) -> int:
        """Planned for."""
        return (self.nodes or 1) * (self.gpus_per_node or 1)

    def started_differently(self, world_size: int, ranks_of_node: int) -> Iterator[Problem]:
        """How a launch differs from what is configured."""
        fix = "start as many, or leave it out"
        if self.gpus_per_node is not None and ranks_of_node != self.gpus_per_node:
            rule = f"{ranks_of_node} ranks were started on this node"
            yield Problem("cluster.gpus_per_node", self.gpus_per_node, rule, fix)
        elif self.nodes is not None and world_size != self.nodes * ranks_of_node:
            found = f"{world_size / ranks_of_node:g} nodes"
            rule = f"{world_size} ranks were started, {ranks_of_node} on this node, which is {found}"
            yield Problem("cluster.nodes", self.nodes, rule, fix)
