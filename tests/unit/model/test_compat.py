"""The arithmetic of the earlier predictor.

`data/ac_hope.json` holds what the last public version of AC-HOPE-ViT computed in fp64 for the weights and inputs made
by `chirp`, with memories reset before the pass: nine of the predicted numbers, a weighted sum of all of them, of a jump
that goes on from the memories of that pass, and of one from fresh memories; and weighted sums of gradients.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hopescale.config.compose import load_config
from hopescale.model.build import build_predictor
from hopescale.model.compat import AcHopeBlock, AcHopePredictor, rotary_angles, rotate
from hopescale.model.init import initialise
from hopescale.model.predictor import HopePredictor, normalise
from hopescale.model.schema import MEMORIES, ModelConfig
from hopescale.optim.routing import route
from hopescale.optim.schema import OptimizerConfig
from hopescale.parallel.activation_checkpointing import recompute_blocks

GOLDEN: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "ac_hope.json").read_text())

SMALL: dict[str, Any] = {
    "encoder_dim": 10,
    "grid": (3, 3),
    "frames": 5,
    "action_dim": 2,
    "state_dim": 2,
    "width": 24,
    "block_pattern": ("H", "H"),
    "memory": {"hidden_multiplier": 2.0, "scope": "batch"},
    "cms": {
        "levels": [
            {"period": 1, "hidden_multiplier": 2.0},
            {"period": 2, "hidden_multiplier": 1.5},
            {"period": 3, "hidden_multiplier": 1.0},
        ]
    },
    "drop_path": 0.0,
    "output": "absolute",
    "compat": "ac_hope",
    "ac_hope": {"surprise_threshold": 0.0},
}


def config(**changes: Any) -> ModelConfig:
    """The small configuration with some fields set otherwise, those of sections one by one."""
    merged = {key: {**SMALL[key], **value} if isinstance(value, dict) else value for key, value in changes.items()}
    return ModelConfig.model_validate(SMALL | merged)


def chirp(*shape: int, phase: int, size: float = 1.0, mean: float = 0.0) -> Tensor:
    """Element n of a tensor is mean + size sin((n^2 + 7 phase) mod 997): the same numbers everywhere."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (mean + size * torch.sin((n * n + 7 * phase) % 997)).view(shape)


def filled(model_config: ModelConfig) -> AcHopePredictor:
    """An fp64 predictor whose weights are chirps."""
    model = build_predictor(model_config).double()
    assert isinstance(model, AcHopePredictor)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            small = "norm" in name or name.endswith("bias")
            size = 0.2 if small else 1.5 / parameter.shape[-1] ** 0.5
            parameter.copy_(chirp(*parameter.shape, phase=len(name), size=size, mean=mean))
    return model


