"""One rank of two gets a signal: both stop at the same step, and the run goes on to the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import REPO_ROOT, Torchrun
from tests.interruptions import curve, final_state
from tests.small_run import SMALL_MODEL, pack_small_data

pytestmark = [pytest.mark.distributed, pytest.mark.requires("2ranks")]

PROGRAM = REPO_ROOT / "tests" / "interruptions.py"
SETTINGS = (*SMALL_MODEL, "train.eval_every=2", "metrics.listen=off", "metrics.tensorboard=false")


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random clips of 6 tokens and 16 channels, 5 or 4 frames long."""
    return pack_small_data(tmp_path_factory.mktemp("small"))


def test_a_signal_to_one_rank_stops_all_in_the_same_evaluation(
    torchrun: Torchrun, small_data: Path, tmp_path: Path
) -> None:
    def train(run: Path, moment: str) -> dict:
        ended = torchrun(2, PROGRAM, moment, "1", *SETTINGS, f"data.path={small_data}", f"run.dir={run}")
        assert (run / "status.json").is_file(), ended.stderr
        return json.loads((run / "status.json").read_text())

    assert train(tmp_path / "whole", "never")["state"] == "finished"
    stopped = train(tmp_path / "run", "second evaluation")
    assert stopped == {"state": "preempted", "code": 75, "step": 4, "incarnation": 0}
    # Nothing was scored by one rank alone.
    assert [step for step, _ in curve(tmp_path / "run")["skill"]] == [2]
    assert train(tmp_path / "run", "never")["state"] == "finished"
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert final_state(tmp_path / "run") == final_state(tmp_path / "whole")
