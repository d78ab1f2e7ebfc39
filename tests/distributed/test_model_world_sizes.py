"""Loss and gradients of a step do not depend on how many ranks share its clips, whatever is chosen about memories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.requires("2ranks")]

PROGRAM = Path(__file__).parent / "model_program.py"
TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5}


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_add_up_to_the_unsharded_model(torchrun, tmp_path: Path, num_ranks: int) -> None:
    out = tmp_path / "seen.json"
    run = torchrun(num_ranks, PROGRAM, str(out), timeout=180)
    assert run.returncode == 0, run.stdout + run.stderr
    seen = json.loads(out.read_text())

    assert {"default", "so", "scan", "cut"} <= seen["fp64"].keys()
    for precision, variants in seen.items():
        for variant, found in variants.items():
            assert found["loss"] <= TOLERANCE[precision], (precision, variant)
            assert len(found["gradients"]) == found["parameters"], (precision, variant)
            wrong = {name: error for name, error in found["gradients"].items() if not error <= TOLERANCE[precision]}
            assert wrong == {}, (precision, variant)
