"""What a run survived, under the names of the metrics catalog."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from hopescale.metrics.recorder import Recorder

from .goodput import Goodput, useful_share

logger = logging.getLogger(__name__)


def record_survival(recorder: Recorder, account: Goodput, folder: Path, failed_saves: int, ranks: int) -> None:
    """Set what rank 0 knows of this and of earlier incarnations.

    Args:
        recorder: takes the numbers; only rank 0's count.
        account: of this rank.
        folder: of the run.
        failed_saves: checkpoints of this incarnation that could not be written.
        ranks: of this incarnation.
    """
    seconds = account.seconds()
    for kind, spent in seconds.items():
        recorder.set("goodput_seconds_total", spent, kind=kind)
    goodput = useful_share(seconds)
    if goodput is not None:
        recorder.set("goodput_ratio", goodput)
    recorder.set("restarts_total", account.history.restarts)
    recorder.set("preemptions_total", account.history.preemptions)
    recorder.set("checkpoint_failures_total", failed_saves)
    recorder.set("ranks", ranks)
    try:
        recorder.set("disk_free_bytes", shutil.disk_usage(folder).free)
    except OSError as error:
        logger.warning("the room left for %s is unknown: %s", folder, error)
