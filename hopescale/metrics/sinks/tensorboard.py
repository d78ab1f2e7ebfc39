"""TensorBoard event files in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import missing_extra

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def summary_writer() -> type[SummaryWriter]:
    """TensorBoard's writer.

    Raises:
        MissingExtra: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise missing_extra("tensorboard", "tensorboard", "metrics.tensorboard=true") from error
    return SummaryWriter


class TensorboardSink:
    """Writes each number as a scalar called `kind/key`.

    Args:
        folder: where the event files go.
        start_step: last step of the checkpoint the run continues from; later points of an earlier process are hidden.

    Raises:
        MissingExtra: tensorboard is not installed.
    """

    def __init__(self, folder: Path, *, start_step: int = 0) -> None:
        self._writer = summary_writer()(str(folder), purge_step=start_step + 1 if start_step > 0 else None)

    def write(self, step: int, kind: str, values: Mapping[str, float], time: float) -> None:
        """Queues the scalars; a background thread writes them."""
        for key, value in values.items():
            self._writer.add_scalar(f"{kind}/{key}", value, global_step=step, walltime=time)

    def close(self) -> None:
        """Writes what is queued and closes the files."""
        self._writer.close()
