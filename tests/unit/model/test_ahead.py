from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hopescale.model.ahead import jump, roll_out
from hopescale.model.predictor import HopePredictor

Build = Callable[..., HopePredictor]
Draw = Callable[..., tuple[Tensor, Tensor, Tensor]]

FRAMES = 5
PATTERNS = ["S", "T", "H", "U", "STHU", "HTSH"]
# Context, predicted frames, fresh starts.
ROLLOUTS = [(1, 4, None), (2, 3, None), (3, 1, None), (1, 4, 1), (1, 4, 2), (2, 3, 2)]


@pytest.fixture
def exact(small_predictor: Build, small_input: Draw) -> Callable[..., tuple[HopePredictor, tuple[Tensor, ...]]]:
    """A predictor of some blocks and clips for it, in fp64."""

    def build(pattern: str, **fields: Any) -> tuple[HopePredictor, tuple[Tensor, ...]]:
        model = small_predictor(block_pattern=tuple(pattern), **fields).double()
        return model, tuple(column.double() for column in small_input(frames=FRAMES))

    return build


def drop_draws(pattern: str) -> Tensor:
    return torch.rand(2, len(pattern), 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def recomputed(
    model: nn.Module, clips: tuple[Tensor, ...], context: int, steps: int, every: int | None, draws: Tensor
) -> Tensor:
    """Every prediction from a pass over all frames since the last fresh start, nothing carried."""
    features, actions, states = clips
    frames, begin = [features[:, t : t + 1] for t in range(context)], 0
    for number in range(1, steps + 1):
        window = slice(begin, len(frames))
        seen = torch.cat(frames[window], dim=1)
        passed = model(seen, actions[:, window], states[:, window], frame_offset=begin, draws=draws)
        frames.append(passed.frames[:, -1:])
        if every is not None and number % every == 0:
            begin = len(frames) - 1
    return torch.cat(frames[context:], dim=1)


def gradients(model: nn.Module, output: Tensor, given: Tensor) -> list[Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=output.dtype)
    wanted = [*model.parameters(), given]
    return list(torch.autograd.grad((output * weights).sum(), wanted, materialize_grads=True))


@pytest.mark.parametrize(("context", "steps", "every"), ROLLOUTS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_rollout_equals_recomputing_everything_it_has_seen(
    exact, pattern: str, context: int, steps: int, every: int | None
) -> None:
    model, (features, actions, states) = exact(pattern)
    features.requires_grad_()
    draws = drop_draws(pattern)
    found = roll_out(model, features, actions, states, context=context, steps=steps, reset_every=every, draws=draws)
    expected = recomputed(model, (features, actions, states), context, steps, every, draws)
    assert found.shape == (2, steps, 6, 10)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    pairs = zip(gradients(model, found, features), gradients(model, expected, features), strict=True)
    assert all((one - other).norm() <= 1e-10 * other.norm() for one, other in pairs)


def test_a_rollout_goes_on_with_what_cms_levels_have_learned(exact) -> None:
    levels = [{"period": 1, "hidden_multiplier": 2.0}, {"period": 1, "hidden_multiplier": 1.0}]
    model, clips = exact("SH", cms={"mode": "online", "levels": levels})
    found = roll_out(model, *clips, context=3, steps=2, draws=drop_draws("SH"))
    expected = recomputed(model, clips, 3, 2, None, drop_draws("SH"))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_carried_memories_and_caches_make_a_difference(small_predictor: Build, small_input: Draw) -> None:
    for pattern, remembers in (("S", False), ("T", True), ("H", True)):
        model, clips = small_predictor(block_pattern=tuple(pattern)), small_input(frames=FRAMES)
        carried, afresh = roll_out(model, *clips, steps=4), roll_out(model, *clips, steps=4, reset_every=2)
        assert torch.allclose(carried[:, :2], afresh[:, :2])
        assert torch.allclose(carried[:, 2:], afresh[:, 2:]) != remembers


def test_a_rollout_learns_from_late_frames_through_earlier_predictions(
    small_predictor: Build, small_input: Draw
) -> None:
    model, (features, actions, states) = small_predictor(block_pattern=("S",)), small_input(frames=FRAMES)
    actions.requires_grad_()
    last = roll_out(model, features, actions, states, steps=4)[:, -1]
    (gradient,) = torch.autograd.grad(last.square().sum() + last[..., 0].sum(), actions)
    # An S block carries nothing: only the fed-back frames lead from an early action to the last prediction.
    assert gradient[:, :4].flatten(2).any(dim=2).all()


class Watched:
    """Counts what passes through the blocks of a predictor."""

    def __init__(self, model: HopePredictor) -> None:
        self.frames = self.writes = self.passes = 0
        self.kept: list[bool] = []
        model.blocks[0].register_forward_hook(self._count, with_kwargs=True)

    def _count(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Any, ...]) -> None:
        self.passes += 1
        self.frames += args[0].shape[1]
        self.writes += output[2].surprise.shape[1]
        self.kept.append(kwargs["keep_state"])


@pytest.mark.parametrize(("context", "steps", "every"), ROLLOUTS)
def test_a_rollout_sees_each_frame_once_and_writes_only_what_is_read(
    small_predictor: Build, small_input: Draw, context: int, steps: int, every: int | None
) -> None:
    model = small_predictor(block_pattern=("H",))
    seen = Watched(model)
    roll_out(model, *small_input(frames=FRAMES), context=context, steps=steps, reset_every=every)
    assert seen.frames == context + steps - 1
    assert seen.passes == steps
    # Fresh starts between passes, each of which makes the write before it unread; the last write is never read.
    starts = 0 if every is None else (steps - 1) // every
    assert seen.writes == context + steps - 2 - starts
    assert seen.kept == [n < steps and (every is None or n % every > 0) for n in range(1, steps + 1)]


def test_a_rollout_without_writes_only_reads(small_predictor: Build, small_input: Draw) -> None:
    model = small_predictor(block_pattern=("H",))
    seen = Watched(model)
    roll_out(model, *small_input(frames=FRAMES), context=2, steps=3, writes=False)
    assert (seen.frames, seen.writes) == (4, 0)


def test_a_rollout_longer_than_its_clip_is_refused(small_predictor: Build, small_input: Draw) -> None:
    features, actions, states = small_input(frames=4)
    assert roll_out(small_predictor(), features, actions, states, context=2, steps=3).shape[1] == 3
    with pytest.raises(ValueError, match="need 5 actions; got 4"):
        roll_out(small_predictor(), features, actions, states, context=2, steps=4)


@pytest.mark.parametrize("context", [1, 2, 3])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_jump_whose_target_says_nothing_is_the_next_frame(exact, pattern: str, context: int) -> None:
    model, (features, actions, states) = exact(pattern)
    draws, targets = drop_draws(pattern), [torch.tensor([3, 4]), torch.tensor([4, 3])]
    with torch.no_grad():
        model.target_position.weight[3] = 0.0
    jumped = jump(model, features, actions, states, targets, context=context, draws=draws)
    upto = [column[:, :context] for column in (features, actions, states)]
    following = model(*upto, draws=draws).frames[:, -1]
    assert jumped.shape == (2, 2, 6, 10)
    for clip in range(2):
        torch.testing.assert_close(jumped[clip, clip], following[clip], rtol=1e-11, atol=1e-11)
        assert not torch.allclose(jumped[clip, 1 - clip], following[clip], atol=1e-3)


def test_a_jump_reads_its_context_and_nothing_after(small_predictor: Build, small_input: Draw) -> None:
    model, clips = small_predictor(), small_input(frames=FRAMES)
    target = [torch.tensor([4, 4])]
    before = jump(model, clips[0], clips[1], clips[2], target, context=3)
    for changed in range(FRAMES):
        others = [column.clone() for column in clips]
        for column in others:
            column[:, changed] += 1.0
        features, actions, states = others
        same = torch.equal(jump(model, features, actions, states, target, context=3), before)
        assert same == (changed >= 3), changed


def test_a_jump_writes_its_context_once_for_all_targets_and_nothing_else(
    small_predictor: Build, small_input: Draw
) -> None:
    model, targets = small_predictor(block_pattern=("H",)), [torch.tensor([3, 3]), torch.tensor([4, 4])]
    for context, passes, frames, writes in ((1, 2, 2, 0), (3, 3, 4, 2)):
        seen = Watched(model)
        features, actions, states = small_input(frames=FRAMES)
        jump(model, features, actions, states, targets, context=context)
        assert (seen.passes, seen.frames, seen.writes) == (passes, frames, writes)
        assert seen.kept == [True] * (passes - 2) + [False, False]
