"""Log lines: every rank into its own file, the first also onto the console."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def log_to(path: Path, *, console: bool) -> None:
    """Send log records of hopescale and data_pipeline to a file, and to stderr where asked."""
    handlers: list[logging.Handler] = [logging.FileHandler(path)]
    handlers[0].setFormatter(logging.Formatter(FORMAT))
    if console:
        handlers.append(logging.StreamHandler(sys.stderr))
        handlers[1].setFormatter(logging.Formatter("%(message)s"))
    for name in ("hopescale", "data_pipeline"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = handlers, False
        log.setLevel(logging.INFO)


def close_files() -> None:
    """Write no more into files, so that they may be removed; the console goes on."""
    for name in ("hopescale", "data_pipeline"):
        log = logging.getLogger(name)
        files = [handler for handler in log.handlers if isinstance(handler, logging.FileHandler)]
        log.handlers = [handler for handler in log.handlers if handler not in files]
        for handler in files:
            handler.close()
