from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hopescale.model.block import HopeState
from hopescale.model.predictor import HopePredictor, Prediction, normalise
from hopescale.model.schema import CmsConfig, OnlineConfig
from hopescale.model.teaching import AtFactor, at_step, teach_factor, teach_signal
from hopescale.parallel.activation_checkpointing import recompute_blocks

Build = Callable[..., HopePredictor]
Draw = Callable[..., tuple[Tensor, Tensor, Tensor]]


def online(periods: tuple[int, ...] = (1, 2), **settings: Any) -> dict[str, Any]:
    levels = [{"period": p, "hidden_multiplier": 1.0} for p in periods]
    return {"mode": "online", "levels": levels, "online": {"teach_scale": 0.5, **settings}}


def plain(periods: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    return {"mode": "param_period", "levels": [{"period": p, "hidden_multiplier": 1.0} for p in periods]}


def double(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.double() for t in given)


def changes(prediction: Prediction) -> list[Tensor]:
    """What the levels of all blocks have written by the end of a pass."""
    assert prediction.state is not None
    levels = [level for s in prediction.state if isinstance(s, HopeState) and s.cms for level in s.cms.levels]
    return [w for level in levels if level.change is not None for w in level.change]


def test_the_signal_is_the_gradient_of_half_the_squared_error() -> None:
    tokens, project = torch.randn(3, 1, 4, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    truth = torch.randn(3, 1, 4, 7, dtype=torch.float64)
    tokens.requires_grad_()
    prediction = tokens @ project.T
    (0.5 * (prediction - truth).square().sum(dim=-1).mean(dim=-1)).sum().backward()
    assert tokens.grad is not None
    signal = teach_signal(prediction.detach(), truth, project, 1e9)
    torch.testing.assert_close(signal, tokens.grad[:, 0], rtol=1e-12, atol=1e-12)


def test_a_signal_is_limited_clip_by_clip_whatever_the_number_of_patches() -> None:
    generator = torch.Generator().manual_seed(0)
    error, project = torch.randn(2, 1, 4, 7, generator=generator), torch.randn(7, 5, generator=generator)
    error[1] *= 100
    zero, whole = torch.zeros_like(error), teach_signal(error, torch.zeros_like(error), project, 1e9)
    clip = 2 * float((whole[0] * 4).square().sum(-1).mean().sqrt())
    limited = teach_signal(error, zero, project, clip)
    assert torch.equal(limited[0], whole[0])
    assert float((limited[1] * 4).square().sum(-1).mean().sqrt()) == pytest.approx(clip)
    torch.testing.assert_close(limited[1] / limited[1].norm(), whole[1] / whole[1].norm())
    repeated = teach_signal(error.repeat(1, 1, 3, 1), zero.repeat(1, 1, 3, 1), project, clip)
    torch.testing.assert_close(3 * repeated, limited.repeat(1, 3, 1))
    assert not teach_signal(zero, zero, project, clip).any()


def test_scales_warm_up_and_decay_with_the_optimizer_step() -> None:
    config = OnlineConfig(warmup_steps=4, decay_start=10, decay_end=14)
    found = [teach_factor(config, step) for step in (0, 1, 3, 4, 10, 11, 13, 14, 100)]
    assert found == [0.0, 0.25, 0.75, 1.0, 1.0, 0.75, 0.25, 0.0, 0.0]
    assert [teach_factor(OnlineConfig(), step) for step in (0, 10**6)] == [1.0, 1.0]


def test_only_levels_that_learn_within_a_clip_get_a_factor(small_predictor: Build, small_input: Draw) -> None:
    model = small_predictor()
    assert at_step(model, CmsConfig(), 3) is model
    taught, settings = small_predictor(cms=online(warmup_steps=4)), CmsConfig.model_validate(online(warmup_steps=4))
    given = small_input()
    for step, factor in ((0, 0.0), (1, 0.25), (9, 1.0)):
        at = at_step(taught, settings, step)
        assert isinstance(at, AtFactor)
        assert torch.equal(at(*given).frames, taught(*given, teach_factor=factor).frames)
    assert at_step(taught, settings, 0)(*given).frames[:, 1:].ne(taught(*given).frames[:, 1:]).any()


@pytest.mark.parametrize("untaught", ["factor", "scale", "period"])
def test_without_teaching_all_levels_are_applied_as_trained(
    small_predictor: Build, small_input: Draw, untaught: str
) -> None:
    cms = online((5, 8) if untaught == "period" else (1, 2), teach_scale=0.0 if untaught == "scale" else 0.5)
    model, reference = small_predictor(cms=cms).double(), small_predictor(cms=plain((5, 8))).double()
    given, factor = double(small_input()), 0.0 if untaught == "factor" else 1.0
    taught, expected = model(*given, teach_factor=factor, keep_state=True), reference(*given, keep_state=True)
    torch.testing.assert_close(taught.frames, expected.frames, rtol=1e-9, atol=1e-10)
    assert not any(w.any() for w in changes(taught))
    for found, trace in zip(taught.traces, expected.traces, strict=True):
        for figure, other in zip(found, trace, strict=True):
            torch.testing.assert_close(figure, other, rtol=1e-6, atol=1e-6)


def test_changes_of_long_term_memories_add_up_over_frames(small_predictor: Build, small_input: Draw) -> None:
    given, weights = double(small_input()), torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]).double()
    longterm = {"longterm": {"hidden_multiplier": 1.0}}
    found, expected = (
        small_predictor(cms=cms, **longterm).double()(*given, teach_factor=0.0, consolidate=weights).traces
        for cms in (online(), plain())
    )
    for one, other in zip(found, expected, strict=True):
        assert one.longterm is not None
        assert other.longterm is not None
        for change, same in zip(one.longterm, other.longterm, strict=True):
            assert change.any()
            torch.testing.assert_close(change, same, rtol=1e-8, atol=1e-12)


