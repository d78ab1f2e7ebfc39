"""The rows of the data benchmark: their targets, what was found, and how both are shown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: What is divided by what, or what is counted in which unit.
        must: Target such as `>= 0.85`, or empty.
        stretch: What would be better still, or empty.
    """

    name: str
    must: str = ""
    stretch: str = ""


RIVALS = ("webdataset", "litdata", "mosaicml-streaming", "zarr")
LOADER_WORKERS = (0, 2)

ROWS: dict[str, Row] = {
    "ring-1": Row("ring, one thread, no checksums: limit / ring", ">= 0.85", ">= 0.95"),
    "ring": Row("ring as configured, no checksums: limit / ring", ">= 0.85", ">= 0.95"),
    "ring-crc-1": Row("ring, one thread, checksums: limit / ring", ">= 0.70", ">= 0.85"),
    "ring-crc": Row("ring as configured, checksums: limit / ring", ">= 0.70", ">= 0.85"),
    "cpu-1": Row("ring, one thread, no checksums: processor seconds / the limit's", "<= 1.3", "<= 1.0"),
    "cpu": Row("ring as configured, no checksums: processor seconds / the limit's", "<= 1.3", "<= 1.0"),
    "cpu-crc-1": Row("ring, one thread, checksums: processor seconds / the limit's", "<= 1.8", "<= 1.3"),
    "cpu-crc": Row("ring as configured, checksums: processor seconds / the limit's", "<= 1.8", "<= 1.3"),
    "speed-up-1": Row("the same tars: webdataset + decode / ring, one thread, checksums", ">= 5", ">= 8"),
    "speed-up": Row("the same tars: webdataset + decode / ring as configured, checksums", ">= 5", ">= 8"),
    "random": Row("ring as configured, no checksums: in the shards' order / in a random one", ">= 0.95", ">= 1.0"),
    "view": Row("zero-copy view of a clip, pages untouched, no checksums: microseconds", "<= 100", "<= 30"),
    "verify": Row("verify, level crc, one thread: limit / verify", ">= 0.6", ">= 0.9"),
    "wait-1.1": Row("steps of 1.1 reads, checksums: share of the time spent waiting", "<= 0.05"),
    "wait-1.5": Row("steps of 1.5 reads, checksums: share of the time spent waiting", "<= 0.01"),
    "wait-3": Row("steps of 3 reads, checksums: share of the time spent waiting", "<= 0.01", "<= 0.002"),
    "memory": Row("resident memory of reading 11 epochs / (ring + index)", "<= 1.05", "<= 1.0"),
    "memory-growth": Row("growth of resident memory from epoch 1 to 11 / (ring + index)", "<= 0.05", "<= 0"),
    "ring-growth": Row("bytes of the ring after 11 epochs / planned", "<= 1.05", "<= 1.0"),
    "core": Row("sharder core, checksums only: plain write / core", ">= 0.65", ">= 0.77"),
    "core-writer": Row("sharder core, checksums only: webdataset ShardWriter / core", ">= 2", ">= 2.6"),
    "default": Row("sharder as configured: plain write / sharder", ">= 0.40", ">= 0.50"),
    "default-writer": Row("sharder as configured: webdataset ShardWriter / sharder", ">= 1.4"),
    "npy": Row("sharder from warm .npy files: cp of the files / sharder", ">= 0.35", ">= 0.50"),
    "scaling": Row("sharder from .npy: one process on one core / two on two", ">= 1.7", ">= 1.9"),
    "scaling-free": Row("sharder from .npy: one process on two cores / two on two"),
    "tar": Row("size of the tars / size of the values, less 1", "<= 0.003", "<= 0.001"),
    "resume-start": Row("{resume_rows} samples, position 0: seconds from state to first batch", "< 2", "< 0.7"),
    "resume-middle": Row("{resume_rows} samples, mid-epoch: seconds from state to first batch", "< 2", "< 0.7"),
    "resume-far": Row("{resume_rows} samples, epoch 10,000: seconds from state to first batch", "< 2", "< 0.7"),
    "resume-open": Row("{resume_rows} samples, mid-epoch: the same, opening the data set included", "< 2", "< 0.7"),
    "resume-spread": Row("{resume_rows} samples: slowest / fastest of the three positions", "<= 2"),
    "order-1": Row("order of {order_1}: seconds", "< 1"),
    "order-10": Row("order of {order_10}: seconds", "< 6"),
    **{
        f"{rival}-{workers}": Row(f"{rival}, DataLoader with {workers} workers: limit / reader")
        for rival in RIVALS
        for workers in LOADER_WORKERS
    },
}


@dataclass
class Table:
    """What the rounds have found.

    Attributes:
        judged: Whether figures are compared with targets.
        sizes: Texts that names are filled in with.
    """

    judged: bool
    sizes: dict[str, str]
    _values: dict[str, list[float]] = field(default_factory=dict)
    _notes: dict[str, str] = field(default_factory=dict)

    def add(self, row: str, value: float) -> None:
        """Take the figure of one round.

        Raises:
            KeyError: No such row.
        """
        if row not in ROWS:
            raise KeyError(row)
        self._values.setdefault(row, []).append(value)

    def excuse(self, rows: Iterable[str], reason: str) -> None:
        """Say why rows have no figures, or not those of every round."""
        self._notes |= dict.fromkeys(rows, reason)

    def lines(self) -> list[dict[str, Any]]:
        """Return one object a row: name, ratio (median of the rounds), range, must, stretch, met and note."""
        return [self._line(name, row) for name, row in ROWS.items()]

    def text(self) -> str:
        """Return the table as it is printed."""
        lines = self.lines()
        widest = max(len(line["name"]) for line in lines)
        shown = [f"{'what':<{widest}}{'figure':>9}  {'range':<24}{'must':<9}{'met':<5}stretch"]
        for line in lines:
            if line["ratio"] is None:
                shown.append(f"{line['name']:<{widest}}{'-':>9}  {line['note']}")
                continue
            low, high = line["range"]
            met = "" if line["met"] is None else "yes" if line["met"] else "NO"
            figures = f"{line['ratio']:>9.3g}  {f'{low:.3g} to {high:.3g}':<24}"
            text = f"{line['name']:<{widest}}{figures}{line['must']:<9}{met:<5}{line['stretch']:<9}{line['note']}"
            shown.append(text.rstrip())
        return "\n".join(shown)

    def _line(self, row_name: str, row: Row) -> dict[str, Any]:
        values = self._values.get(row_name, [])
        median = statistics.median(values) if values else None
        judged = self.judged and bool(row.must) and median is not None
        return {
            "name": row.name.format(**self.sizes),
            "ratio": median,
            "range": [min(values), max(values)] if values else None,
            "must": row.must,
            "stretch": row.stretch,
            "met": holds(median, row.must) if judged and median is not None else None,
            "note": self._notes.get(row_name, ""),
        }


def holds(value: float, target: str) -> bool:
    """Return whether a figure meets a target such as `<= 1.3`."""
    sign, _, bound = target.partition(" ")
    return {">=": value >= float(bound), "<=": value <= float(bound), "<": value < float(bound)}[sign]
