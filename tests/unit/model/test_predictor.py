from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hopescale.model import init
from hopescale.model.block import AttentionBlock, HopeBlock, build_block, drop_path
from hopescale.model.init import initialise
from hopescale.model.predictor import HopePredictor, normalise, sincos_positions
from hopescale.model.schema import ModelConfig

Build = Callable[..., HopePredictor]
Draw = Callable[..., tuple[Tensor, Tensor, Tensor]]

NAMES: tuple[str, ...] = ("features", "actions", "states")


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def initialised(config: ModelConfig, seed: int = 0) -> HopePredictor:
    model = HopePredictor(config)
    initialise(model, seed)
    return model


def test_jump_targets_give_different_predictions(small_predictor: Build, small_input: Draw) -> None:
    model, (features, actions, states) = small_predictor(), small_input(frames=1)
    near = model(features, actions, states, target=torch.tensor([1, 1])).frames
    mixed = model(features, actions, states, target=torch.tensor([1, 4])).frames
    torch.testing.assert_close(mixed[0], near[0])
    assert not torch.allclose(mixed[1], near[1], atol=1e-3)


def test_predictions_are_layer_normalised_and_ignore_the_scale_of_features(
    small_predictor: Build, small_input: Draw
) -> None:
    model, (features, actions, states) = small_predictor(), small_input()
    predicted = model(features, actions, states).frames
    torch.testing.assert_close(predicted, normalise(predicted), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model(5 * features + 2, actions, states).frames, predicted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("field", "shape", "words"),
    [
        ("features", (2, 4, 6, 11), "features have shape"),
        ("features", (2, 4, 5, 10), "features have shape"),
        ("features", (2, 24, 10), "features have shape"),
        ("features", (2, 0, 6, 10), "features hold no frame"),
        ("actions", (2, 3, 3), "actions have shape"),
        ("actions", (2, 4, 2), "actions have shape"),
        ("states", (2, 4, 3), "states have shape"),
        ("states", (2, 3, 2), "states have shape"),
        ("states", None, "states have shape None"),
    ],
)
def test_wrong_shapes_are_named(
    small_predictor: Build, small_input: Draw, field: str, shape: tuple[int, ...] | None, words: str
) -> None:
    given: dict[str, Any] = dict(zip(NAMES, small_input(), strict=True))
    given[field] = None if shape is None else torch.zeros(shape)
    with pytest.raises(ValueError, match=words):
        small_predictor()(**given)


@pytest.mark.parametrize(("frames", "offset"), [(9, 0), (2, 6), (3, 5), (1, 7)])
def test_frames_past_the_longest_clip_are_refused(
    small_predictor: Build, small_input: Draw, frames: int, offset: int
) -> None:
    with pytest.raises(ValueError, match="frames"):
        small_predictor(block_pattern=("H",))(*small_input(frames=frames), frame_offset=offset)


def test_without_states_there_is_no_state_token_and_no_encoder(
    small_config: Callable[..., ModelConfig], small_input: Draw
) -> None:
    model = initialised(small_config(state_dim=0))
    assert not [name for name, _ in model.named_parameters() if "state" in name]
    features, actions, _ = small_input()
    assert model(features, actions).frames.shape == features.shape


def test_parameter_counts_equal_the_closed_forms() -> None:
    for width, heads, multiplier, levels, mixing, grid in (
        (24, 1, 4.0, (2.0, 2.5, 3.0), True, (2, 3)),
        (24, 3, 1.5, (1.0,), False, (1, 4)),
        (16, 2, 0.5, (), True, (3, 3)),
    ):
        config = ModelConfig.model_validate(
            {
                "width": width,
                "grid": grid,
                "state_dim": 3,
                "action_dim": 2,
                "encoder_dim": 7,
                "frames": 5,
                "block_pattern": ["H", "T", "S", "H"],
                "memory": {"heads": heads, "hidden_multiplier": multiplier},
                "cms": {"levels": [{"hidden_multiplier": h} for h in levels]},
                "attention": {"heads": 2},
                "spatial_mixing": mixing,
            }
        )
        tokens = grid[0] * grid[1] + 2
        memory = 2 * multiplier * width**2 / heads + 2 * width
        cms = sum(2 * h * width**2 + h * width + 3 * width for h in levels)
        hope = 2 * width**2 + width + 2 * width + 5 * memory
        hope += (cms + 2 * width if levels else 0) + (2 * tokens**2 + 2 * width if mixing else 0)
        attention = 12 * width**2 + 13 * width
        shared = 2 * 7 * width + 7 + 2 * width * (5 + 2) + 3 * width + (2 + 3 + 2) * width
        with torch.device("meta"):
            assert count(build_block(config, "H", 0.0)) == hope
            assert count(build_block(config, "T", 0.0)) == count(build_block(config, "S", 0.0)) == attention
            assert count(HopePredictor(config)) == 2 * hope + 2 * attention + shared


