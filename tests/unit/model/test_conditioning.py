from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hopescale.model.ahead import jump, roll_out
from hopescale.model.init import CONDITIONING_STD, initialise
from hopescale.model.predictor import HopePredictor
from hopescale.model.schema import ModelConfig

Build = Callable[..., HopePredictor]
Draw = Callable[..., tuple[Tensor, Tensor, Tensor]]


def test_extrinsics_reach_every_patch_of_their_frame_and_of_later_ones_only(
    small_predictor: Build, small_input: Draw
) -> None:
    model, given = small_predictor(extrinsics_dim=4), small_input()
    extrinsics = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1))
    before = model(*given, extrinsics=extrinsics).frames
    changed = extrinsics.clone()
    changed[:, 2] += 1
    after = model(*given, extrinsics=changed).frames
    assert torch.equal(after[:, :2], before[:, :2])
    assert (after[:, 2] != before[:, 2]).any(dim=-1).all()


def test_extrinsics_have_no_token(small_config: Callable[..., ModelConfig]) -> None:
    assert small_config(extrinsics_dim=4).num_tokens == small_config().num_tokens
    assert HopePredictor(small_config()).extrinsics_encoder is None


def test_unknown_extrinsics_count_as_zeros_and_still_train_the_bias(small_predictor: Build, small_input: Draw) -> None:
    model, given = small_predictor(extrinsics_dim=4), small_input()
    assert torch.equal(model(*given).frames, model(*given, extrinsics=torch.zeros(2, 4, 4)).frames)
    assert model.extrinsics_encoder is not None
    model(*given).frames.square()[..., 0].sum().backward()
    assert model.extrinsics_encoder.bias.grad is not None
    assert model.extrinsics_encoder.bias.grad.abs().min() > 0
    # Sharded parameters must all have a gradient, if only zeros.
    assert torch.equal(model.extrinsics_encoder.weight.grad, torch.zeros(24, 4))  # type: ignore[arg-type]


def test_the_encoder_of_extrinsics_starts_like_the_other_conditioning_encoders() -> None:
    model = HopePredictor(ModelConfig(width=192, extrinsics_dim=64, action_dim=64, block_pattern=("H",)))
    initialise(model, seed=0)
    assert model.extrinsics_encoder is not None
    for encoder in (model.extrinsics_encoder, model.action_encoder):
        assert encoder.weight.std().item() == pytest.approx(0.88 * CONDITIONING_STD / 8, rel=0.05)
        assert not encoder.bias.any()


@pytest.mark.parametrize("shape", [(2, 4, 3), (2, 3, 4), (1, 4, 4)])
def test_extrinsics_of_another_shape_are_refused(
    small_predictor: Build, small_input: Draw, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"extrinsics have shape .* expected \(2, 4, 4\)"):
        small_predictor(extrinsics_dim=4)(*small_input(), extrinsics=torch.zeros(shape))


def test_extrinsics_that_the_model_has_no_encoder_for_are_not_read(small_predictor: Build, small_input: Draw) -> None:
    model, given = small_predictor(), small_input()
    assert torch.equal(model(*given, extrinsics=torch.ones(2, 4, 4)).frames, model(*given).frames)


@pytest.mark.parametrize("row", range(4))
def test_every_frame_predicted_ahead_gets_the_extrinsics_of_the_frames_before_it(
    small_predictor: Build, small_input: Draw, row: int
) -> None:
    model, (features, actions, states) = small_predictor(extrinsics_dim=4), small_input()
    extrinsics = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1))
    changed = extrinsics.clone()
    changed[:, row] += 1
    with torch.no_grad():
        before, after = (
            roll_out(model, features, actions, states, extrinsics=given, context=2, steps=3)
            for given in (extrinsics, changed)
        )
        first = max(row - 1, 0)
        assert torch.equal(after[:, :first], before[:, :first])
        assert (after[:, first:] != before[:, first:]).any(dim=(2, 3)).all()
        target = [torch.tensor([3, 3])]
        before, after = (
            jump(model, features, actions, states, target, extrinsics=given, context=2)
            for given in (extrinsics, changed)
        )
        assert torch.equal(after, before) == (row > 1)


@pytest.mark.parametrize("pattern", ["S", "H", "T"])
def test_temporal_embeddings_are_what_tells_a_single_frame_its_number(
    small_predictor: Build, small_input: Draw, pattern: str
) -> None:
    for tables in (True, False):
        model = small_predictor(block_pattern=tuple(pattern), temporal_embeddings=tables, cms={"levels": []})
        assert bool([name for name, _ in model.named_parameters() if "position" in name]) == tables
        first, third = (model(*small_input(frames=1), frame_offset=t).frames for t in (0, 2))
        # An angle that all tokens of an attention share changes nothing.
        assert torch.allclose(first, third, atol=1e-4) != tables


def test_a_jump_without_temporal_embeddings_is_refused(small_predictor: Build, small_input: Draw) -> None:
    model = small_predictor(temporal_embeddings=False)
    with pytest.raises(ValueError, match=r"temporal_embeddings=false"):
        model(*small_input(frames=1), target=torch.tensor([3, 3]))


def test_frames_past_the_longest_clip_are_refused_without_tables_too(small_predictor: Build, small_input: Draw) -> None:
    model = small_predictor(temporal_embeddings=False)
    model(*small_input(frames=7))
    with pytest.raises(ValueError, match="allows 7"):
        model(*small_input(frames=8))