def test_disabled_writes_teach_nothing(small_predictor: Build, small_input: Draw) -> None:
    model, reference = small_predictor(cms=online()).double(), small_predictor(cms=plain()).double()
    given = double(small_input())
    off = model(*given, writes=False, keep_state=True)
    torch.testing.assert_close(off.frames, reference(*given, writes=False).frames, rtol=1e-9, atol=1e-10)
    assert changes(off) == []
    torch.testing.assert_close(model(*given).frames[:, 0], off.frames[:, 0], rtol=1e-9, atol=1e-10)
    assert (model(*given).frames[:, 1:] - off.frames[:, 1:]).abs().amax(dim=(2, 3)).gt(1e-4).all()


def test_the_first_frame_is_that_of_untaught_levels_bit_for_bit(small_predictor: Build, small_input: Draw) -> None:
    given, target = tuple(t[:, :1] for t in small_input()), torch.tensor([2, 3])
    model, reference = small_predictor(cms=online()), small_predictor(cms=plain())
    assert torch.equal(model(*given).frames, reference(*given).frames)
    assert torch.equal(model(*given, target=target).frames, reference(*given, target=target).frames)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_frame_changes_no_earlier_output(small_predictor: Build, small_input: Draw, changed: int) -> None:
    model, given = small_predictor(cms=online()), small_input()
    before = model(*given).frames
    for t in range(4):
        given[changed][:, t] += torch.linspace(-1, 1, given[changed].shape[-1])
        after = model(*given).frames
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t] != before[:, t]).flatten(1).any(dim=1).all()
        before = after


