from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from hopescale.checkpoint import contents
from hopescale.checkpoint.manager import load_tensors
from hopescale.checkpoint.manifest import verify
from hopescale.config.compose import load_config, validate
from hopescale.errors import ConfigError, UserError
from hopescale.import_checkpoint import import_checkpoint
from hopescale.model.build import build_predictor
from hopescale.model.compat import AcHopePredictor
from hopescale.model.init import initialise
from hopescale.model.schema import ModelConfig
from tests.earlier_state import earlier_state

SIZES = [
    "model.encoder_dim=16",
    "model.grid=[3,3]",
    "model.frames=5",
    "model.width=24",
    "model.block_pattern=[H,H]",
    "model.memory.hidden_multiplier=2.0",
]
LEVELS = "model.cms.levels=[{period: 1, hidden_multiplier: 2.0},{period: 3, hidden_multiplier: 1.0}]"
SMALL = ["model=ac_hope", *SIZES, LEVELS]


@pytest.fixture
def earlier() -> AcHopePredictor:
    model = build_predictor(load_config(SMALL).model)
    assert isinstance(model, AcHopePredictor)
    initialise(model, seed=7)
    return model


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Of a model with everything that sizes are read off."""
    return earlier_state(build_predictor(load_config([*SMALL, "model.spatial_mixing=true"]).model))


@pytest.fixture
def source(earlier: AcHopePredictor, tmp_path: Path) -> Path:
    path = tmp_path / "phase5.ckpt"
    torch.save({"state_dict": {f"model.{name}": t for name, t in earlier_state(earlier).items()}}, path)
    return path


def loaded(run: Path, step: int = 0) -> nn.Module:
    """The predictor of a run's checkpoint, as evaluation builds it."""
    folder = run / "checkpoints" / f"step-{step:09d}"
    model = build_predictor(validate(verify(folder)["config"]).model)
    load_tensors(folder, contents.tensors(model, None))
    return model


def test_an_imported_run_predicts_what_the_earlier_model_did(
    source: Path, earlier: AcHopePredictor, tmp_path: Path
) -> None:
    result = import_checkpoint(source, tmp_path / "run", SMALL)
    features, actions = torch.randn(2, 4, 9, 16), torch.randn(2, 4, 2)
    assert torch.equal(loaded(tmp_path / "run")(features, actions).frames, earlier(features, actions).frames)
    assert result["parameters"] == sum(p.numel() for p in earlier.parameters())
    assert result["unused"] == ["extrinsics_encoder.weight", "extrinsics_encoder.bias"]
    assert result["step"] == 0


def test_what_is_taken_on_trust_is_named(source: Path, tmp_path: Path) -> None:
    changed = ["model.ac_hope.rope_heads=4", "model.ac_hope.surprise_threshold=0.25", "model.memory.chunk_size=2"]
    notes = [
        import_checkpoint(source, tmp_path / name, [*SMALL, "model.memory.detach_interval=1", *settings])["note"]
        for name, settings in (("preset", []), ("changed", [*changed, "model.state_dim=2"]))
    ]
    assert all(
        "computes what the earlier predictor did, from fresh memories, if its run had " in note for note in notes
    )
    assert (
        "model.state_dim=0; model.memory.chunk_size=1; model.cms.levels.*.period=[1, 3]; model.ac_hope.clip_inner=1.0; "
        "model.ac_hope.surprise_threshold=0.1; model.ac_hope.rope_heads=0, " in notes[0]
    )
    assert "model.state_dim=2; model.memory.chunk_size=2; " in notes[1]
    assert "model.ac_hope.surprise_threshold=0.25; model.ac_hope.rope_heads=4; model.grid=[3, 3], " in notes[1]


