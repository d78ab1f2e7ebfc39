"""A whole job on machines you do not have: memory and time of a step, what travels, and what data must arrive."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, get_args

from hopescale.config.checks import cross_section_problems
from hopescale.config.schema import Config
from hopescale.errors import ConfigError, Problem
from hopescale.model.flops import Recompute
from hopescale.optim.planner import Schedule
from hopescale.parallel.mesh import degrees_of

from .hardware import Hardware, hardware_of
from .memory import RESERVE, Memory, largest_micro_batch, memory_of
from .optimizer import schedule_of
from .spread import Model, Spread, model_of
from .step_time import Step, StepTime, step_time
from .traffic import Collective, Share, collectives, share_of

STORED_BYTES = 2
"""Of a number of features in a shard that keeps them in fp16."""
EXTRAPOLATED_FROM = 2
"""Times the ranks of the steps that figures were fitted to, up to which `tests/benchmarks/plan.py` compares predictions
with steps that were measured."""


@dataclass(frozen=True)
class Job:
    """One configuration on so many ranks."""

    config: Config
    model: Model
    world_size: int
    ranks_of_node: int
    hardware: Hardware
    schedule: Schedule | None
    """Of M3's matrices."""

    @cached_property
    def spread(self) -> Spread:
        """The model over the ranks."""
        return Spread(self.config, self.model, self.world_size)

    @cached_property
    def share(self) -> Share:
        """Of one rank."""
        return share_of(self.config, self.world_size)

    @property
    def frames(self) -> int:
        """Stored frames of a clip."""
        return min(self.config.data.frames or self.config.model.frames, self.config.model.frames)

    @cached_property
    def memory(self) -> Memory:
        """Of the rank that needs most."""
        return memory_of(self.spread, self.schedule, self.share, self.frames)

    @property
    def limit(self) -> float:
        """Bytes that a step may take."""
        return (1 - RESERVE) * self.hardware.memory_bytes

    @cached_property
    def largest_micro_batch(self) -> int:
        """Most of a rank's clips at once that fit."""
        return largest_micro_batch(self.spread, self.schedule, self.frames, self.limit, self.share.clips)

    @cached_property
    def collectives(self) -> list[Collective]:
        """Of a step."""
        return collectives(self.spread, self.schedule, self.share, self.frames)

    @property
    def step(self) -> Step:
        """What decides on the time of a step."""
        return Step(
            self.spread, self.schedule, self.collectives, self.share, self.frames, self.hardware, self.ranks_of_node
        )

    @cached_property
    def time(self) -> StepTime:
        """Of a step."""
        return step_time(self.step)

    @property
    def clips_per_second(self) -> float:
        """Of all ranks."""
        return self.config.train.global_batch / self.time.total

    @property
    def read_per_node(self) -> float:
        """Bytes of features a second that a node must read."""
        model = self.config.model
        clip = self.frames * model.num_patches * model.encoder_dim * STORED_BYTES
        return self.clips_per_second * clip * self.ranks_of_node / self.world_size

    @property
    def is_extrapolation(self) -> bool:
        """Whether the time is of more ranks than its figures were checked for."""
        fitted = self.hardware.fitted_ranks
        return fitted is None or self.world_size > EXTRAPOLATED_FROM * fitted

    @property
    def nodes(self) -> int:
        """Machines."""
        return -(-self.world_size // self.ranks_of_node)

    def on(self, world_size: int) -> Job:
        """The same with another number of ranks, filling node after node.

        Raises:
            ConfigError: the configuration cannot be spread over so many.
        """
        return planned(self.config, self.model, world_size, min(self.ranks_of_node, world_size), self.hardware)

    def recomputing(self, recompute: Recompute) -> Job:
        """The same with another `parallel.recompute`, which changes nothing about who orthogonalises what."""
        parallel = self.config.parallel.model_copy(update={"recompute": recompute})
        return replace(self, config=self.config.model_copy(update={"parallel": parallel}))


def job_of(config: Config) -> Job:
    """The job of a configuration on the machines of its `cluster` section.

    Raises:
        ConfigError: it cannot be spread over so many ranks; of `model.compat`, whose arithmetic is another.
    """
    if config.model.compat != "none":
        rule = "computes as the earlier predictor did, whose memory and time are not known here"
        raise ConfigError(Problem("model.compat", config.model.compat, rule, "plan for one rank, or set it to none"))
    cluster, hardware = config.cluster, hardware_of(config.cluster.hardware, config.parallel.device)
    return planned(config, model_of(config), cluster.ranks, cluster.gpus_per_node or 1, hardware)


def planned(config: Config, model: Model, world_size: int, ranks_of_node: int, hardware: Hardware) -> Job:
    """A job of a model that has been counted already.

    Raises:
        ConfigError: the configuration cannot be spread over so many ranks, or forces a plan that they cannot take.
    """
    check_ranks(config, world_size)
    schedule = schedule_of(Spread(config, model, world_size))
    return Job(config, model, world_size, ranks_of_node, hardware, schedule)


def check_ranks(config: Config, world_size: int) -> None:
    """Check that a global batch reaches every rank, and that the ranks can be arranged.

    Raises:
        ConfigError: it does not, or they cannot.
    """
    batch = config.train.global_batch
    if batch < world_size:
        rule = f"must be at least one clip for each of {world_size} ranks"
        raise ConfigError(Problem("train.global_batch", batch, rule, "raise it, or plan for fewer ranks"))
    if config.model.shares_memory_over_batch and world_size > 1:
        rule = f"lets the clips of a batch share memories, so that it cannot be spread over {world_size} ranks"
        raise ConfigError(Problem("model.memory.scope", config.model.memory.scope, rule, "plan for one rank"))
    degrees_of(config.parallel, world_size)


def figures_of(job: Job) -> dict[str, Any]:
    """All figures of a job, plain."""
    return {
        "ranks": {"nodes": job.nodes, "of_node": job.ranks_of_node} | job.spread.degrees._asdict(),
        "engine": job.spread.engine,
        "share": asdict(job.share),
        "hardware": asdict(job.hardware),
        "memory": {name: asdict(other.memory) for name, other in by_recompute(job).items()},
        "fits": job.memory.total <= job.limit,
        "largest_micro_batch": job.largest_micro_batch,
        "collectives": [each._asdict() for each in job.collectives],
        "seconds": asdict(job.time) | {"total": job.time.total},
        "bottleneck": job.time.bottleneck,
        "clips_per_second": job.clips_per_second,
        "read_per_node": job.read_per_node,
        "is_extrapolation": job.is_extrapolation,
    }


def by_recompute(job: Job) -> dict[str, Job]:
    """The job with every `parallel.recompute` that changes something."""
    return {name: job.recomputing(name) for name in recompute_modes(job.config)}


def recompute_modes(config: Config) -> list[Recompute]:
    """Those that a run accepts and that change something."""
    modes: list[Recompute] = []
    for name in get_args(Recompute):
        parallel = config.parallel.model_copy(update={"recompute": name})
        if not any(cross_section_problems(config.model_copy(update={"parallel": parallel}))):
            modes.append(name)
    return modes


def sweep_rows(job: Job) -> list[dict[str, Any]]:
    """Rows of 1, 2, 4 ... ranks up to the job's, with every `parallel.recompute`; one that cannot be says why."""
    counts = sorted({job.world_size, *(2**n for n in range(job.world_size.bit_length()) if 2**n <= job.world_size)})
    modes, rows = recompute_modes(job.config), []
    for ranks in counts:
        try:
            on_ranks = job.on(ranks)
        except ConfigError as error:
            cannot = error.problems[0].rule
            rows += [{"ranks": ranks, "recompute": recompute, "cannot": cannot} for recompute in modes]
            continue
        rows += [_row(on_ranks.recomputing(recompute)) for recompute in modes]
    return rows


def _row(job: Job) -> dict[str, Any]:
    return {
        "ranks": job.world_size,
        "recompute": job.config.parallel.recompute,
        "memory": job.memory.total,
        "fits": job.memory.total <= job.limit,
        "largest_micro_batch": job.largest_micro_batch,
        "seconds": job.time.total,
        "clips_per_second": job.clips_per_second,
        "bottleneck": job.time.bottleneck,
    }
