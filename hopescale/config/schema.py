"""The whole configuration. Sections are defined by their owners; this file assembles them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from data_pipeline.schema import DataConfig
from hopescale.checkpoint.schema import CheckpointConfig
from hopescale.metrics.schema import MetricsConfig
from hopescale.model.objective_schema import ObjectiveConfig
from hopescale.model.schema import ModelConfig
from hopescale.optim.schema import OptimizerConfig
from hopescale.parallel.schema import ParallelConfig
from hopescale.plan.schema import ClusterConfig

SECTION = ConfigDict(allow_inf_nan=False, extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class EarlyStopConfig(BaseModel):
    """Ends a run whose held-out skill no longer rises."""

    model_config = SECTION

    metric: Literal["skill_one_step", "skill_far", "skill_jump", "skill_context"] = "skill_far"
    """Skill that is watched, higher is better."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Evaluations without a gain after which the run ends; 0 never ends it early."""
    min_gain: Annotated[float, Field(ge=0)] = 0.0
    """Rise in skill that counts as a gain."""


class RunConfig(BaseModel):
    """Where a run lives and when it ends early."""

    model_config = SECTION

    root: str = "runs"
    """Folder that holds run folders."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")] = "run"
    """Name of the run: letters, digits, dot, dash, underscore; at most 80."""
    dir: str | None = None
    """Run folder; null makes a new one, root/name-DATE-TIME. A folder with checkpoints is resumed."""
    early_stop: EarlyStopConfig = EarlyStopConfig()
    dry_run: bool = False
    """Starts on all ranks, takes one step on one batch, saves and loads a checkpoint, says what it cost, and keeps
    nothing."""


class TrainConfig(BaseModel):
    """How long and on how much at once."""

    model_config = SECTION

    steps: PositiveInt = 1000
    """Optimizer steps of the whole run; the learning rate's phases are shares of it."""
    stop_after: PositiveInt | None = None
    """Save and end this job after so many of its own steps (exit code 75, to be resumed); null runs to the end."""
    global_batch: PositiveInt = 16
    """Clips in one optimizer step, over all ranks; at least one a rank."""
    micro_batch: PositiveInt | None = None
    """Most clips in one forward and backward of a rank, the rest is accumulated; null takes a rank's clips at once."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of initial weights, clip order, and every random draw."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Steps between two evaluations on held-out clips; 0 evaluates only after the run."""


class DemoConfig(BaseModel):
    """What `hopescale demo` makes before it trains."""

    model_config = SECTION

    preset: Literal["full", "smoke"] = "full"
    """full: 6 partitions of 75 training and 16 held-out clips; smoke: 12 and 4, and 20 steps."""
    cache: str = "data/demo"
    """Folder for pixels, features and shards, named by content; a link called like the preset names the newest."""
    ranks: PositiveInt = 2
    """Ranks that train."""


class Config(BaseModel):
    """Everything a run depends on."""

    model_config = SECTION

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    cluster: ClusterConfig = ClusterConfig()
    train: TrainConfig = TrainConfig()
    demo: DemoConfig = DemoConfig()