@pytest.mark.parametrize(
    ("fields", "total"),
    [
        # Five H blocks of width 384 over V-JEPA 2 ViT-L tokens, without and with mixing; the attention-only baseline.
        ({"block_pattern": ["H"] * 5}, 42_884_032),
        ({"block_pattern": ["H"] * 5, "spatial_mixing": True}, 43_553_512),
        ({"block_pattern": ["T"] * 24}, 43_385_728),
        ({"block_pattern": ["T", "H", "T", "H", "T"], "spatial_mixing": True}, 23_223_952),
    ],
)
def test_models_of_published_size_have_their_number_of_parameters(fields: dict[str, Any], total: int) -> None:
    with torch.device("meta"):
        assert count(HopePredictor(ModelConfig.model_validate({"state_dim": 2} | fields))) == total


def test_drop_path_keeps_the_mean_over_its_draws() -> None:
    branch = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0)).expand(8, -1, -1, -1)
    draws = ((torch.arange(8) + 0.5) / 8)[:, None].repeat(1, 3)
    dropped = drop_path(branch, draws, 1, 0.25)
    torch.testing.assert_close(dropped.mean(0), branch[0])
    assert (dropped != 0).flatten(1).any(dim=1).tolist() == [False] * 2 + [True] * 6
    assert drop_path(branch, None, 1, 0.25) is branch


def test_drop_path_uses_the_draw_of_its_branch_and_keeps_at_the_rate_itself() -> None:
    branch, draws = torch.ones(2, 1, 1, 1), torch.tensor([[0.0, 0.9, 0.0], [0.9, 0.0, 0.5]])
    assert drop_path(branch, draws, 0, 0.5).flatten().tolist() == [0, 2]
    assert drop_path(branch, draws, 1, 0.5).flatten().tolist() == [2, 0]
    assert drop_path(branch, draws, 2, 0.5).flatten().tolist() == [0, 2]


def test_drop_path_depends_on_its_draws_and_on_nothing_else(small_predictor: Build, small_input: Draw) -> None:
    model, given = small_predictor(drop_path=0.5), small_input(batch=4)
    draws = torch.rand(4, 4, 3, generator=torch.Generator().manual_seed(6))
    first = model(*given, draws=draws).frames
    torch.manual_seed(99)
    assert torch.equal(model(*given, draws=draws).frames, first)
    order = torch.tensor([2, 0, 3, 1])
    moved = model(*(g[order] for g in given), draws=draws[order]).frames
    torch.testing.assert_close(moved, first[order], rtol=1e-4, atol=1e-5)
    differs = (model(*given).frames != first).flatten(1).any(dim=1)
    assert differs.all()


def test_every_branch_of_every_block_has_its_own_draw(small_predictor: Build, small_input: Draw) -> None:
    model, given = small_predictor(drop_path=0.5), small_input()
    kept = torch.full((2, 4, 3), 0.99)
    seen = [model(*given, draws=kept).frames]
    for block, kind in enumerate(model.config.block_pattern):
        for branch in range(3):
            draws = kept.clone()
            draws[:, block, branch] = 0.0
            dropped = model(*given, draws=draws).frames
            # The first block never drops; attention blocks have two branches.
            if block == 0 or (kind != "H" and branch == 2):
                assert torch.equal(dropped, seen[0])
            else:
                assert not any(torch.allclose(dropped, other, atol=1e-4) for other in seen)
                seen.append(dropped)


def test_drop_path_rates_rise_linearly_from_zero(small_config: Callable[..., ModelConfig]) -> None:
    model = HopePredictor(small_config(block_pattern=("S", "H", "T"), drop_path=0.2))
    rates = [block.drop_rate for block in model.blocks if isinstance(block, AttentionBlock | HopeBlock)]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_residual_output_starts_from_the_newest_frame_and_absolute_does_not(
    small_config: Callable[..., ModelConfig], small_input: Draw
) -> None:
    features, actions, states = small_input()
    errors = {}
    for output in ("residual", "absolute"):
        model = initialised(small_config(output=output))
        with torch.no_grad():
            model.project.weight.mul_(1e-3)
        errors[output] = (model(features, actions, states).frames - normalise(features)).abs().mean().item()
    assert errors["residual"] < 0.01
    assert errors["absolute"] > 0.5


