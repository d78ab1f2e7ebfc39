from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from hopescale.checkpoint.earlier_names import (
    ForeignCheckpoint,
    convert,
    inferred_sizes,
    level_multipliers,
    origin,
    read_tensors,
)
from hopescale.model.build import build_predictor
from hopescale.model.init import initialise
from hopescale.model.schema import ModelConfig
from tests.earlier_state import earlier_state

SMALL: dict[str, Any] = {
    "encoder_dim": 10,
    "grid": (3, 3),
    "frames": 5,
    "action_dim": 3,
    "width": 24,
    "block_pattern": ("H", "H"),
    "memory": {"hidden_multiplier": 2.0, "scope": "batch"},
    "cms": {"levels": [{"period": 1, "hidden_multiplier": 2.0}, {"period": 2, "hidden_multiplier": 1.5}]},
    "spatial_mixing": True,
    "output": "absolute",
    "compat": "ac_hope",
}

State = dict[str, Tensor]

MISSHAPEN: list[tuple[int, ...]] = [(), (7,), (0,), (0, 24), (24, 0), (1, 1), (2, 3, 5)]
"""Shapes that no tensor of the small model has."""


@pytest.fixture
def model() -> nn.Module:
    built = build_predictor(ModelConfig.model_validate(SMALL))
    initialise(built, seed=5)
    return built


@pytest.fixture
def state(model: nn.Module) -> State:
    return earlier_state(model)


@pytest.fixture
def refusal(model: nn.Module) -> Callable[[State], ForeignCheckpoint]:
    def refuse(state: State) -> ForeignCheckpoint:
        with pytest.raises(ForeignCheckpoint) as caught:
            convert(state, model, Path("x.ckpt"))
        assert caught.value.exit_code == 2
        return caught.value

    return refuse


def test_every_parameter_comes_back_under_its_name(model: nn.Module, state: State) -> None:
    conversion = convert(state, model, Path("x.ckpt"))
    parameters = dict(model.named_parameters())
    assert conversion.tensors.keys() == parameters.keys()
    assert all(torch.equal(conversion.tensors[name], p) for name, p in parameters.items())
    assert conversion.unused == ["extrinsics_encoder.weight", "extrinsics_encoder.bias"]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("embed.bias", ["predictor_embed.bias"]),
        ("state_encoder.weight", ["state_encoder.weight"]),
        ("frame_position.weight", ["frame_pos_embed.weight"]),
        ("norm.weight", ["predictor_norm.weight"]),
        ("blocks.3.norm1.bias", ["hope_blocks.3.norm1.bias"]),
        ("blocks.3.memory.query.weight", ["hope_blocks.3.q_proj.weight"]),
        ("blocks.3.memory.out.bias", ["hope_blocks.3.out_proj.bias"]),
        ("blocks.12.cms.levels.2.fc1.weight", ["hope_blocks.12.cms.blocks.2.fc1.weight"]),
        ("blocks.0.spatial_mixing.second.weight", ["hope_blocks.0.spatial_mix.2.weight"]),
        ("blocks.0.memory.longterm.w1", ["hope_blocks.0.M_longterm.w1.weight"]),
        ("blocks.0.memory.longterm.gate.bias", ["hope_blocks.0.longterm_gate.bias"]),
        (
            "blocks.0.memory.w2",
            [f"hope_blocks.0.{m}.w2.weight" for m in ("M_k", "M_v", "M_eta", "M_alpha", "M_memory")],
        ),
    ],
)
def test_names_are_those_of_the_earlier_code(ours: str, theirs: list[str]) -> None:
    assert origin(ours).names == theirs


def test_other_types_become_fp32(model: nn.Module, state: State) -> None:
    conversion = convert({name: value.bfloat16() for name, value in state.items()}, model, Path("x.ckpt"))
    assert {value.dtype for value in conversion.tensors.values()} == {torch.float32}


