"""From a checkpoint of the earlier predictor to a run that trains on and is evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from hopescale.config.compose import load_config
from hopescale.model.build import build_predictor
from hopescale.model.init import initialise
from tests.earlier_state import earlier_state

pytestmark = pytest.mark.integration

SETTINGS = [
    "model=ac_hope",
    "model.encoder_dim=16",
    "model.grid=[2,3]",
    "model.frames=5",
    "model.width=24",
    "model.block_pattern=[H,H]",
    "objective.jump_horizons=2",
    "train.global_batch=4",
    "train.steps=3",
    "metrics.every=1",
    "metrics.port=0",
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = build_predictor(load_config(SETTINGS).model)
    initialise(model, seed=1)
    lightning = {
        "state_dict": {f"module.{name}": value for name, value in earlier_state(model).items()},
        "hyper_parameters": {
            "betas": OmegaConf.create([0.9, 0.999]),
            "net": OmegaConf.create({"cms": [{"period": 1}]}),
        },
    }
    torch.save(lightning, tmp_path / "old.ckpt")
    return tmp_path / "old.ckpt"


def test_an_imported_run_trains_on_and_is_evaluated(hopescale, small_data: Path, source: Path, tmp_path: Path) -> None:
    imported = hopescale("import-checkpoint", str(source), "run", *SETTINGS, "--json")
    assert imported.returncode == 0, imported.stderr
    assert json.loads(imported.stdout.splitlines()[-1])["checkpoint"] == "run/checkpoints/step-000000000"

    trained = hopescale("train", *SETTINGS, "run.dir=run", f"data.path={small_data}")
    assert trained.returncode == 0, trained.stderr
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert "resumed from run/checkpoints/step-000000000 at step 0" in log
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"

    evaluated = hopescale("eval", "run", f"data.path={small_data}", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    result = json.loads(evaluated.stdout.splitlines()[-1])
    assert result["run"]["step"] == 3
    assert result["run"]["block_pattern"] == "H-H"
    assert isinstance(result["skill_one_step"], float)


def test_more_than_one_rank_is_refused_before_any_is_joined(torchrun, small_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = torchrun(2, "hopescale.train", *SETTINGS, f"data.path={small_data}", f"run.dir={run}")
    assert ended.returncode != 0
    assert "model.memory.scope=batch" in ended.stderr
    assert "spread over 2 ranks" in ended.stderr
    assert "Traceback" not in ended.stderr.partition("error: ")[2].partition("\n")[0]
    assert not run.exists()


def test_a_file_that_does_not_fit_ends_in_one_error(hopescale, tmp_path: Path) -> None:
    torch.save({"predictor_embed.weight": torch.zeros(24, 16)}, tmp_path / "old.pt")
    ended = hopescale("import-checkpoint", "old.pt", "run", *SETTINGS)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: checkpoint=old.pt: lacks ")
    assert "hope_blocks.1.M_memory.norm.bias" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()
