"""Every metric hopescale records, named exactly once.

The recorder accepts only these keys, the Prometheus endpoint exports only these names, and dashboards, alerts and
documentation are generated from this table or tested against it. Names follow the Prometheus conventions
(https://prometheus.io/docs/practices/naming/): base units as suffix, counters end in `_total`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from hopescale.metrics.data_metrics import READER_METRICS, SHARDER_METRICS
from hopescale.metrics.metric import Metric, shown_on
from hopescale.metrics.reliability_metrics import RELIABILITY_METRICS

MEMORIES = ("key", "value", "eta", "alpha", "main")
OF_THE_RUN: Mapping[str, int] = MappingProxyType({"group": 32, "level": 16, "frame": 64})
"""Labels whose values depend on the run, and how many values each may have."""


class UnknownMetric(LookupError):
    """A key or label that the catalog does not hold; the message names the nearest one it does."""


_PROGRESS = shown_on(
    "overview",
    Metric(key="step", unit="steps", reduction="global", help="Optimizer updates done."),
    Metric(
        key="planned_steps",
        unit="steps",
        reduction="global",
        help="Optimizer updates after which the run is done (train.steps).",
    ),
    Metric(
        key="attempted_steps_total",
        kind="counter",
        rewinds=True,
        unit="steps",
        reduction="global",
        help="Steps tried, skipped ones included.",
    ),
    Metric(
        key="clips_total",
        kind="counter",
        rewinds=True,
        unit="clips",
        reduction="global",
        help="Clips consumed by all ranks since the first step of the run.",
    ),
    Metric(
        key="train_seconds_total",
        kind="counter",
        unit="seconds",
        reduction="global",
        help="Time this incarnation has spent training, evaluation and checkpoints excluded.",
    ),
)

_LOSSES = shown_on(
    "overview",
    Metric(key="loss", reduction="mean", help="Training objective, mean over the clips since the last log step."),
    Metric(key="loss_teacher", reduction="mean", help="Teacher-forced one-step part of the objective."),
    Metric(key="loss_jump", reduction="mean", help="Jump part of the objective (first frames to frame tau)."),
    Metric(key="loss_rollout", reduction="mean", help="Part of the objective predicted from predictions, per frame."),
    Metric(key="loss_auxiliary", reduction="mean", help="How far memories' keys and values are from agreeing, a clip."),
)

_OPTIMIZATION = shown_on(
    "optimizer and memories",
    Metric(
        key="objective_weight",
        labels=("kind",),
        label_values=("teacher", "jump", "rollout"),
        reduction="global",
        help="Weight of a branch of the objective in the current phase of the curriculum.",
    ),
    Metric(
        key="curriculum_phase",
        unit="phases",
        reduction="global",
        help="Phases of the curriculum that have begun; 0 is the objective itself.",
    ),
    Metric(
        key="curriculum_surprise",
        reduction="mean",
        help="Memory surprise of the log step alone, which a phase that waits for a plateau goes by.",
    ),
    Metric(
        key="learning_rate",
        labels=("group",),
        overall=True,
        reduction="global",
        help="Learning rate of the parameter group; group `all` is the schedule's base rate.",
    ),
    Metric(
        key="grad_norm",
        labels=("group",),
        overall=True,
        reduction="mean",
        help="L2 norm of the unsharded gradient before clipping, mean over the steps since the last log step.",
    ),
    Metric(
        key="param_norm",
        labels=("group",),
        overall=True,
        reduction="rms",
        help="L2 norm of the unsharded parameters after the log step.",
    ),
    Metric(
        key="update_ratio",
        unit="ratio",
        labels=("group",),
        reduction="rms",
        help="Norm of what the group's last step changed, decay included, over the norm of its parameters before.",
    ),
    Metric(
        key="dead_fraction",
        labels=("group",),
        overall=True,
        reduction="mean",
        help="Share of the numbers in the parameters whose gradient was exactly 0 on the log step (0 to 1).",
    ),
)

_SPEED = shown_on(
    "overview",
    Metric(
        key="clips_per_second",
        unit="clips/s",
        reduction="global",
        help="Clips of all ranks per second since the last log step, evaluation and checkpoints excluded.",
    ),
    Metric(
        key="flops_per_second",
        unit="flops/s",
        reduction="global",
        help="FLOPs of matrix products that all ranks execute a second, by the closed form of one clip.",
    ),
)

_RANKS = shown_on(
    "per node",
    Metric(
        key="step_seconds",
        unit="seconds",
        labels=("rank",),
        reduction="rank",
        help="Mean duration of a step since the last log step.",
    ),
    Metric(
        key="last_step_timestamp_seconds",
        unit="seconds",
        labels=("rank",),
        reduction="rank",
        help="Unix time of the rank's last log step; a stopped rank keeps its old value.",
    ),
    Metric(
        key="memory_bytes",
        unit="bytes",
        labels=("rank",),
        reduction="rank",
        help="Peak memory allocated by the rank on its device (resident set on CPU).",
    ),
)

_WAITING = shown_on(
    "data",
    Metric(
        key="data_wait_seconds",
        unit="seconds",
        reduction="mean",
        help="Mean time per step that a rank waited for its next batch.",
    ),
    Metric(
        key="data_wait_ratio",
        unit="ratio",
        reduction="mean",
        help="Share of the training time spent waiting for data (0 to 1).",
    ),
)

_CHECKPOINTS = shown_on(
    "checkpoints and reliability",
    Metric(
        key="checkpoint_seconds",
        unit="seconds",
        reduction="global",
        record="checkpoint",
        help="Time from the start of the last checkpoint to its commit.",
    ),
    Metric(
        key="last_checkpoint_timestamp_seconds",
        unit="seconds",
        reduction="global",
        record="checkpoint",
        help="Unix time of the last committed checkpoint.",
    ),
    Metric(
        key="last_checkpoint_step",
        unit="steps",
        reduction="global",
        record="checkpoint",
        help="Step of the last committed checkpoint.",
    ),
)

_FAST_WEIGHTS = shown_on(
    "optimizer and memories",
    Metric(
        key="memory_surprise",
        labels=("frame",),
        overall=True,
        reduction="mean",
        help="Squared distance of a write's prediction and target over the sum of their squares (0 to 2); frame is the "
        "first of those written.",
    ),
    Metric(
        key="memory_fast_norm_ratio",
        unit="ratio",
        labels=("memory",),
        label_values=MEMORIES,
        reduction="mean",
        help="Norm of a memory's input matrix after a clip's last write over its trained norm; clips too short for all "
        "writes are left out.",
    ),
    Metric(
        key="memory_drift",
        labels=("memory",),
        label_values=MEMORIES,
        reduction="mean",
        help="Norm of the change of that matrix since the start of the clip over its trained norm.",
    ),
    Metric(
        key="memory_write_ratio",
        unit="ratio",
        labels=("memory",),
        label_values=MEMORIES,
        reduction="mean",
        help="Norm of a write, as limited, over the norm of what it is written into; mean over writes that happened.",
    ),
    Metric(
        key="memory_limited_ratio",
        unit="ratio",
        labels=("memory",),
        label_values=MEMORIES,
        reduction="mean",
        help="Share of matrices written whose change was above model.memory.write_limit before it was limited.",
    ),
    Metric(
        key="memory_retention",
        reduction="mean",
        help="Share of the memories that a write keeps: all of it behind the surprise gate (1 forgets nothing).",
    ),
    Metric(
        key="memory_retention_min",
        reduction="mean",
        help="Smallest such share of a clip, of all its writes, heads and blocks; mean over clips.",
    ),
    Metric(
        key="memory_step_size",
        reduction="mean",
        help="Step size of a write, summed over its tokens (0 to model.memory.eta_max).",
    ),
    Metric(
        key="memory_step_size_p99",
        reduction="mean",
        help="99th percentile of the step sizes of a write's tokens, times their number; mean over writes.",
    ),
    Metric(
        key="memory_gate_rate",
        reduction="mean",
        help="Share of writes whose surprise was at least model.memory.surprise_gate, so that they happened.",
    ),
    Metric(
        key="memory_longterm_gate",
        reduction="mean",
        help="Share of what long-term memories (model.longterm) recall that is added, mean over tokens and blocks.",
    ),
)

_CONTINUUM_MEMORY = shown_on(
    "optimizer and memories",
    Metric(
        key="cms_active_frames",
        unit="frames",
        labels=("level",),
        reduction="global",
        help="Frames of a clip of full length that the level touches.",
    ),
    Metric(
        key="cms_output_ratio",
        unit="ratio",
        labels=("level",),
        reduction="mean",
        help="Norm of what the level adds to a frame's tokens over their norm before, over the frames it touches.",
    ),
    Metric(
        key="cms_parameter_steps_total",
        kind="counter",
        rewinds=True,
        unit="steps",
        labels=("level",),
        reduction="global",
        help="Steps the level's matrices have taken: one in every period of their optimizer group.",
    ),
)

_EVALUATION = shown_on(
    "overview",
    Metric(
        key="skill",
        labels=("kind",),
        label_values=("one_step", "far", "jump", "context"),
        reduction="global",
        record="eval",
        help="1 - error / baseline error on held-out clips: 0 is copy-last, 1 is perfect.",
    ),
    Metric(
        key="identity_ratio",
        unit="ratio",
        labels=("kind",),
        label_values=("one_step", "far", "jump", "context"),
        reduction="global",
        record="eval",
        help="Error over that of copying the last known frame on held-out clips: 1 - skill, above 1 copying is better.",
    ),
    Metric(
        key="action_sensitivity",
        reduction="global",
        record="eval",
        help="One-step error with another clip's actions minus that with the true ones; 0 is a model blind to actions.",
    ),
)

_IDENTITY = shown_on(
    "overview",
    Metric(
        key="run_info",
        labels=("version", "torch", "config_hash", "incarnation"),
        reduction="global",
        record="info",
        help="Always 1; its labels say which code and configuration run.",
    ),
)

CATALOG: tuple[Metric, ...] = (
    *_PROGRESS,
    *_LOSSES,
    *_OPTIMIZATION,
    *_SPEED,
    *_RANKS,
    *_WAITING,
    *READER_METRICS,
    *SHARDER_METRICS,
    *_CHECKPOINTS,
    *RELIABILITY_METRICS,
    *_FAST_WEIGHTS,
    *_CONTINUUM_MEMORY,
    *_EVALUATION,
    *_IDENTITY,
)

_BY_KEY: Mapping[str, Metric] = MappingProxyType({metric.key: metric for metric in CATALOG})


def by_key(key: str) -> Metric:
    """The metric recorded under `key`.

    Raises:
        UnknownMetric: the catalog has no such key.
    """
    metric = _BY_KEY.get(key)
    if metric is None:
        raise UnknownMetric(f"no metric is called {key!r}{nearest(key, _BY_KEY)}")
    return metric


def nearest(word: str, known: Mapping[str, object] | tuple[str, ...]) -> str:
    """A hint such as "; nearest known: 'loss'", for the end of an error message."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)
    return f"; nearest known: {matches[0]!r}" if matches else ""


def flat_key(metric: Metric, label_value: str | None) -> str:
    """Name of one number in `metrics.jsonl` and TensorBoard, for example `skill_one_step`."""
    return metric.key if label_value is None else f"{metric.key}_{label_value}"


def markdown_table(catalog: Sequence[Metric] = CATALOG) -> str:
    """The catalog as a Markdown table, as it stands in this package's README."""
    rows = ["| name | kind | unit | over ranks | dashboard | meaning |", "|---|---|---|---|---|---|"]
    for metric in catalog:
        labels = "{" + ", ".join(metric.labels) + "}" if metric.labels else ""
        what = (metric.kind, metric.unit or "-", metric.reduction, metric.dashboard or "-", metric.help)
        rows.append(f"| `{metric.name}{labels}` | {' | '.join(what)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(markdown_table(), end="")
