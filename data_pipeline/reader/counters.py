"""Numbers that several threads add to."""

from __future__ import annotations

import threading
from dataclasses import asdict
from typing import Any

from data_pipeline.stats import ReaderStats


class Counters:
    """Running totals of a reader."""

    def __init__(self) -> None:
        """Start at zero."""
        self._lock = threading.Lock()
        self._totals: dict[str, Any] = asdict(ReaderStats())

    def add(self, **amounts: float) -> None:
        """Add to some totals, named as in `ReaderStats`."""
        with self._lock:
            for name, amount in amounts.items():
                self._totals[name] += amount

    def set(self, **values: float) -> None:
        """Replace numbers that say how things are now."""
        with self._lock:
            self._totals.update(values)

    def stats(self) -> ReaderStats:
        """Return all of them as they are now."""
        with self._lock:
            return ReaderStats(**self._totals)
