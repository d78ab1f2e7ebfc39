"""The `parallel` section of the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator
from pydantic_core import PydanticCustomError

from data_pipeline.errors import nearest
from hopescale.errors import Problem

ZERO_ENTRIES: dict[str, tuple[type, tuple[int, ...]]] = {
    "allgather_bucket_size": (int, (1, 2)),
    "contiguous_gradients": (bool, (1, 2, 3)),
    "overlap_comm": (bool, (1, 2, 3)),
    "reduce_bucket_size": (int, (1, 2, 3)),
    "round_robin_gradients": (bool, (1, 2)),
    "stage3_max_live_parameters": (int, (3,)),
    "stage3_max_reuse_distance": (int, (3,)),
    "stage3_param_persistence_threshold": (int, (3,)),
    "stage3_prefetch_bucket_size": (int, (3,)),
}
"""Entries of `zero_optimization` that change how fast DeepSpeed is, and never what it computes: type, and stages that
read it."""
ZERO_REFUSED = {
    "mics_shard_size": "MiCS keeps copies of shards, which the pieces of parameters here do not tell apart",
    "zero_hpz_partition_size": "hpZ keeps a second copy of each shard, which checkpoints and M3 would not move",
    "zero_quantized_weights": "it rounds parameters on their way, so that results depend on the number of ranks",
    "zero_quantized_gradients": "it rounds gradients on their way, so that results depend on the number of ranks",
    "offload_param": "parameters on the host or on NVMe are gathered from there by code that is not tested here",
    "offload_optimizer": "parallel.offload_optimizer is its setting; NVMe is not supported",
    "sub_group_size": "there must be one sub-group for M3 to see a step as a whole",
    "stage": "parallel.zero_stage is its setting",
    "reduce_scatter": "gradients are summed as each stage sums them by itself",
}
"""Entries that are refused, and why."""


class ParallelConfig(BaseModel):
    """How one model is spread over ranks."""

    model_config = ConfigDict(
        allow_inf_nan=False, extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    engine: Literal["fsdp", "ddp", "deepspeed"] = "fsdp"
    """Who spreads parameters, gradients and optimizer state over ranks: PyTorch's FSDP2, PyTorch with a copy on every
    rank, or DeepSpeed's ZeRO."""
    shard: PositiveInt | None = None
    """Ranks that hold one copy of the model between them; null takes all, or what `replicate` leaves. For fsdp."""
    replicate: PositiveInt | None = None
    """Copies of the sharded model (HSDP), whose gradients are added up; null takes one, or what `shard` leaves. For
    fsdp."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """What DeepSpeed shards: optimizer state (1), gradients too (2), parameters too (3), or nothing (0)."""
    offload_optimizer: bool = False
    """DeepSpeed keeps fp32 parameters and optimizer state in host memory and steps there; for stages 1 to 3 and AdamW
    in every group."""
    zero_optimization: dict[str, Any] = {}
    """Entries of DeepSpeed's own section of that name: sizes of buckets, overlap."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA where there is one."""
    recompute: Literal["none", "chunk", "block"] = "block"
    """Activation checkpointing: block keeps only each block's input and runs the block again in backward; chunk runs
    only the chunks of its memories again, those of model.longterm excepted, and keeps what each started from and all
    of the block's other activations."""
    compile: bool = False
    """Compiles each block with torch.compile; needs a C++ compiler on a CPU, and gains little there."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs matrix products in bf16; parameters, fast weights, gates, norms and the optimizer stay fp32."""
    reshard_after_forward: bool = True
    """Frees gathered parameters after forward, for memory; false keeps them for backward, for speed. For fsdp."""
    prefetch: Annotated[int, Field(ge=0, le=8)] = 0
    """Blocks whose parameters are gathered ahead of the one that runs; 0 leaves it to FSDP2, which gathers the next one
    in backward. For fsdp."""
    threads_per_rank: PositiveInt | None = None
    """CPU threads of one rank; null shares the cores a process may use evenly among the ranks of a node."""
    timeout_seconds: PositiveFloat = 600.0
    """How long ranks wait for each other, at the start and in a collective, before the run fails."""

    @field_validator("precision", mode="before")
    @classmethod
    def _not_fp16(cls, value: object) -> object:
        if value in ("fp16", "float16", "half"):
            why = "fp16 overflows in the memories' writes and needs a loss scale, which M3 would undo"
            raise PydanticCustomError("literal_error", why, {"expected": "'fp32' or 'bf16'"})
        return value

    @field_validator("offload_optimizer", mode="before")
    @classmethod
    def _on_the_host(cls, value: object) -> object:
        if isinstance(value, str | dict):
            why = "optimizer state is kept in host memory or not: NVMe, paths and buffers are not supported"
            raise PydanticCustomError("bool_type", why)
        return value

    def problems(self) -> Iterator[Problem]:
        """What does not fit together, or would be ignored."""
        defaults = ParallelConfig()
        of_deepspeed = ("zero_stage", "offload_optimizer", "zero_optimization")
        of_fsdp = ("shard", "replicate", "reshard_after_forward", "prefetch")
        ignored = [*(of_fsdp if self.engine != "fsdp" else ()), *(of_deepspeed if self.engine != "deepspeed" else ())]
        for name in ignored:
            if getattr(self, name) != getattr(defaults, name):
                rule = f"is ignored with parallel.engine={self.engine}"
                yield Problem(f"parallel.{name}", getattr(self, name), rule, "leave it out")
        if self.engine == "deepspeed":
            yield from self._deepspeed_problems()

    def _deepspeed_problems(self) -> Iterator[Problem]:
        if self.zero_stage is None:
            fix = "pick parallel=deepspeed_zero2, or set parallel.zero_stage to 0, 1, 2 or 3"
            yield Problem("parallel.zero_stage", None, "DeepSpeed needs one", fix)
        if self.offload_optimizer and not self.zero_stage:
            rule = "needs a ZeRO stage of 1 to 3: stage 0 has no state of its own to keep elsewhere"
            yield Problem("parallel.offload_optimizer", True, rule, "set parallel.zero_stage=2, or leave it out")
        if self.compile:
            rule = "is not supported with parallel.engine=deepspeed, whose hooks break compiled blocks apart"
            yield Problem("parallel.compile", True, rule, "leave it out, or train with parallel=fsdp")
        for name, value in self.zero_optimization.items():
            if name in ZERO_REFUSED:
                yield Problem(f"parallel.zero_optimization.{name}", value, ZERO_REFUSED[name], "leave it out")
            elif name not in ZERO_ENTRIES:
                fix = f"leave it out; {nearest(name, ZERO_ENTRIES)}"
                yield Problem(f"parallel.zero_optimization.{name}", value, "is no entry that is supported here", fix)
            else:
                yield from self._entry_problems(name, value)

    def _entry_problems(self, name: str, value: Any) -> Iterator[Problem]:
        kind, stages = ZERO_ENTRIES[name]
        field, least = f"parallel.zero_optimization.{name}", int(name.endswith("bucket_size"))
        if type(value) is not kind or (kind is int and value < least):
            wanted = "true or false" if kind is bool else f"a whole number of at least {least}"
            fix = f"write {value:.0f}" if isinstance(value, float) and value >= least else f"set it to {wanted}"
            yield Problem(field, value, f"must be {wanted}", fix)
        if self.zero_stage not in stages:
            rule = f"is ignored with parallel.zero_stage={self.zero_stage}"
            yield Problem(field, value, rule, f"leave it out; stages {', '.join(map(str, stages))} read it")
