"""The `parallel` section of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt


class ParallelConfig(BaseModel):
    """How one model is spread over ranks."""

    model_config = ConfigDict(
        allow_inf_nan=False, extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    engine: Literal["fsdp"] = "fsdp"
    """Who shards parameters, gradients and optimizer state: fsdp is PyTorch's FSDP2."""
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
    """Frees gathered parameters after forward, for memory; false keeps them for backward, for speed."""
    threads_per_rank: PositiveInt | None = None
    """CPU threads of one rank; null shares the cores a process may use evenly among the ranks of a node."""
    timeout_seconds: PositiveFloat = 600.0
    """How long a collective may wait for a rank before the run fails."""
