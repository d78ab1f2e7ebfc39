"""Collects numbers between two log steps and reduces them over ranks in one collective.

Sums and counts stay on the device until `flush`, which packs all of them into one float64 tensor, reduces it once and
divides last: ranks may hold different numbers of clips, so a mean of their means would be wrong.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from hopescale.metrics.catalog import (
    CATALOG,
    OF_THE_RUN,
    UnknownMetric,
    by_key,
    flat_key,
    nearest,
)
from hopescale.metrics.data_metrics import READER_STATS
from hopescale.metrics.metric import Metric
from hopescale.metrics.sinks.base import Sink
from hopescale.metrics.sinks.rank_file import RankFile, Sample
from hopescale.metrics.throughput import Window

logger = logging.getLogger(__name__)

_LABEL_VALUE = re.compile(r"[A-Za-z0-9_.+:-]{1,64}")

_Slot = tuple[str, str | None]
"""One number: metric key and the value of its label (None: the overall number, or no label)."""


class Recorder:
    """Takes numbers by catalog key, publishes them on log steps. Every rank holds one and calls `flush` alike.

    Args:
        sinks: written on rank 0 only; other ranks pass an empty sequence.
        rank: global rank.
        world_size: number of ranks.
        all_reduce: sums a tensor over ranks in place; None only when there is one rank.
        rank_file: this rank's file for the node's Prometheus endpoint, or None.
        labels: values of the labels of `catalog.OF_THE_RUN`, the same on all ranks; a label left out has none.
        device: where `add` accumulates; the device the collective works on.
        now: wall clock, Unix seconds.

    Raises:
        ValueError: several ranks without `all_reduce`, or labels that are not of the run, too many or no words.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        *,
        rank: int,
        world_size: int,
        all_reduce: Callable[[Tensor], object] | None,
        rank_file: RankFile | None,
        labels: Mapping[str, Sequence[str]] = MappingProxyType({}),
        device: torch.device | str = "cpu",
        now: Callable[[], float] = time.time,
    ) -> None:
        if world_size > 1 and all_reduce is None:
            raise ValueError(f"world_size={world_size} needs all_reduce")
        for name, values in labels.items():
            most, words = OF_THE_RUN.get(name, 0), all(_LABEL_VALUE.fullmatch(value) for value in values)
            if len(values) > most or not words:
                raise ValueError(f"label {name} takes at most {most} values matching {_LABEL_VALUE.pattern}: {values}")
        self._sinks = list(sinks)
        self._rank = rank
        self._all_reduce = all_reduce
        self._rank_file = rank_file
        self._labels = {name: tuple(values) for name, values in labels.items()}
        self._now = now
        # The packed layout depends on the catalog and the run's labels only, so it is the same on all ranks
        # whatever each of them recorded.
        self._layout: dict[str, list[_Slot]] = {
            kind: [slot for metric in CATALOG if metric.record == kind for slot in self._reduced_slots(metric)]
            for kind in ("train", "eval", "checkpoint")
        }
        self._index = {slot: (kind, i) for kind, slots in self._layout.items() for i, slot in enumerate(slots)}
        self._on_device = {
            kind: torch.zeros(2, len(slots), dtype=torch.float64, device=device) for kind, slots in self._layout.items()
        }
        self._on_host = {kind: _zeros(len(slots)) for kind, slots in self._layout.items()}
        self._replaced: dict[_Slot, float] = {}
        self._global: dict[_Slot, float] = {}
        self._latest: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._failing: set[int] = set()

    # ------------------------------------------------------------------------------------------------- recording
    def add(self, key: str, total: Tensor | float, count: Tensor | float = 1.0, **labels: str) -> None:
        """Accumulates `total` and `count` towards the next flush; never waits for the device.

        Args:
            key: a catalog key reduced by `mean` (or `rms`, or a gauge reduced by `sum`).
            total: sum over `count` things (their squares for `rms`), a tensor with one element on any device, or a
                number.
            count: how many things `total` sums up (clips, steps, seconds); may be 0.
            **labels: the metric's label, if it has one; without it the overall number.

        Raises:
            UnknownMetric: key or label value not in the catalog.
            ValueError: the metric is not accumulated, or `total` has more than one element.
        """
        slot = self._slot(_accumulated(key), labels)
        for row, value in enumerate((total, count)):
            if isinstance(value, Tensor):
                if value.numel() != 1:
                    raise ValueError(f"{key}: expected one element, got shape {tuple(value.shape)}")
                self._add_on_device(row, slot, value.reshape(1))
            else:
                kind, index = self._index[slot]
                self._on_host[kind][row][index] += value

    def add_each(self, key: str, totals: Tensor, counts: Tensor | Sequence[float]) -> None:
        """`add` for the values of the metric's label, all at once; never waits for the device.

        Args:
            key: a catalog key with a label, reduced by `mean` or `rms`.
            totals: one sum for each of the label's first values, in their order, on any device.
            counts: how many things each sums up, numbers or a tensor.

        Raises:
            UnknownMetric: key not in the catalog.
            ValueError: the metric is not accumulated, or the label has fewer values.
        """
        metric = _accumulated(key)
        values = self._label_values(metric)[: len(counts)]
        if not len(values) == len(counts) == len(totals):
            raise ValueError(f"{key}: {len(totals)} totals and {len(counts)} counts for {len(values)} label values")
        if not values:
            return
        self._add_on_device(0, (key, values[0]), totals)
        if isinstance(counts, Tensor):
            self._add_on_device(1, (key, values[0]), counts)
            return
        for value, count in zip(values, counts, strict=True):
            kind, index = self._index[key, value]
            self._on_host[kind][1][index] += count

    def set(self, key: str, value: float, **labels: str) -> None:
        """Sets a number the host knows: a `global` one, a running total, or this rank's part of a mean.

        The last value before a flush counts. `global` metrics are taken from rank 0. An `info` metric is published
        at once.

        Raises:
            UnknownMetric: key or label not in the catalog.
            ValueError: the metric is kept per rank, or a label value is not allowed.
        """
        metric = by_key(key)
        if metric.reduction == "rank":
            raise ValueError(f"{key} is kept per rank: use observe_rank")
        if metric.record == "info":
            self._set_info(metric, value, labels)
            return
        slot = self._slot(metric, labels)
        (self._global if metric.reduction == "global" else self._replaced)[slot] = float(value)

    def observe_rank(self, key: str, value: float) -> None:
        """Sets this rank's own number of a metric with the label `rank`.

        Raises:
            UnknownMetric: key not in the catalog.
            ValueError: the metric is not kept per rank.
        """
        metric = by_key(key)
        if metric.reduction != "rank":
            raise ValueError(f"{key} is not kept per rank: use add or set")
        self._replaced[(key, None)] = float(value)

    def record_window(self, window: Window) -> None:
        """Records step time, waiting and throughput of a `StepClock` window."""
        self.observe_rank("step_seconds", window.step_seconds)
        self.add("data_wait_seconds", window.wait_seconds, window.steps)
        self.add("data_wait_ratio", window.wait_seconds, window.seconds)
        self.set("clips_per_second", window.clips_per_second)

    def record_reader(self, stats: Any) -> None:
        """Records a `data_pipeline.stats.ReaderStats` of this rank (running totals).

        Raises:
            UnknownMetric: a field has no metric.
        """
        for field in dataclasses.fields(stats):
            if field.name not in READER_STATS:
                raise UnknownMetric(f"ReaderStats.{field.name} has no metric{nearest(field.name, READER_STATS)}")
            key, value = READER_STATS[field.name]
            labels = {} if value is None else {by_key(key).labels[0]: value}
            self.set(key, getattr(stats, field.name), **labels)

    # ------------------------------------------------------------------------------------------------ publishing
    def flush(self, step: int, kind: str = "train") -> dict[str, float]:
        """Reduces over ranks with at most one collective and publishes. All ranks call it at the same step.

        The only place that waits for the device.

        Args:
            step: optimizer step.
            kind: `train` publishes training metrics; `eval` evaluation results and `checkpoint` those of a checkpoint,
                both leaving training sums alone.

        Returns:
            Key -> number. Reduced numbers are the same on all ranks, which may decide by them; `global` ones are on
            rank 0 only.

        Raises:
            ValueError: another kind.
        """
        if kind not in self._layout:
            raise ValueError(f"kind={kind!r} must be one of {sorted(self._layout)}")
        now = self._now()
        if kind == "train":
            self.observe_rank("last_step_timestamp_seconds", now)
        own = {slot: value for slot, value in self._replaced.items() if self._index[slot][0] == kind}
        values = self._reduce(kind, own)
        # Every rank's dict is cleared, but only rank 0's global numbers count.
        of_kind = {slot: v for slot, v in self._global.items() if by_key(slot[0]).record == kind}
        self._global = {slot: v for slot, v in self._global.items() if slot not in of_kind}
        if self._rank == 0:
            values.update(of_kind)
        self._replaced = {slot: v for slot, v in self._replaced.items() if slot not in own}
        self._publish_to_node(step, kind, values, own, now)
        flat = {flat_key(by_key(key), label): values[key, label] for key, label in values}
        for sink in self._sinks:
            self._give(sink, step, kind, flat, now)
        return flat

    def announce(self) -> None:
        """Shows Prometheus what `set` was told of the whole run before the first log step, which publishes it again.

        A counter that is first seen with what it has already counted has not risen, and no alert fires.
        """
        if self._rank == 0:
            self._take_latest(self._global)
        self._write_rank_file(self._now())

    def close(self) -> None:
        """Closes the sinks and the rank file; the file's last content stays readable."""
        for sink in self._sinks:
            sink.close()
        if self._rank_file is not None:
            self._rank_file.close()

    # -------------------------------------------------------------------------------------------------- internals
    def _label_values(self, metric: Metric) -> tuple[str, ...]:
        """Neighbours in the packed tensor, in this order."""
        return metric.label_values or self._labels.get("".join(metric.labels), ())

    def _add_on_device(self, row: int, first: _Slot, values: Tensor) -> None:
        """Adds to totals (row 0) or counts (row 1), from a slot on."""
        kind, index = self._index[first]
        sums = self._on_device[kind]
        part = sums[row, index : index + len(values)]
        part.add_(values.detach().to(sums.device, sums.dtype, non_blocking=True))

    def _reduced_slots(self, metric: Metric) -> Iterable[_Slot]:
        """Places of a metric in the packed tensor; none when rank 0 alone decides its value."""
        if metric.reduction == "global":
            return
        if metric.overall or metric.labels in ((), ("rank",)):
            yield metric.key, None
        for value in self._label_values(metric):
            yield metric.key, value

    def _slot(self, metric: Metric, labels: dict[str, str]) -> _Slot:
        """Checks labels against the catalog and the group names."""
        if not labels and (metric.overall or not metric.labels):
            return metric.key, None
        if tuple(labels) != metric.labels:
            raise UnknownMetric(f"{metric.key} has the labels {metric.labels}, got {tuple(labels)}")
        (name, value), known = next(iter(labels.items())), self._label_values(metric)
        if value not in known:
            raise UnknownMetric(f"{metric.key} has no {name}={value!r}{nearest(value, known)}")
        return metric.key, value

    def _reduce(self, kind: str, own: dict[_Slot, float]) -> dict[_Slot, float]:
        """Sums over ranks, then divides. Slots that no rank recorded are left out."""
        slots = self._layout[kind]
        if not slots:
            return {}
        sums, counts = self._on_host[kind]
        for slot, value in own.items():
            index = self._index[slot][1]
            sums[index], counts[index] = value, 1.0
        device_sums = self._on_device[kind]
        packed = device_sums + torch.tensor([sums, counts], dtype=torch.float64).to(device_sums.device)
        device_sums.zero_()
        self._on_host[kind] = _zeros(len(slots))
        if self._all_reduce is not None:
            self._all_reduce(packed)
        totals, counts = packed.tolist()
        return {
            slot: _reduced(by_key(slot[0]).reduction, total, count)
            for slot, total, count in zip(slots, totals, counts, strict=True)
            if count > 0
        }

    def _set_info(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        if set(labels) != set(metric.labels):
            raise UnknownMetric(f"{metric.key} has the labels {metric.labels}, got {tuple(labels)}")
        for name, text in labels.items():
            if not _LABEL_VALUE.fullmatch(text):
                raise ValueError(f"{metric.key}: label {name}={text!r} must match {_LABEL_VALUE.pattern}")
        if self._rank == 0:
            self._latest[metric.key, tuple(labels.items())] = value
        self._write_rank_file(self._now())

    def _publish_to_node(
        self, step: int, kind: str, values: dict[_Slot, float], own: dict[_Slot, float], now: float
    ) -> None:
        """Hands the endpoint this rank's numbers, and on rank 0 also those of the whole job.

        Job-wide numbers come from one rank only, so that adding up over nodes does not count them twice.
        """
        if self._rank == 0:
            if kind == "train":
                self._latest["step", ()] = step
            self._take_latest(values)
        for (key, _), value in own.items():
            if by_key(key).reduction == "rank":
                self._latest[key, (("rank", str(self._rank)),)] = value
        self._write_rank_file(now)

    def _take_latest(self, values: Mapping[_Slot, float]) -> None:
        for (key, label), value in values.items():
            metric = by_key(key)
            if metric.reduction != "rank":
                labels = ((metric.labels[0], label or "all"),) if metric.labels else ()
                self._latest[key, labels] = value

    def _write_rank_file(self, now: float) -> None:
        if self._rank_file is not None:
            samples: list[Sample] = [(key, dict(labels), value) for (key, labels), value in self._latest.items()]
            self._rank_file.write(samples, time=now)

    def _give(self, sink: Sink, step: int, kind: str, flat: dict[str, float], now: float) -> None:
        """Writes to one sink; a full disk must not end the run, so the failure is reported once until it recovers."""
        try:
            sink.write(step, kind, flat, now)
        except OSError as error:
            if id(sink) not in self._failing:
                logger.warning("%s lost the record of step %d, training goes on: %s", type(sink).__name__, step, error)
            self._failing.add(id(sink))
        else:
            self._failing.discard(id(sink))


def _accumulated(key: str) -> Metric:
    metric = by_key(key)
    if metric.reduction not in ("mean", "rms", "sum") or metric.kind == "counter":
        raise ValueError(f"{key} ({metric.kind}, {metric.reduction}) is not accumulated: use set or observe_rank")
    return metric


def _reduced(reduction: str, total: float, count: float) -> float:
    if reduction == "sum":
        return total
    return math.sqrt(total / count) if reduction == "rms" else total / count


def _zeros(size: int) -> tuple[list[float], list[float]]:
    """Host sums and counts, nothing recorded yet."""
    return [0.0] * size, [0.0] * size