def test_all_that_does_not_fit_is_named_in_one_error(state: State, refusal: Callable[..., ForeignCheckpoint]) -> None:
    del state["predictor_norm.bias"], state["hope_blocks.1.M_eta.w1.weight"]
    state["hope_blocks.2.norm1.weight"] = torch.zeros(24)
    state["attn.qkv.weight"] = torch.zeros(3, 3)
    state["hope_blocks.0.M_k.w2.weight"] = torch.zeros(24, 96)
    state["predictor_embed.weight"] = torch.zeros(24, 11)
    state["hope_blocks.0.q_proj.weight"][0, 0] = torch.nan
    missing, extra, shapes, broken = (str(problem) for problem in refusal(state).problems)
    assert "lacks 2 of" in missing
    assert "predictor_norm.bias" in missing
    assert "hope_blocks.1.M_eta.w1.weight" in missing
    assert "holds 2 tensors the configuration has no place for: attn.qkv.weight, hope_blocks.2.norm1.weight" in extra
    assert "hope_blocks.0.M_k.w2.weight is [24, 96], to be [24, 48]" in shapes
    assert "predictor_embed.weight is [24, 11], to be [24, 10]" in shapes
    assert "not finite: hope_blocks.0.q_proj.weight" in broken


def test_a_long_term_memory_is_refused_by_name(state: State, refusal: Callable[..., ForeignCheckpoint]) -> None:
    state["hope_blocks.0.M_longterm.w1.weight"] = torch.zeros(48, 24)
    state["hope_blocks.0.longterm_gate.bias"] = torch.zeros(1)
    (problem,) = refusal(state).problems
    assert "long-term memory" in problem.rule
    assert "M_longterm.w1.weight" in problem.rule
    assert "experiment=phase6" in problem.fix


def test_a_long_term_memory_goes_into_the_present_model(state: State) -> None:
    present = {**SMALL, "compat": "none", "memory": {"hidden_multiplier": 2.0}, "state_dim": 3}
    model = build_predictor(ModelConfig.model_validate(present | {"longterm": {"hidden_multiplier": 3.0}}))
    for block in ("hope_blocks.0", "hope_blocks.1"):
        shapes = {"w1.weight": (72, 24), "w2.weight": (24, 72), "norm.weight": (24,), "norm.bias": (24,)}
        state |= {f"{block}.M_longterm.{name}": torch.randn(shape) for name, shape in shapes.items()}
        state |= {f"{block}.longterm_gate.weight": torch.randn(1, 24), f"{block}.longterm_gate.bias": torch.randn(1)}
    tensors = convert(state, model, Path("x.ckpt")).tensors
    assert torch.equal(tensors["blocks.1.memory.longterm.w2"], state["hope_blocks.1.M_longterm.w2.weight"][None, None])
    assert torch.equal(tensors["blocks.1.memory.longterm.gate.bias"], state["hope_blocks.1.longterm_gate.bias"])


def test_the_encoder_nothing_used_is_taken_where_there_is_one(state: State) -> None:
    present = {**SMALL, "compat": "none", "memory": {"hidden_multiplier": 2.0}, "state_dim": 3, "extrinsics_dim": 2}
    model = build_predictor(ModelConfig.model_validate(present))
    state["extrinsics_encoder.bias"] += 1
    conversion = convert(state, model, Path("x.ckpt"))
    assert conversion.unused == []
    assert torch.equal(conversion.tensors["extrinsics_encoder.bias"], torch.ones(24))


def test_sizes_are_read_off_the_tensors(state: State) -> None:
    assert inferred_sizes(state) == {
        "encoder_dim": 10,
        "grid": [3, 3],
        "frames": 5,
        "action_dim": 3,
        "width": 24,
        "block_pattern": ["H", "H"],
        "memory.hidden_multiplier": 2.0,
        "spatial_mixing": True,
        "temporal_embeddings": True,
    }
    assert level_multipliers(state) == [2.0, 1.5]
    assert inferred_sizes({}) == {"spatial_mixing": False, "temporal_embeddings": False}