def test_disabled_writes_reach_every_memory(small_predictor: Build, small_input: Draw) -> None:
    model, given = small_predictor(), small_input()
    on, off = model(*given), model(*given, writes=False)
    assert [trace.surprise.shape for trace in on.traces] == [(2, 3)] * 2
    assert [trace.surprise.shape for trace in off.traces] == [(2, 0)] * 2
    torch.testing.assert_close(off.frames[:, 0], on.frames[:, 0])
    assert not torch.allclose(off.frames[:, 1:], on.frames[:, 1:], atol=1e-4)


def test_patch_positions_are_fixed_distinct_and_optional(
    small_config: Callable[..., ModelConfig], small_input: Draw
) -> None:
    table = sincos_positions((3, 5), 18)
    assert table.shape == (15, 18)
    assert len(torch.unique(table, dim=0)) == 15
    assert table.abs().max() <= 1
    plain, placed = (initialised(small_config(patch_position=kind)) for kind in ("none", "sincos"))
    assert dict(plain.named_parameters()).keys() == dict(placed.named_parameters()).keys()
    assert placed.state_dict().keys() == plain.state_dict().keys()
    given = small_input()
    assert not torch.equal(plain(*given).frames, placed(*given).frames)


def test_initial_weights_depend_on_seed_and_name_only(small_config: Callable[..., ModelConfig]) -> None:
    short = dict(initialised(small_config(block_pattern=("S", "H"))).named_parameters())
    torch.manual_seed(77)
    long = dict(initialised(small_config(block_pattern=("S", "H", "T", "H"))).named_parameters())
    shared = short.keys() & long.keys()
    assert "blocks.1.memory.w1" in shared
    assert all(torch.equal(short[name], long[name]) for name in shared)
    other = dict(initialised(small_config(block_pattern=("S", "H")), seed=1).named_parameters())
    random = [name for name, p in short.items() if p.detach().std() > 0 and "norm" not in name]
    assert "blocks.1.memory.w1" in random
    assert not [name for name in random if torch.equal(short[name], other[name])]
    same_shape = [short["blocks.1.spatial_mixing.first.weight"], short["blocks.1.memory.query.weight"]]
    assert not any(torch.equal(one, two) for one in same_shape for two in short.values() if one is not two)


def test_initial_constants_are_right_on_the_whole_model(small_config: Callable[..., ModelConfig]) -> None:
    model = initialised(small_config())
    norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    kinds = {"one": set[str](), "zero": set[str](), "random": set[str]()}
    for name, parameter in model.named_parameters():
        # The norms of two memories are 1 up to their sign.
        values = parameter.detach().abs() if name.endswith("memory.norm_weight") else parameter.detach()
        kinds["random" if values.std() else {1.0: "one", 0.0: "zero"}[values.flatten()[0].item()]].add(name)
    memory_norms = {f"blocks.{n}.memory.norm_weight" for n in (1, 3)}
    mixing = {f"blocks.{n}.spatial_mixing.second.weight" for n in (1, 3)}
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert kinds["one"] == norms | memory_norms
    assert kinds["zero"] == biases | mixing
    assert kinds["random"] == set(dict(model.named_parameters())) - norms - memory_norms - biases - mixing


def test_initial_spreads_follow_the_number_of_inputs() -> None:
    model = initialised(ModelConfig(width=96, encoder_dim=40, grid=(2, 2), attention={"heads": 4}))  # type: ignore[arg-type]
    # A normal distribution cut at two standard deviations keeps 0.8796 of its spread.
    shrink = 0.8796

    def by_inputs(inputs: int) -> float:
        return init.MATRIX_STD * math.sqrt(init.REFERENCE_FAN_IN / inputs)

    expected = {
        "blocks.1.memory.w1": by_inputs(96),
        "blocks.1.memory.w2": by_inputs(384),
        "blocks.1.cms.levels.2.fc2.weight": by_inputs(288),
        "blocks.0.attention.qkv.weight": by_inputs(96),
        "embed.weight": by_inputs(40),
        "action_encoder.weight": init.CONDITIONING_STD / math.sqrt(2),
        "frame_position.weight": init.EMBEDDING_STD,
        "project.weight": init.HEAD_STD,
    }
    spreads = {name: p.detach().std().item() for name, p in model.named_parameters() if name in expected}
    for name, std in expected.items():
        assert spreads[name] == pytest.approx(shrink * std, rel=0.1), name


def test_fresh_mixing_is_no_mixing(small_config: Callable[..., ModelConfig], small_input: Draw) -> None:
    without, fresh = (initialised(small_config(spatial_mixing=mixing)) for mixing in (False, True))
    torch.testing.assert_close(fresh(*small_input()).frames, without(*small_input()).frames)