def inputs(patches: int = 9, batch: int = 2, frames: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Features, actions and states."""
    features = chirp(batch, frames, patches, 10, phase=1, size=3.0)
    return features, chirp(batch, frames, 2, phase=2), chirp(batch, frames, 2, phase=3)


def weighted(frames: Tensor) -> Tensor:
    weights = chirp(2, 4, *frames.shape[2:], phase=5)
    return (frames * weights[:, : frames.shape[1]]).sum()


@pytest.mark.parametrize("setting", GOLDEN)
def test_predictions_are_those_of_the_earlier_code(setting: str) -> None:
    expected = GOLDEN[setting]
    model = filled(config(**expected["model"]))
    predicted = model(*inputs(model.config.num_patches))
    nine = torch.tensor(expected["frames"], dtype=torch.float64)
    torch.testing.assert_close(predicted.frames.flatten()[::89], nine, rtol=1e-9, atol=1e-10)
    assert weighted(predicted.frames).item() == pytest.approx(expected["frames_sum"], rel=1e-9)


@pytest.mark.parametrize("setting", [name for name, expected in GOLDEN.items() if "jump_sum" in expected])
def test_a_jump_goes_on_from_the_memories_it_is_given(setting: str) -> None:
    expected = GOLDEN[setting]
    model = filled(config(**expected["model"]))
    features, actions, states = inputs(model.config.num_patches)
    state = model(features, actions, states, keep_state=True).state
    first = features[:, :1], actions[:, :1], states[:, :1]
    for carried, key in ((state, "jump_sum"), (None, "fresh_jump_sum")):
        jump = model(*first, target=torch.tensor([3, 3]), state=carried)
        assert weighted(jump.frames).item() == pytest.approx(expected[key], rel=1e-9)


@pytest.mark.parametrize("setting", GOLDEN)
def test_gradients_are_those_of_the_earlier_code(setting: str) -> None:
    expected = GOLDEN[setting]
    model = filled(config(**expected["model"]))
    patches = model.config.num_patches
    (40 * weighted(model(*inputs(patches)).frames) / (2 * 4 * patches * 10)).backward()
    parameters = dict(model.named_parameters())
    for name, total in expected["gradients"].items():
        gradient = parameters[name].grad
        assert gradient is not None
        found = (gradient * chirp(*gradient.shape, phase=11)).sum().item()
        assert found == pytest.approx(total, rel=1e-8, abs=1e-12), name


def test_stabilisers_bound_what_goes_back_and_change_nothing_forward() -> None:
    frames, embedding, last = {}, {}, {}
    for clip_backward in (0.0, 1.0):
        model = filled(config(ac_hope={"clip_backward": clip_backward}))
        frames[clip_backward] = model(*inputs()).frames
        weighted(frames[clip_backward]).backward()
        embedding[clip_backward], last[clip_backward] = model.embed.weight.grad, model.project.weight.grad
    assert torch.equal(frames[0.0], frames[1.0])
    assert torch.equal(last[0.0], last[1.0])
    assert embedding[0.0].norm() > 5 * embedding[1.0].norm()


def test_the_auxiliary_loss_trains_the_memories_that_make_keys_and_values_and_holds_the_main_one() -> None:
    model, counted = filled(config()), torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    plain, taught = model(*inputs()), model(*inputs(), auxiliary=counted)
    assert torch.equal(plain.frames, taught.frames)
    block = model.blocks[0]
    assert isinstance(block, AcHopeBlock)
    own = block.memory
    rows = "norm_weight", "w1", "w2"
    for loss, trained in ((weighted(plain.frames), set()), (taught.traces[0].auxiliary.sum(), {"key", "value"})):
        found = torch.autograd.grad(loss, [getattr(own, name) for name in rows])
        assert {label for n, label in enumerate(MEMORIES) if found[0][n].any()} >= trained
        assert bool(found[1][:2].any()) == bool(trained)
    # The first frame of both clips, from the trained memories: LN on both sides, each side held in turn.
    first = model(*(t[:, :2] for t in inputs()), auxiliary=counted[:, :2]).traces[0].auxiliary
    tokens = block.norm1(model._tokens(normalise(inputs()[0]), *inputs()[1:], None, 0))[:, 0]

    def read(label: str, z: Tensor) -> Tensor:
        row = MEMORIES.index(label)
        out = z + F.gelu(z @ own.w1[row, 0].T) @ own.w2[row, 0].T
        return F.layer_norm(out, (24,), own.norm_weight[row], own.norm_bias[row])

    key = rotate(read("key", tokens)[:, None], model._angles(tokens[:, None], None), own.config.rope_heads)[:, 0]
    apart = 2 * (read("main", key) - read("value", tokens)).square().mean(dim=(1, 2))
    torch.testing.assert_close(first, apart)


def _with_gradient(model: nn.Module) -> list[Any]:
    return [p for p in model.parameters() if p.grad is not None]


def test_fp32_predicts_the_same() -> None:
    model, given = filled(config(spatial_mixing=True)), inputs()
    wide = model(*given).frames
    narrow = model.float()(*(g.float() for g in given)).frames
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=1e-4)


def test_frame_by_frame_with_carried_state_equals_one_pass() -> None:
    model, given = filled(config(spatial_mixing=True)), inputs()
    state, predicted = None, []
    for t in range(4):
        step = model(*(g[:, t : t + 1] for g in given), state=state, frame_offset=t, keep_state=True)
        predicted.append(step.frames)
        state = step.state
    torch.testing.assert_close(torch.cat(predicted, dim=1), model(*given).frames, rtol=1e-9, atol=1e-10)


def test_without_writes_every_frame_reads_the_trained_memories() -> None:
    model, given = filled(config(temporal_embeddings=False)), inputs()
    still = model(*given, writes=False)
    assert [trace.surprise.shape for trace in still.traces] == [(2, 0), (2, 0)]
    alone = model(*(g[:, 3:] for g in given), frame_offset=3, writes=False)
    torch.testing.assert_close(still.frames[:, 3:], alone.frames, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(still.frames[:, 3:], model(*given).frames[:, 3:], atol=1e-3)


def test_clips_depend_on_the_clips_beside_them_from_the_second_frame_on() -> None:
    model, given = filled(config()), inputs()
    together, alone = model(*given).frames, model(*(g[:1] for g in given)).frames
    torch.testing.assert_close(together[:1, 0], alone[:, 0], rtol=1e-9, atol=1e-10)
    assert not torch.allclose(together[:1, 1:], alone[:, 1:], atol=1e-4)


def test_absent_states_count_as_zero() -> None:
    with_states, without = filled(config()), filled(config(state_dim=0))
    features, actions, states = inputs()
    expected = with_states(features, actions, torch.zeros_like(states)).frames
    assert torch.equal(without(features, actions).frames, expected)
    assert torch.equal(without(features, actions, states).frames, expected)


def test_a_pass_leaves_nothing_behind_and_keeps_no_view_of_parameters() -> None:
    model, given = filled(config()), inputs()
    first = model(*given, keep_state=True, writes=False)
    assert first.state is not None
    trained = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not trained & {w.untyped_storage().data_ptr() for fast in first.state for w in fast[:2]}
    before = first.frames
    model(*given)
    assert torch.equal(model(*given, writes=False).frames, before)


@pytest.mark.parametrize("drop", [False, True])
def test_recomputed_blocks_have_the_same_gradients(drop: bool) -> None:
    gradients = []
    for recompute in ("none", "block", "chunk"):
        model = filled(config(drop_path=0.4, memory={"detach_interval": 2, "detach_rule": "all"}))
        recompute_blocks(list(model.blocks), recompute)
        draws = chirp(2, 2, 3, phase=4, size=0.5, mean=0.5) if drop else None
        weighted(model(*inputs(), draws=draws).frames).backward()
        gradients.append([p.grad.clone() for p in _with_gradient(model)])
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))


def test_a_closed_threshold_is_traced_as_a_closed_gate() -> None:
    given = inputs()
    for threshold, gate in ((0.0, 1.0), (100.0, 0.0)):
        traces = filled(config(ac_hope={"surprise_threshold": threshold}))(*given).traces
        assert [trace.gate.tolist() for trace in traces] == [[[gate] * 3] * 2] * 2
        assert all((trace.write_ratio > 0).all() == bool(gate) for trace in traces)
        figures = [figure for trace in traces for figure in trace if isinstance(figure, Tensor)]
        assert all(torch.isfinite(figure).all() for figure in figures)


@pytest.mark.parametrize("keep_state", [False, True])
def test_a_jump_and_the_last_chunk_write_only_when_the_state_is_kept(keep_state: bool) -> None:
    model, (features, actions, states) = filled(config()), inputs()
    first = model(features[:, :1], actions[:, :1], states[:, :1], target=torch.tensor([2, 4]), keep_state=keep_state)
    assert [trace.surprise.shape[1] for trace in first.traces] == [int(keep_state)] * 2


def test_targets_are_told_apart_clip_by_clip() -> None:
    for changes in ({}, {"temporal_embeddings": False, "ac_hope": {"rope_heads": 2}}):
        model, (features, actions, states) = filled(config(**changes)), inputs()
        first = features[:, :1], actions[:, :1], states[:, :1]
        near = model(*first, target=torch.tensor([1, 1])).frames
        mixed = model(*first, target=torch.tensor([1, 4])).frames
        torch.testing.assert_close(mixed[0], near[0], rtol=1e-9, atol=1e-10)
        assert not torch.allclose(mixed[1], near[1], atol=1e-3)


def test_a_target_that_nothing_can_tell_is_refused() -> None:
    model, (features, actions, states) = filled(config(temporal_embeddings=False)), inputs()
    with pytest.raises(ValueError, match="no target to aim at"):
        model(features[:, :1], actions[:, :1], states[:, :1], target=torch.tensor([1, 4]))


def test_conditioning_tokens_turn_with_time_alone() -> None:
    angles = rotary_angles(torch.tensor([[0.0, 3.0]]), config(), 12)
    assert angles.shape == (1, 2, 11, 12)
    assert (angles[0, 0, :3] == 0).all()
    assert (angles[0, 1, :2, :4] > 0).all()
    assert (angles[0, 1, :2, 4:] == 0).all()


def test_rotation_leaves_what_has_no_angle() -> None:
    x = chirp(2, 2, 11, 26, phase=6)
    angles = rotary_angles(torch.tensor([[1.0, 2.0]], dtype=torch.float64), config(), 13)
    turned = rotate(x, angles, 2)
    assert torch.equal(turned[..., 12], x[..., 12])
    assert torch.equal(turned[..., 25], x[..., 25])
    assert (turned[:, :, 4:, 0:4] != x[:, :, 4:, 0:4]).all()


def test_parameters_are_those_of_the_present_model() -> None:
    there = {name: p.shape for name, p in filled(config(spatial_mixing=True)).named_parameters()}
    ordinary = config(spatial_mixing=True, compat="none", memory={"scope": "clip"}, ac_hope={"surprise_threshold": 0.1})
    assert there == {name: p.shape for name, p in HopePredictor(ordinary).named_parameters()}


def test_every_parameter_is_initialised_and_routed() -> None:
    model = AcHopePredictor(config(spatial_mixing=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    initialise(model, seed=0)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    groups = {r.name: r.group for r in route(model.named_parameters(), OptimizerConfig())}
    assert groups["blocks.0.memory.w1"] == groups["blocks.1.memory.w2"] == "titan"
    assert groups["blocks.0.memory.norm_weight"] == "vectors"
    assert groups["blocks.0.cms.levels.0.fc1.weight"] == "cms"


def test_phase_5_has_its_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = build_predictor(load_config(["model=ac_hope"]).model)
    # 43,554,280 with the encoder of extrinsics, which nothing ever used: 384 weights and 384 biases.
    assert sum(p.numel() for p in model.parameters()) == 43_554_280 - 768