def test_no_tensor_of_another_shape_goes_unnamed(state: State, refusal: Callable[..., ForeignCheckpoint]) -> None:
    sizes, multipliers = inferred_sizes(state), level_multipliers(state)
    for name, tensor in state.items():
        if name.startswith("extrinsics"):
            continue
        for shape in MISSHAPEN:
            changed = {**state, name: tensor.new_zeros(shape)}
            (problem,) = refusal(changed).problems
            assert problem.rule == (
                f"holds 1 tensors of another shape: {name} is {list(shape)}, to be {list(tensor.shape)}"
            )
            # What such a tensor would tell is left out; the others tell what they did.
            told = inferred_sizes(changed)
            assert told.items() <= sizes.items()
            assert {"width", "temporal_embeddings", "spatial_mixing", "block_pattern"} <= told.keys()
            assert level_multipliers(changed) in (multipliers, [])


@pytest.mark.parametrize(
    ("name", "shape", "field"),
    [
        ("predictor_embed.weight", (24,), "encoder_dim"),
        ("predictor_embed.weight", (24, 0), "encoder_dim"),
        ("action_encoder.weight", (), "action_dim"),
        ("frame_pos_embed.weight", (3, 24), "frames"),
        ("hope_blocks.0.M_k.w1.weight", (), "memory.hidden_multiplier"),
        ("hope_blocks.0.spatial_mix.0.weight", (1, 1), "grid"),
        ("hope_blocks.0.spatial_mix.0.weight", (12, 12), "grid"),
    ],
)
def test_a_size_that_cannot_be_is_not_read_off(state: State, name: str, shape: tuple[int, ...], field: str) -> None:
    assert field in inferred_sizes(state)
    assert field not in inferred_sizes({**state, name: torch.zeros(shape)})


@pytest.mark.parametrize("number", ["9999999999", "\N{SUPERSCRIPT TWO}", "-1", ""])
def test_blocks_are_counted_from_the_first_on(state: State, number: str) -> None:
    state[f"hope_blocks.{number}.norm1.bias"] = state[f"hope_blocks.0.cms.blocks.{number}.fc1.bias"] = torch.zeros(24)
    assert inferred_sizes(state)["block_pattern"] == ["H", "H"]
    assert level_multipliers(state) == [2.0, 1.5]


def test_numbers_beyond_fp32_are_refused(state: State, refusal: Callable[..., ForeignCheckpoint]) -> None:
    state["predictor_norm.bias"] = torch.full((24,), 1e300, dtype=torch.float64)
    (problem,) = refusal(state).problems
    assert "not finite: predictor_norm.bias" in problem.rule


@pytest.mark.parametrize("prefix", ["", "model.", "module.model.", "model._orig_mod.", "_orig_mod.module."])
def test_wrappers_are_taken_off_names(tmp_path: Path, state: State, prefix: str) -> None:
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "x.pt")
    assert read_tensors(tmp_path / "x.pt").keys() == state.keys()


def test_a_wrapper_inside_a_name_is_taken_off_too(tmp_path: Path) -> None:
    torch.save({"model.hope_blocks.0._orig_mod.norm1.bias": torch.zeros(2)}, tmp_path / "x.pt")
    assert list(read_tensors(tmp_path / "x.pt")) == ["hope_blocks.0.norm1.bias"]


def test_a_lightning_checkpoint_is_read_for_its_state_dict(tmp_path: Path, state: State) -> None:
    lightning = {
        "epoch": 3,
        "state_dict": {f"model.{name}": value for name, value in state.items()},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 1e-3}]}],
        "hyper_parameters": {"depth": 2},
    }
    torch.save(lightning, tmp_path / "x.ckpt")
    found = read_tensors(tmp_path / "x.ckpt")
    assert found.keys() == state.keys()
    assert torch.equal(found["predictor_embed.weight"], state["predictor_embed.weight"])


