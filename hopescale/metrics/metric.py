"""What one metric is: a row of the catalog."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

PREFIX = "hopescale_"

Kind = Literal["gauge", "counter"]
Reduction = Literal["mean", "rms", "sum", "rank", "global"]
Record = Literal["train", "eval", "checkpoint", "shard", "info"]
Dashboard = Literal["overview", "optimizer and memories", "data", "checkpoints and reliability", "per node"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One row of the catalog.

    Attributes:
        key: name in `metrics.jsonl` and TensorBoard; a label value is appended to it after an underscore.
        kind: Prometheus type.
        unit: `seconds`, `bytes` and `ratio` are also the suffix of the key; "" where the number has no unit.
        help: one sentence.
        labels: Prometheus label names.
        label_values: the values of the one label where they are fixed in code; those of `OF_THE_RUN` come from the run.
        rewinds: a counter that a resume sets back to what the checkpoint says, which Prometheus would take for a new
            count from 0.
        overall: may also be recorded without its label: key alone in `metrics.jsonl`, label value `all` in Prometheus.
        reduction: over ranks: `mean` = sum / count, `rms` = its root, where squares are summed up, `sum`, `rank` = kept
            per rank (files hold the mean), `global` = the same on all ranks, taken from rank 0.
        record: the kind of flush that publishes it; `info` goes to Prometheus only, `shard` to the sharder's text file.
        dashboard: where people see it; `shown_on` sets it for all metrics of a subject. None for what is of no run.
    """

    key: str
    kind: Kind = "gauge"
    unit: str = ""
    help: str
    labels: tuple[str, ...] = ()
    label_values: tuple[str, ...] = ()
    rewinds: bool = False
    overall: bool = False
    reduction: Reduction
    record: Record = "train"
    dashboard: Dashboard | None = "overview"

    @property
    def name(self) -> str:
        """Prometheus name."""
        return PREFIX + self.key


def shown_on(dashboard: Dashboard | None, *metrics: Metric) -> tuple[Metric, ...]:
    """Rows of the catalog that belong to one dashboard."""
    return tuple(replace(metric, dashboard=dashboard) for metric in metrics)
