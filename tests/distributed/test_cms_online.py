"""CMS levels that learn within a clip do the same on shards: every frame gathers the blocks anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.requires("2ranks")]

PROGRAM = Path(__file__).parent / "cms_online_program.py"


def test_sharded_levels_learn_as_the_unsharded_reference(torchrun, tmp_path: Path) -> None:
    out = tmp_path / "seen.json"
    run = torchrun(2, PROGRAM, str(out), "adamw", timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    seen = json.loads(out.read_text())

    assert seen["loss_error"] < 1e-6
    assert {n: e for n, e in seen["gradient_errors"].items() if e > 1e-5} == {}
    assert {n: e for n, e in seen["weight_errors"].items() if e > 1e-5} == {}
    assert seen["without_gradient"] == []
    assert seen["recompute_differs"] == []
