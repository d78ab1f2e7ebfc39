from __future__ import annotations

import pytest

from hopescale.config.compose import load_config
from hopescale.errors import ConfigError


@pytest.mark.parametrize("name", ["ddp", "fsdp", "hsdp", *(f"deepspeed_zero{stage}" for stage in range(4))])
def test_every_file_of_the_section_composes(name: str) -> None:
    config = load_config([f"parallel={name}"])
    assert config.parallel.recompute == "block"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["parallel=ddp", "parallel.shard=2"], "parallel.shard=2: is ignored with parallel.engine=ddp"),
        (["parallel=ddp", "parallel.reshard_after_forward=false"], "reshard_after_forward=False: is ignored"),
        (["parallel=deepspeed_zero2", "parallel.prefetch=2"], "prefetch=2: is ignored with parallel.engine=deepspeed"),
        (["parallel.zero_stage=1"], "zero_stage=1: is ignored with parallel.engine=fsdp"),
        (["parallel.engine=deepspeed"], "parallel.zero_stage=None: DeepSpeed needs one"),
        (["parallel=deepspeed_zero1", "parallel.compile=true"], "parallel.compile=True: is not supported"),
        (
            ["optimizer=adamw", "parallel=deepspeed_zero0", "parallel.offload_optimizer=true"],
            "offload_optimizer=True: needs a ZeRO stage of 1 to 3",
        ),
        (["parallel=deepspeed_zero2", "parallel.offload_optimizer=true"], "no GPU orthogonalises M3's matrices"),
        (["parallel=deepspeed_zero3", "parallel.zero_optimization={mics_shard_size: 2}"], "MiCS keeps copies"),
        (["parallel=deepspeed_zero3", "parallel.zero_optimization={zero_hpz_partition_size: 2}"], "hpZ keeps a second"),
        (
            ["parallel=deepspeed_zero3", "parallel.zero_optimization={reduce_buckets: 2}"],
            "did you mean reduce_bucket_s",
        ),
        (
            ["parallel=deepspeed_zero0", "parallel.zero_optimization={overlap_comm: true}"],
            "is ignored with",
        ),
        (
            ["parallel=deepspeed_zero2", "parallel.zero_optimization={stage3_max_live_parameters: 1}"],
            "stages 3 read",
        ),
        (["parallel=deepspeed_zero2", "parallel.zero_optimization={reduce_bucket_size: -1}"], "a whole number of at"),
        (["parallel=deepspeed_zero2", "optimizer.plan.strategy=gram"], "needs matrices that are cut along one side"),
        (["parallel.precision=fp16"], "parallel.precision=fp16: fp16 overflows in the memories' writes"),
        (
            ["optimizer=adamw", "parallel=deepspeed_zero2", "parallel.offload_optimizer=nvme"],
            "parallel.offload_optimizer=nvme: optimizer state is kept in host memory or not: NVMe",
        ),
        (
            ["parallel=deepspeed_zero3", "parallel.zero_optimization.offload_param={device: nvme, nvme_path: /local}"],
            "zero_optimization.offload_param={'device': 'nvme', 'nvme_path': '/local'}: parameters on the host",
        ),
        (["parallel=deepspeed_zero2", "parallel.zero_optimization.reduce_bucket_size=auto"], "must be a whole number"),
        (["parallel=deepspeed_zero2", "parallel.zero_optimization.reduce_bucket_size=5e8"], "Fix: write 500000000"),
        (["parallel=deepspeed_zero2", "parallel.zero_optimization.reduce_bucket_size=0"], "number of at least 1"),
        (["parallel=deepspeed_zero2", "parallel.zero_optimization.reduce_scatter=true"], "each stage sums them"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_name(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    assert expected in str(caught.value)


def test_sizes_of_buckets_are_deepspeeds_own() -> None:
    config = load_config(["parallel=deepspeed_zero3", "parallel.zero_optimization={reduce_bucket_size: 1000}"])
    assert config.parallel.zero_optimization == {"reduce_bucket_size": 1000}
