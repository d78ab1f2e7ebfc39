"""The benchmark's process in the interpreter of hopescale."""

from __future__ import annotations

import os

import torch

from data_pipeline.schema import MANIFEST_FORMAT
from data_pipeline.shard.plan import SHARD_VERSION
from tests.benchmarks.data_reading import check, limit, memory, overhead, ring, views, waits
from tests.benchmarks.data_resume import make_index, order, resume
from tests.benchmarks.data_worker import Result, serve
from tests.benchmarks.data_writing import copy, core, from_npy, make_npy, make_shards, plain_write, sharder


def versions() -> Result:
    """Return what the process runs on, and the format of what it writes."""
    cores = len(os.sched_getaffinity(0))
    return {"torch": torch.__version__, "cores": cores, "format": f"{MANIFEST_FORMAT}.{SHARD_VERSION}"}


JOBS = {
    job.__name__: job
    for job in (
        check,
        copy,
        core,
        from_npy,
        limit,
        make_index,
        make_npy,
        make_shards,
        memory,
        order,
        overhead,
        plain_write,
        resume,
        ring,
        sharder,
        versions,
        views,
        waits,
    )
}

if __name__ == "__main__":
    serve(JOBS)