def test_what_is_taken_on_trust_shapes_predictions_and_no_tensor(earlier: AcHopePredictor) -> None:
    torch.manual_seed(0)
    given = 3 * torch.randn(2, 4, 9, 16), torch.randn(2, 4, 2), torch.randn(2, 4, 2)
    fields = earlier.config.model_dump()
    levels = [dict(level, period=2 * level["period"]) for level in fields["cms"]["levels"]]
    for change in (
        {"state_dim": 2},
        {"memory": {"chunk_size": 2, "detach_interval": 1}},
        {"cms": {"levels": levels}},
        {"ac_hope": {"clip_inner": 0.001}},
        {"ac_hope": {"surprise_threshold": 1000.0}},
        {"ac_hope": {"rope_heads": 4}},
    ):
        merged = {name: fields[name] | value if isinstance(value, dict) else value for name, value in change.items()}
        other = build_predictor(ModelConfig.model_validate(fields | merged))
        other.load_state_dict(earlier.state_dict())
        assert not torch.equal(other(*given).frames, earlier(*given).frames), change


@pytest.mark.parametrize("shape", [(), (1, 1)], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "predictor_embed.weight",
        "action_encoder.weight",
        "frame_pos_embed.weight",
        "hope_blocks.0.M_k.w1.weight",
        "hope_blocks.0.spatial_mix.0.weight",
        "hope_blocks.0.cms.blocks.0.fc1.weight",
    ],
)
def test_a_tensor_of_another_shape_ends_in_an_error_that_names_it(
    state: dict[str, Tensor], name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    torch.save({**state, name: torch.zeros(shape)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=re.escape(f"{name} is {list(shape)}, to be ")):
        import_checkpoint(tmp_path / "x.pt", tmp_path / "run", [] if "cms" in name else [LEVELS])
    assert not (tmp_path / "run").exists()


def test_an_imported_run_is_a_run_folder(source: Path, tmp_path: Path) -> None:
    import_checkpoint(source, tmp_path / "run", [*SMALL, "train.steps=7"], step=300)
    manifest = verify(tmp_path / "run" / "checkpoints" / "step-000000300")
    assert (manifest["state"]["step"], manifest["state"]["attempted_steps"], manifest["state"]["data"]) == (
        300,
        300,
        {},
    )
    assert set(manifest["optimizer_steps"].values()) == {0}
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == manifest["config"]
    assert (tmp_path / "run" / "lock").exists()


def test_sizes_come_from_the_file_when_nothing_is_picked(source: Path, tmp_path: Path) -> None:
    import_checkpoint(source, tmp_path / "run", [LEVELS])
    model = loaded(tmp_path / "run")
    assert isinstance(model, AcHopePredictor)
    assert model.config == load_config(SMALL).model


def test_periods_are_asked_for(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        import_checkpoint(source, tmp_path / "run", [])
    (problem,) = caught.value.problems
    assert problem.field == "model.cms.levels"
    assert "{period: ?, hidden_multiplier: 2}, {period: ?, hidden_multiplier: 1}" in problem.fix
    assert not (tmp_path / "run").exists()


def test_weights_go_into_the_present_model_too(source: Path, earlier: AcHopePredictor, tmp_path: Path) -> None:
    result = import_checkpoint(source, tmp_path / "run", ["model.compat=none", LEVELS])
    model = loaded(tmp_path / "run")
    assert not isinstance(model, AcHopePredictor)
    ours, theirs = dict(model.named_parameters()), dict(earlier.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "another meaning" in result["note"]


def test_a_pick_of_another_size_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        import_checkpoint(source, tmp_path / "run", ["model=ac_hope"])
    words = str(caught.value)
    assert "lacks" in words
    assert "of another shape: " in words
    assert "predictor_embed.weight is [24, 16], to be [384, 1024]" in words
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_folder_in_use_is_left_alone(source: Path, tmp_path: Path, what: str) -> None:
    out = source if what == "file" else source.parent
    before = source.read_bytes()
    with pytest.raises(ConfigError) as caught:
        import_checkpoint(source, out, SMALL)
    assert caught.value.problems[0].field == "out"
    assert source.read_bytes() == before
