"""Nodes that were started with other numbers end within seconds, each with the reason."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.requires("2ranks")]


def test_nodes_of_other_world_sizes_are_told_so(demo_shaped_data: Path, tmp_path: Path, free_port: int) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    settings = ["experiment=demo", f"data.path={demo_shaped_data}", f"run.dir={tmp_path / 'run'}", "metrics.port=0"]
    command = [sys.executable, "-m", "hopescale.train", *settings, "metrics.tensorboard=false"]
    # Three nodes of one rank each, of which the first was told that there are two.
    sizes, alone = ("2", "3", "3"), {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    nodes = [{"RANK": str(rank), "WORLD_SIZE": size, **alone} for rank, size in enumerate(sizes)]
    started = [
        subprocess.Popen(command, env={**os.environ, **place, **node}, stderr=subprocess.PIPE, text=True)
        for node in nodes
    ]
    try:
        for process in started:
            _, told = process.communicate(timeout=120)
            assert process.returncode == 2, told
            assert re.search("2 by rank 0 on|2 ranks are expected by rank 0", told), told
            assert "Fix: start every node with the same numbers" in told
    finally:
        for process in started:
            process.kill()
