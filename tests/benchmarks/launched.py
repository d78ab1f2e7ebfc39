"""Programs that a benchmark runs on several gloo ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPO_ROOT = Path(__file__).resolve().parents[2]


def launched(ranks: int, program: str, *arguments: str) -> Any:
    """What a program beside this file, run by torchrun with the path of a file and these arguments, leaves in it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seen.json"
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
        command += [str(Path(__file__).with_name(program)), str(out), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=REPO_ROOT, env=environment, check=True)
        return json.loads(out.read_text())
