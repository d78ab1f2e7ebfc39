"""What a sink offers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Sink(Protocol):
    """Takes the numbers of one log step; lives on rank 0 only."""

    def write(self, step: int, kind: str, values: Mapping[str, float], time: float) -> None:
        """Publishes one record.

        Args:
            step: optimizer step the values belong to.
            kind: `train`, `eval` or `checkpoint`.
            values: catalog key (label value appended) -> number, which may be NaN or infinite.
            time: Unix seconds.

        Raises:
            OSError: the record could not be stored; the recorder reports it and training goes on.
        """
        ...

    def close(self) -> None:
        """Flushes and releases files; the sink is not used afterwards."""
        ...
