"""When a process was started. Imports the standard library only: health checks are started every few seconds."""

from __future__ import annotations

import os
from pathlib import Path


def seconds_after_boot(process: int | str) -> float:
    """How long the machine had been up when a process started.

    Args:
        process: number of the process, or `self`.

    Raises:
        OSError: there is no such process, or this is no Linux.
    """
    # The name, in brackets, may hold spaces; the 22nd field of all is the start, in clock ticks.
    after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(after_name[19]) / os.sysconf("SC_CLK_TCK")
