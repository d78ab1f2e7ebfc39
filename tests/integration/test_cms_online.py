"""CMS levels that learn within a clip: what a run scored at its last step is what its checkpoint scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

# Half of the full strength at the last of six steps.
ONLINE = [
    "model.cms={mode: online, levels: [{period: 1, hidden_multiplier: 1.0}]}",
    "model.cms.online={teach_scale: 1000.0, warmup_steps: 2, decay_start: 4, decay_end: 8}",
    "parallel.recompute=block",
    "train.eval_every=6",
]


def test_an_evaluation_teaches_as_strongly_as_the_step_of_its_checkpoint(hopescale, small_run, tmp_path: Path) -> None:
    trained = hopescale("train", *small_run, *ONLINE)
    assert trained.returncode == 0, trained.stderr
    evaluated = hopescale("eval", str(tmp_path / "run"))
    assert evaluated.returncode == 0, evaluated.stderr

    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (scored,) = (record for record in map(json.loads, lines) if record["kind"] == "eval")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert scored["step"] == result["run"]["step"] == 6
    for name in ("skill_one_step", "skill_far", "skill_jump"):
        assert result[name] == pytest.approx(scored[name], abs=1e-7)
    # What was learned within the clips shows far above that, or any strength would have given the same.
    assert result["writes_off_ratio_context"] > 1 + 5e-4
