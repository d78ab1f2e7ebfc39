"""The part of the catalog about what a run survives, and what its time went into."""

from __future__ import annotations

from hopescale.metrics.metric import Metric, shown_on

TIME_CLASSES = (
    "init",
    "load",
    "compile",
    "step",
    "lost_step",
    "data_wait",
    "save",
    "restart_gap",
    "other",
)
"""Every second since a run's first start is of exactly one; `hopescale.resilience.goodput` says which."""

RELIABILITY_METRICS: tuple[Metric, ...] = shown_on(
    "checkpoints and reliability",
    Metric(
        key="nonfinite_steps_total",
        kind="counter",
        rewinds=True,
        unit="steps",
        reduction="global",
        help="Steps skipped because a gradient was not finite; their clips are consumed, nothing else moves.",
    ),
    Metric(
        key="restarts_total",
        kind="counter",
        unit="starts",
        reduction="global",
        help="Times the run has been started again, after whatever ended it.",
    ),
    Metric(
        key="preemptions_total",
        kind="counter",
        unit="stops",
        reduction="global",
        help="Times the run was told to stop and committed a checkpoint before it did.",
    ),
    Metric(
        key="checkpoint_failures_total",
        kind="counter",
        unit="checkpoints",
        reduction="global",
        help="Checkpoints that could not be written in this incarnation; training went on without them.",
    ),
    Metric(
        key="checkpoint_bytes",
        unit="bytes",
        reduction="global",
        record="checkpoint",
        help="Size of the last committed checkpoint.",
    ),
    Metric(
        key="disk_free_bytes",
        unit="bytes",
        reduction="global",
        help="Free bytes of the file system that the run folder is on, as rank 0 sees it.",
    ),
    Metric(
        key="ranks",
        unit="ranks",
        reduction="global",
        help="Ranks of this incarnation, whether they answer or not.",
    ),
    Metric(
        key="goodput_seconds_total",
        kind="counter",
        unit="seconds",
        labels=("kind",),
        label_values=TIME_CLASSES,
        reduction="global",
        help="Time since the run's first start by what it went into, over all incarnations; the classes add up to all.",
    ),
    Metric(
        key="goodput_ratio",
        unit="ratio",
        reduction="global",
        help="Share of the time since the run's first start that went into steps that count (0 to 1).",
    ),
)