@pytest.mark.parametrize("archive", [True, False])
def test_hyper_parameters_from_hydra_are_left_unread(tmp_path: Path, state: State, archive: bool) -> None:
    OmegaConf.register_new_resolver("threefold", lambda number: 3 * number, use_cache=True)
    try:
        settings = OmegaConf.create({"betas": [0.9, 0.999], "net": {"cms": [{"period": 1}], "depth": "${threefold:2}"}})
        assert settings.net.depth == 6  # and so kept in a cache, which is saved too
    finally:
        OmegaConf.clear_resolver("threefold")
    hyper_parameters = {"betas": settings.betas, "net": settings.net, "all": settings, "vast": _Vast()}
    content = {"state_dict": state, "hyper_parameters": hyper_parameters, "hparams_type": type(settings)}
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=archive)
    found = read_tensors(tmp_path / "x.ckpt")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


class _Vast:
    """Fills the memory if it is made as the file says."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bytes, (2**50,)


def test_what_is_left_unread_here_is_refused_elsewhere(tmp_path: Path, state: State) -> None:
    content = {"state_dict": state, "hyper_parameters": OmegaConf.create({"a": [1]})}
    torch.save(content, tmp_path / "x.ckpt")
    read_tensors(tmp_path / "x.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="omegaconf"):
        torch.load(tmp_path / "x.ckpt", weights_only=True)


def refused(path: Path) -> str:
    with pytest.raises(ForeignCheckpoint) as caught:
        read_tensors(path)
    (problem,) = caught.value.problems
    assert str(path) in str(problem)
    return str(problem)


def test_a_file_with_objects_is_refused_and_not_unpickled(tmp_path: Path, state: State) -> None:
    path, witness = tmp_path / "x.ckpt", tmp_path / "ran"
    torch.save({"state_dict": state, "where": PurePosixPath("a"), "code": _Touch(str(witness))}, path)
    message = refused(path)
    assert "PurePosixPath" in message
    assert "can run any code" in message
    assert "weights_only=False" in message
    assert not witness.exists()


@pytest.mark.parametrize("archive", [True, False])
def test_an_object_among_hyper_parameters_from_hydra_is_refused(tmp_path: Path, state: State, archive: bool) -> None:
    path, witness = tmp_path / "x.ckpt", tmp_path / "ran"
    settings = OmegaConf.create({"net": {"code": _Touch(str(witness))}}, flags={"allow_objects": True})
    content = {"hyper_parameters": settings, "state_dict": state}
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    assert ("can run any code" if archive else "cannot be read as tensors alone") in refused(path)
    assert not witness.exists()
    torch.load(path, weights_only=False)
    assert witness.exists()


class _Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("content", [b"", b"no archive at all", b"PK\x03\x04 broken"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.ckpt").write_bytes(content)
    assert "cannot be read as tensors alone" in refused(tmp_path / "x.ckpt")


def test_an_archive_of_another_kind_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("a.txt", "text")
    assert "cannot be read as tensors alone" in refused(tmp_path / "x.ckpt")


def test_no_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "is not a file" in refused(tmp_path / "x.ckpt")
    assert "is not a file" in refused(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"epoch": 3, "weights": {"a": torch.zeros(1)}}, "no state dict, but epoch, weights"),
        ({"state_dict": {"a": 3}}, "no state dict, but state_dict"),
        ({}, "no state dict"),
        (torch.zeros(3), "no state dict, but Tensor"),
        ([torch.zeros(3)], "no state dict, but list"),
        ({"model.a": torch.zeros(1), "a": torch.zeros(1)}, "tensors twice: model.a and a"),
        ({3: torch.zeros(1)}, "no state dict, but 3"),
        (OmegaConf.create({"a": 3}), "no state dict, but DictConfig"),
        ({"a": torch.zeros(1), "b": torch.zeros(2).to_sparse()}, "1 tensors that are not dense real numbers: b"),
        ({"b": torch.zeros(2, dtype=torch.complex64)}, "not dense real numbers: b"),
        ({"b": torch.zeros(2, device="meta")}, "not dense real numbers: b"),
    ],
)
def test_a_file_without_one_state_dict_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    assert words in refused(tmp_path / "x.ckpt")
