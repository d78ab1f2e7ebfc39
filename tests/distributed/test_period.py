"""Groups that step on summed gradients do the same on shards as on whole parameters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.requires("2ranks")]

PROGRAM = Path(__file__).parent / "period_program.py"


def test_sums_of_sharded_gradients_equal_the_unsharded_reference(torchrun, tmp_path: Path) -> None:
    out = tmp_path / "seen.json"
    run = torchrun(2, PROGRAM, str(out), timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    seen = json.loads(out.read_text())

    assert seen["groups"] == [
        *("titan", "cms_2", "cms_3", "attention", "projections", "embeddings", "vectors", "vectors_2", "vectors_3")
    ]
    assert {name: error for name, error in seen["errors"].items() if error > 1e-5} == {}
    assert seen["sharded"]
    # After four steps only what has a period of 3 waits for more.
    level = [f"cms.levels.1.{layer}.{kind}" for layer in ("fc1", "fc2", "norm") for kind in ("bias", "weight")]
    waiting = [f"optimizer/blocks.1.{name}/period_sum" for name in (*level, "memory.w1", "memory.w2")]
    assert seen["waiting"] == waiting
