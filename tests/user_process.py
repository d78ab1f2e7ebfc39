"""Programs as a user starts them: processes of their own that find this checkout."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")
"""Before a command: the kernel kills it when the process that started it dies, however that happens."""
REPO_ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1"}


def run_as_user(command: Sequence[str], folder: Path, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder to its end; exit code and output, whatever they are."""
    return subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False
    )
