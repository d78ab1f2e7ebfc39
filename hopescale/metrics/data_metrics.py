"""The part of the catalog that `ReaderStats` and `SharderStats` of `data_pipeline.stats` fill."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hopescale.metrics.metric import Metric, shown_on

READER_METRICS: tuple[Metric, ...] = shown_on(
    "data",
    Metric(
        key="reader_clips_total",
        kind="counter",
        unit="clips",
        reduction="sum",
        help="Clips read by all ranks in this incarnation.",
    ),
    Metric(
        key="reader_bytes_total",
        kind="counter",
        unit="bytes",
        reduction="sum",
        help="Bytes read from shards by all ranks in this incarnation.",
    ),
    Metric(
        key="reader_read_seconds_total",
        kind="counter",
        unit="seconds",
        reduction="sum",
        help="Time the readers' threads of all ranks spent reading and decoding.",
    ),
    Metric(
        key="reader_wait_seconds_total",
        kind="counter",
        unit="seconds",
        reduction="sum",
        help="Time all ranks waited inside the reader for a batch.",
    ),
    Metric(
        key="reader_checksum_seconds_total",
        kind="counter",
        unit="seconds",
        reduction="sum",
        help="The part of the readers' time that went into checksums.",
    ),
    Metric(
        key="reader_copy_seconds_total",
        kind="counter",
        unit="seconds",
        reduction="sum",
        help="Time all ranks spent decoding batches and copying them to the device, on the training thread.",
    ),
    Metric(
        key="reader_ready_batches",
        unit="batches",
        reduction="mean",
        help="Micro-batches that were ready when a rank asked for its newest one.",
    ),
    Metric(
        key="reader_ring_overflows_total",
        kind="counter",
        unit="batches",
        reduction="sum",
        help="Batches that needed new memory, because the trainer held on to all there was.",
    ),
    Metric(
        key="reader_retries_total",
        kind="counter",
        unit="clips",
        reduction="sum",
        help="Clips read again after something was wrong with them.",
    ),
    Metric(
        key="reader_checksum_errors_total",
        kind="counter",
        unit="errors",
        reduction="sum",
        help="Times that a clip's bytes did not match their checksum, retries included.",
    ),
    Metric(
        key="reader_bad_clips_total",
        kind="counter",
        unit="clips",
        labels=("reason",),
        label_values=("checksum", "short", "unreadable"),
        reduction="sum",
        help="Clips given up: replaced, masked, or the end of the run.",
    ),
    Metric(
        key="reader_epoch",
        unit="epochs",
        reduction="global",
        help="Epoch of the next step, from 0.",
    ),
    Metric(
        key="reader_position",
        unit="clips",
        reduction="global",
        help="Clips that all ranks together were handed since the run began.",
    ),
    Metric(
        key="reader_cache_hits_total",
        kind="counter",
        unit="shards",
        reduction="sum",
        help="Shards that were found among the copies on the node.",
    ),
    Metric(
        key="reader_cache_misses_total",
        kind="counter",
        unit="shards",
        reduction="sum",
        help="Shards that had to be fetched to the node.",
    ),
    Metric(
        key="reader_cache_fetched_bytes_total",
        kind="counter",
        unit="bytes",
        reduction="sum",
        help="Bytes of shards fetched to the nodes.",
    ),
    Metric(
        key="reader_cache_evictions_total",
        kind="counter",
        unit="shards",
        reduction="sum",
        help="Copies of shards removed to make room for others.",
    ),
    Metric(
        key="reader_cache_bytes",
        unit="bytes",
        reduction="mean",
        help="Bytes of the copies of shards on a rank's node.",
    ),
)

READER_STATS: Mapping[str, tuple[str, str | None]] = MappingProxyType(
    {
        "clips_read": ("reader_clips_total", None),
        "bytes_read": ("reader_bytes_total", None),
        "read_seconds": ("reader_read_seconds_total", None),
        "checksum_seconds": ("reader_checksum_seconds_total", None),
        "wait_seconds": ("reader_wait_seconds_total", None),
        "copy_seconds": ("reader_copy_seconds_total", None),
        "ready_batches": ("reader_ready_batches", None),
        "ring_overflows": ("reader_ring_overflows_total", None),
        "retries": ("reader_retries_total", None),
        "checksum_errors": ("reader_checksum_errors_total", None),
        "bad_clips_checksum": ("reader_bad_clips_total", "checksum"),
        "bad_clips_short": ("reader_bad_clips_total", "short"),
        "bad_clips_unreadable": ("reader_bad_clips_total", "unreadable"),
        "epoch": ("reader_epoch", None),
        "position": ("reader_position", None),
        "cache_hits": ("reader_cache_hits_total", None),
        "cache_misses": ("reader_cache_misses_total", None),
        "cache_fetched_bytes": ("reader_cache_fetched_bytes_total", None),
        "cache_evictions": ("reader_cache_evictions_total", None),
        "cache_bytes": ("reader_cache_bytes", None),
    }
)
"""Field of `data_pipeline.stats.ReaderStats` -> key, and the value of its label if it has one."""

SHARDER_METRICS: tuple[Metric, ...] = shown_on(
    # A job of its own before all runs, whose text file node_exporter serves without the labels of a run.
    None,
    Metric(
        key="sharder_clips_total",
        kind="counter",
        unit="clips",
        reduction="sum",
        record="shard",
        help="Clips in the shards that a run of the sharder has finished.",
    ),
    Metric(
        key="sharder_bytes_total",
        kind="counter",
        unit="bytes",
        reduction="sum",
        record="shard",
        help="Bytes of the shards that a run of the sharder has finished.",
    ),
    Metric(
        key="sharder_shards_total",
        kind="counter",
        unit="shards",
        reduction="sum",
        record="shard",
        help="Shards that a run of the sharder has finished.",
    ),
    Metric(
        key="sharder_skipped_clips_total",
        kind="counter",
        unit="clips",
        reduction="sum",
        record="shard",
        help="Clips in shards that an earlier run of the sharder had finished.",
    ),
    Metric(
        key="sharder_bad_clips_total",
        kind="counter",
        unit="clips",
        reduction="sum",
        record="shard",
        help="Clips that the sharder left out because they cannot be used.",
    ),
    Metric(
        key="sharder_seconds_total",
        kind="counter",
        unit="seconds",
        reduction="sum",
        record="shard",
        help="Time since a run of the sharder read its first clip.",
    ),
)

SHARDER_STATS: Mapping[str, str] = MappingProxyType(
    {
        "clips": "sharder_clips_total",
        "bytes": "sharder_bytes_total",
        "shards": "sharder_shards_total",
        "skipped": "sharder_skipped_clips_total",
        "bad": "sharder_bad_clips_total",
        "seconds": "sharder_seconds_total",
    }
)
"""Field of `data_pipeline.stats.SharderStats` -> key."""
