"""What a prediction must not depend on: its batch, the future, the calls before, and how a clip is cut into passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hopescale.model.init import initialise
from hopescale.model.predictor import HopePredictor
from hopescale.model.schema import ModelConfig

Build = Callable[..., HopePredictor]
Draw = Callable[..., tuple[Tensor, Tensor, Tensor]]

NAMES: tuple[str, ...] = ("features", "actions", "states")
PATTERNS = ["H", "U", "S", "T", "SHS", "STUH"]
patterns = pytest.mark.parametrize("pattern", PATTERNS)

SMALL_MEMORY = {"heads": 2, "hidden_multiplier": 1.5}
MEMORIES: dict[str, dict[str, Any]] = {
    "default": {},
    "scan": {"chunk_rule": "scan"},
    "token_exact": {"chunk_rule": "token_exact"},
    "gate and momentum": {"surprise_gate": 0.008, "momentum": 0.5},
    "main alone": {"self_modify": ["main"]},
    "cut": {"detach_interval": 1},
}
memories = pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)


@pytest.fixture
def exact_predictor(small_predictor: Build) -> Build:
    """The small predictor in double precision, of a pattern and with options of its memories."""

    def build(pattern: str, memory: dict[str, Any] | None = None, **fields: Any) -> HopePredictor:
        options = SMALL_MEMORY | (memory or {})
        return small_predictor(block_pattern=tuple(pattern), memory=options, **fields).double()

    return build


@pytest.fixture
def exact_input(small_input: Draw) -> Draw:
    def draw(batch: int = 2, frames: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        features, actions, states = small_input(batch, frames, seed)
        return features.double(), actions.double(), states.double()

    return draw


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def assert_clips_stand_alone(model: HopePredictor, given: tuple[Tensor, ...], **options: Tensor) -> None:
    whole = model(*given, **options).frames
    for clip in range(len(whole)):
        one = slice(clip, clip + 1)
        alone = model(*(g[one] for g in given), **{name: value[one] for name, value in options.items()}).frames
        assert_same(alone, whole[one])
    order = torch.tensor([2, 0, 1])
    moved = model(*(g[order] for g in given), **{name: value[order] for name, value in options.items()}).frames
    assert_same(moved, whole[order])


@patterns
def test_clips_do_not_depend_on_their_batch(exact_predictor: Build, exact_input: Draw, pattern: str) -> None:
    assert_clips_stand_alone(exact_predictor(pattern), exact_input(batch=3))


@memories
def test_written_memories_do_not_make_clips_meet(
    exact_predictor: Build, exact_input: Draw, memory: dict[str, Any]
) -> None:
    assert_clips_stand_alone(exact_predictor("SHT", memory), exact_input(batch=3))


def test_the_gate_of_the_cases_closes_for_some_clips_and_not_for_others(
    exact_predictor: Build, exact_input: Draw
) -> None:
    gate = exact_predictor("SHT", MEMORIES["gate and momentum"])(*exact_input(batch=3)).traces[0].gate
    assert 0 < gate.sum() < gate.numel()


def test_jumps_and_drop_path_do_not_make_clips_meet(exact_predictor: Build, exact_input: Draw) -> None:
    model = exact_predictor("SHT", drop_path=0.5)
    draws = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert_clips_stand_alone(model, exact_input(batch=3), draws=draws)
    assert_clips_stand_alone(model, exact_input(batch=3, frames=1), target=torch.tensor([2, 4, 1]))


@pytest.mark.parametrize("changed", NAMES)
@patterns
def test_a_frame_changes_no_earlier_output(
    exact_predictor: Build, exact_input: Draw, pattern: str, changed: str
) -> None:
    model, given = exact_predictor(pattern), dict(zip(NAMES, exact_input(), strict=True))
    before = model(**given).frames
    for t in range(4):
        given[changed] = given[changed].clone()
        given[changed][:, t] += torch.linspace(-1, 1, given[changed].shape[-1])
        after = model(**given).frames
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t] != before[:, t]).flatten(1).any(dim=1).all()
        before = after


@memories
def test_a_frame_changes_no_earlier_output_whatever_is_written(
    exact_predictor: Build, exact_input: Draw, memory: dict[str, Any]
) -> None:
    model, (features, actions, states) = exact_predictor("SHT", memory), exact_input()
    before = model(features, actions, states).frames
    for t in range(1, 4):
        later = features.clone()
        later[:, t:] = later[:, t:].flip(-1)
        after = model(later, actions, states).frames
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t:], before[:, t:])


@pytest.mark.parametrize("pattern", ["SHS", "T", "H", "U"])
def test_later_outputs_remember_an_earlier_frame(exact_predictor: Build, exact_input: Draw, pattern: str) -> None:
    model, (features, actions, states) = exact_predictor(pattern), exact_input()
    other = features.clone()
    other[:, 0] = -other[:, 0]
    differs = model(features, actions, states).frames != model(other, actions, states).frames
    assert differs[:, 1:].flatten(2).any(dim=-1).all()


def test_attention_within_frames_alone_has_no_memory(exact_predictor: Build, exact_input: Draw) -> None:
    model, (features, actions, states) = exact_predictor("SS"), exact_input()
    other = features.clone()
    other[:, 0] = -other[:, 0]
    assert torch.equal(model(features, actions, states).frames[:, 1:], model(other, actions, states).frames[:, 1:])


@pytest.mark.parametrize("jump", [False, True])
@patterns
def test_an_action_reaches_every_patch_of_its_frame(
    small_config: Callable[..., ModelConfig], exact_input: Draw, pattern: str, jump: bool
) -> None:
    # Freshly initialised, without mixing over tokens: in H alone nothing but the addition to patches carries it there.
    model = HopePredictor(small_config(block_pattern=tuple(pattern), spatial_mixing=False))
    initialise(model, seed=0)
    model, (features, actions, states) = model.double(), exact_input(frames=1)
    target = torch.tensor([3, 4]) if jump else None
    before = model(features, actions, states, target=target).frames
    after = model(features, actions + 1, states, target=target).frames
    assert ((after - before).abs().amax(dim=-1) > 1e-6).all()


def in_passes(model: HopePredictor, given: tuple[Tensor, ...], lengths: list[int]) -> Tensor:
    """Predictions of a clip given in passes of so many frames, each going on from the one before."""
    state, predicted, start = None, [], 0
    for length in lengths:
        now = slice(start, start + length)
        step = model(*(g[:, now] for g in given), state=state, frame_offset=start, keep_state=True)
        predicted.append(step.frames)
        state, start = step.state, start + length
    return torch.cat(predicted, dim=1)


@pytest.mark.parametrize("lengths", [[1, 1, 1, 1, 1], [3, 2], [1, 4]])
@patterns
def test_a_clip_in_passes_with_carried_state_equals_one_pass(
    exact_predictor: Build, exact_input: Draw, pattern: str, lengths: list[int]
) -> None:
    model, given = exact_predictor(pattern), exact_input(frames=5)
    whole = model(*given)
    assert whole.state is None
    assert_same(in_passes(model, given, lengths), whole.frames, 1e-10)


@memories
def test_carried_memories_equal_one_pass(exact_predictor: Build, exact_input: Draw, memory: dict[str, Any]) -> None:
    model, given = exact_predictor("SHTH", memory), exact_input(frames=5)
    assert_same(in_passes(model, given, [1, 2, 1, 1]), model(*given).frames, 1e-10)


@pytest.mark.parametrize("pattern", ["H", "SHS", "STUH"])
def test_a_rollout_equals_the_whole_prefix_read_again_at_every_frame(
    exact_predictor: Build, exact_input: Draw, pattern: str
) -> None:
    model, (features, actions, states) = exact_predictor(pattern), exact_input(frames=5)
    state, newest, seen = None, features[:, :2], features[:, :2]
    for start, stop in ((0, 2), (2, 3), (3, 4), (4, 5)):
        now = slice(start, stop)
        step = model(newest, actions[:, now], states[:, now], state=state, frame_offset=start, keep_state=True)
        again = model(seen, actions[:, :stop], states[:, :stop]).frames[:, -1:]
        newest, state = step.frames[:, -1:], step.state
        assert_same(newest, again, 1e-10)
        seen = torch.cat([seen, newest], dim=1)


@patterns
def test_the_order_of_calls_does_not_matter(exact_predictor: Build, exact_input: Draw, pattern: str) -> None:
    model, batches = exact_predictor(pattern), [exact_input(seed=seed) for seed in range(3)]
    before = {name: p.clone() for name, p in model.state_dict().items()}
    first = [model(*given).frames for given in batches]
    with torch.no_grad():
        model(*batches[0], keep_state=True)
        model(*(g[:, :1] for g in batches[1]), target=torch.tensor([1, 2]))
        model(*batches[2], writes=False)
        second = [model(*given).frames for given in reversed(batches)]
    assert all(torch.equal(one, two) for one, two in zip(first, reversed(second), strict=True))
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_a_gradient_depends_on_nothing_before_it(exact_predictor: Build, exact_input: Draw) -> None:
    model, given = exact_predictor("SHT"), exact_input()
    found = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        model(*given).frames.square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model(*exact_input(seed=7)).frames.sum().backward()
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