@pytest.mark.parametrize("pattern", ["H", "SHS", "STHSH", "SUH"])
def test_frame_by_frame_with_carried_state_equals_one_pass(
    small_predictor: Build, small_input: Draw, pattern: str
) -> None:
    model = small_predictor(cms=online(), block_pattern=tuple(pattern)).double()
    given = double(small_input(frames=5))
    whole = model(*given, keep_state=True)
    for pieces in ((1, 1, 1, 1, 1), (2, 3), (4, 1)):
        state, predicted, start = None, [], 0
        for count in pieces:
            now = (t[:, start : start + count] for t in given)
            step = model(*now, state=state, frame_offset=start, keep_state=True)
            predicted.append(step.frames)
            state, start = step.state, start + count
        torch.testing.assert_close(torch.cat(predicted, dim=1), whole.frames, rtol=1e-9, atol=1e-10)
        for one, other in zip(changes(step), changes(whole), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_clips_do_not_depend_on_their_batch(small_predictor: Build, small_input: Draw) -> None:
    model, given = small_predictor(cms=online()).double(), double(small_input(batch=4))
    whole, order = model(*given).frames, torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(model(*(g[order] for g in given)).frames, whole[order], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(model(*(g[:1] for g in given)).frames, whole[:1], rtol=1e-9, atol=1e-10)


def test_a_pass_leaves_nothing_behind(small_predictor: Build, small_input: Draw) -> None:
    model, given = small_predictor(cms=online()), small_input()
    first = model(*given).frames
    model(*small_input(seed=9), keep_state=True)
    assert torch.equal(model(*given).frames, first)


def test_predictions_fed_back_teach_nothing(small_predictor: Build, small_input: Draw) -> None:
    model, (features, actions, states) = small_predictor(cms=online((1, 1))).double(), double(small_input(frames=5))
    rolled = {}
    for fed_back in (True, False):
        frame, state = features[:, :1], None
        for t in range(4):
            now = slice(t, t + 1)
            step = model(frame, actions[:, now], states[:, now], state=state, frame_offset=t, keep_state=True)
            frame, state = step.frames if fed_back else features[:, t + 1 : t + 2], step.state
        rolled[fed_back] = max(float(w.abs().max()) for w in changes(step))
    assert rolled[True] < 1e-4 * rolled[False]


def test_a_jump_is_taught_by_the_frame_it_starts_from_and_awaits_none(
    small_predictor: Build, small_input: Draw
) -> None:
    model, given = small_predictor(cms=online((1, 1))).double(), double(small_input())
    state = model(*(t[:, :2] for t in given), keep_state=True).state
    last, target = [t[:, 2:3] for t in given], torch.tensor([3, 4])
    jumped = model(*last, state=state, frame_offset=2, target=target, keep_state=True)
    stepped = model(*last, state=state, frame_offset=2, keep_state=True)
    for one, other in zip(changes(jumped), changes(stepped), strict=True):
        assert torch.equal(one, other)
    after = model(*(t[:, 3:] for t in given), state=jumped.state, frame_offset=3, keep_state=True)
    for one, other in zip(changes(after), changes(jumped), strict=True):
        assert torch.equal(one, other)


def test_every_frame_trains_the_levels(small_predictor: Build, small_input: Draw) -> None:
    model, given = small_predictor(cms=online()), small_input()
    names = [name for name, _ in model.named_parameters() if ".cms." in name]
    parameters = [p for name, p in model.named_parameters() if ".cms." in name]
    frames = model(*given).frames
    for t in range(4):
        gradients = torch.autograd.grad((frames[:, t] ** 3).sum(), parameters, retain_graph=True)
        assert [name for name, g in zip(names, gradients, strict=True) if not g.any()] == []


@pytest.mark.parametrize("bf16", [False, True])
def test_recomputed_blocks_give_the_same_gradients_bit_for_bit(
    small_predictor: Build, small_input: Draw, bf16: bool
) -> None:
    given, found = small_input(), []
    for recompute in ("none", "block"):
        model = small_predictor(cms=online())
        recompute_blocks(list(model.blocks), recompute)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            passed = model(*given, keep_state=True)
        passed.frames.pow(3).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert all(w.dtype == torch.float32 for w in changes(passed))
    assert found[0].keys() == found[1].keys()
    assert [name for name, g in found[0].items() if not torch.equal(g, found[1][name])] == []
    assert all(torch.isfinite(g).all() for g in found[0].values())


def test_parameters_keep_their_gradient_under_autocast(small_predictor: Build, small_input: Draw) -> None:
    # Autocast keeps one narrow copy of a parameter; made without a graph, it would cut the parameter off.
    model, given, names = small_predictor(cms=online()), small_input(), ("fc1.weight", "fc2.weight")
    gradients = {}
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model(*given).frames.pow(3).sum().backward()
        chosen = (p.grad for n, p in model.named_parameters() if ".cms." in n and n.endswith(names))
        gradients[bf16] = [g.clone() for g in chosen if g is not None]
        model.zero_grad()
    assert len(gradients[False]) == len(gradients[True]) == 2 * 2 * 2
    for exact, narrow in zip(gradients[False], gradients[True], strict=True):
        assert torch.nn.functional.cosine_similarity(exact.flatten(), narrow.flatten(), dim=0) > 0.98


def test_frames_that_repeat_are_predicted_better_the_more_was_learned_from_their_errors(
    small_predictor: Build, small_input: Draw
) -> None:
    model = small_predictor(cms=online((1, 1), teach_scale=0.05), frames=12).double().requires_grad_(False)
    torch.nn.init.normal_(model.project.weight, std=0.2, generator=torch.Generator().manual_seed(9))
    given = [t.expand(-1, 12, *t.shape[2:]) for t in double(small_input(batch=6, frames=1))]
    truth, errors = normalise(given[0]), {}
    for factor in (1.0, 0.5, 0.0):
        errors[factor] = (model(*given, teach_factor=factor).frames - truth).abs().mean(dim=(2, 3))
    # Nothing is known of a clip's first frame.
    torch.testing.assert_close(errors[1.0][:, 0], errors[0.0][:, 0])
    learned, half, untaught = (errors[factor][:, 6:].mean(dim=1) for factor in (1.0, 0.5, 0.0))
    assert (half < 0.95 * untaught).all()
    assert (learned < 0.75 * untaught).all()
    assert (errors[1.0][:, -1] < 0.75 * errors[1.0][:, 0]).all()
