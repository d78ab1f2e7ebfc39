from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from hopescale.model.cms import CmsLayer, ContinuumMemory
from hopescale.model.cms_online import LevelWeights, OnlineMemory, OnlineState, local_gradient
from hopescale.model.schema import CmsConfig

WIDTH, TOKENS, PATCHES = 6, 5, 3


def memory(*periods: int, scale: float = 0.4, longest: int = 100, mode: str = "online") -> OnlineMemory:
    levels = [{"period": p, "hidden_multiplier": 1.5} for p in periods]
    online = {"online": {"teach_scale": scale}} if mode == "online" else {}
    config = CmsConfig.model_validate({"mode": mode, "levels": levels, **online})
    built = OnlineMemory(config, WIDTH, longest) if mode == "online" else ContinuumMemory(config, WIDTH)
    for number, parameter in enumerate(built.parameters()):
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(number))
    return built.double()  # type: ignore[return-value]


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frame_by_frame(
    online: OnlineMemory, z: Tensor, signals: Tensor, first: int = 0, state: OnlineState | None = None
) -> tuple[Tensor, OnlineState]:
    """Outputs of frames `first`, `first` + 1, ..., frame t having been taught `signals[:, t - 1]`."""
    outputs = []
    for t in range(first, first + z.shape[1]):
        if state is not None:
            state = state._replace(signal=signals[:, t - 1])
        out, state = online(z[:, t - first : t - first + 1], state, frame_offset=t, keep_state=True)
        outputs.append(out)
    assert state is not None
    return torch.cat(outputs, dim=1), state


def by_autograd(level: CmsLayer, weights: dict[str, Tensor], z: Tensor, signal: Tensor) -> dict[str, Tensor]:
    live = {name: w.detach().requires_grad_() for name, w in weights.items()}
    with torch.enable_grad():
        output = functional_call(level, live, (z.detach(),))
        (output[-PATCHES:] * signal).sum().backward()
    return {name: live[name].grad for name in ("fc1.weight", "fc2.weight")}  # type: ignore[misc]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 7), st.integers(1, 2), st.integers(0, 2**20))
def test_levels_descend_the_taught_product_every_period_frames(
    periods: list[int], num_frames: int, batch: int, seed: int
) -> None:
    online = memory(*periods).requires_grad_(False)
    z, signals = random(batch, num_frames, TOKENS, WIDTH, seed=seed), random(batch, num_frames, PATCHES, WIDTH, seed=7)
    outputs, _ = frame_by_frame(online, z, signals)
    for clip in range(batch):
        expected = learned_by_autograd(online, periods, z[clip], signals[clip])
        torch.testing.assert_close(outputs[clip], expected, rtol=1e-9, atol=1e-10)


def learned_by_autograd(online: OnlineMemory, periods: list[int], z: Tensor, signals: Tensor) -> Tensor:
    """One clip, frame by frame, each level with weights of its own that step on summed gradients."""
    weights: list[dict[str, Tensor]] = [{**dict(level.named_parameters())} for level in online.levels]
    inputs: list[Tensor] = [z[0]] * len(weights)
    sums: list[dict[str, Tensor]] = [{} for _ in weights]
    outputs = []
    for t, x in enumerate(z):
        for number, (level, period) in enumerate(zip(online.levels, periods, strict=True)):
            assert isinstance(level, CmsLayer)
            if t:
                gradient = by_autograd(level, weights[number], inputs[number], signals[t - 1])
                sums[number] = {name: g + sums[number].get(name, 0.0) for name, g in gradient.items()}
                if t % period == 0:
                    weights[number] |= {name: weights[number][name] - 0.4 * g for name, g in sums[number].items()}
                    sums[number] = {}
            inputs[number] = x
            x = functional_call(level, weights[number], (x,))
        outputs.append(x)
    return torch.stack(outputs)


@pytest.mark.parametrize("own_weights", [False, True])
def test_the_closed_form_is_the_gradient(own_weights: bool) -> None:
    (level,) = memory(1).levels
    assert isinstance(level, CmsLayer)
    z, signal, change = random(2, PATCHES, WIDTH), random(2, PATCHES, WIDTH, seed=2), random(2, WIDTH, 9, seed=3)
    fc2 = level.fc2.weight.detach() + (change if own_weights else 0)
    normed = level.norm(z).detach()
    found = local_gradient(signal, normed, level.fc1(normed).detach(), fc2)
    for clip in range(2):
        weights = dict(level.named_parameters()) | {"fc2.weight": fc2[clip] if own_weights else fc2}
        expected = by_autograd(level, weights, z[clip], signal[clip])
        torch.testing.assert_close(found.fc1[clip], expected["fc1.weight"], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.fc2[clip], expected["fc2.weight"], rtol=1e-10, atol=1e-10)


def test_untaught_levels_are_those_of_the_plain_memory_bit_for_bit() -> None:
    online, plain = memory(1, 3), memory(1, 3, mode="param_period")
    z = random(2, 4, TOKENS, WIDTH)
    assert plain.load_state_dict(online.state_dict())
    assert torch.equal(online(z)[0], plain(z))
    assert torch.equal(online(z[:, :1], keep_state=True)[0], plain(z[:, :1]))
    # A state without a teach signal teaches nothing either.
    state = online(z[:, :1], keep_state=True)[1]
    assert torch.equal(online(z[:, 1:2], state, frame_offset=1)[0], plain(z[:, 1:2]))


def test_a_carried_state_goes_on_as_one_pass() -> None:
    online, z, signals = memory(1, 2, 3), random(2, 7, TOKENS, WIDTH), random(2, 7, PATCHES, WIDTH, seed=2)
    whole, end = frame_by_frame(online, z, signals)
    _, half = frame_by_frame(online, z[:, :4], signals)
    rest, same_end = frame_by_frame(online, z[:, 4:], signals, 4, half)
    assert torch.equal(rest, whole[:, 4:])
    for one, other in zip(end.levels, same_end.levels, strict=True):
        assert (one.waiting is None) == (other.waiting is None)
        assert one.change is not None
        assert other.change is not None
        assert torch.equal(one.change.fc1, other.change.fc1)


def test_a_clip_learns_from_its_own_signal_alone() -> None:
    online, z, signals = memory(1, 2), random(3, 5, TOKENS, WIDTH), random(3, 5, PATCHES, WIDTH, seed=2)
    whole, _ = frame_by_frame(online, z, signals)
    alone, _ = frame_by_frame(online, z[1:2], signals[1:2])
    torch.testing.assert_close(alone, whole[1:2], rtol=1e-12, atol=1e-12)
    signals[0] += 1
    changed, _ = frame_by_frame(online, z, signals)
    assert not torch.allclose(changed[0, 1:], whole[0, 1:])
    torch.testing.assert_close(changed[1:], whole[1:], rtol=1e-12, atol=1e-12)


def test_levels_write_and_wait_as_their_periods_say() -> None:
    online, z, signals = memory(1, 3, 5, longest=5), random(1, 4, TOKENS, WIDTH), random(1, 4, PATCHES, WIDTH, seed=2)
    state, seen = None, []
    for t in range(4):
        state = None if state is None else state._replace(signal=signals[:, t - 1])
        state = online(z[:, t : t + 1], state, frame_offset=t, keep_state=True)[1]
        assert state is not None
        seen.append([("w" if s.waiting else "") + ("c" if s.change else "") for s in state.levels])
    # A level that no frame of a clip is due for does not even sum up.
    assert seen == [["", "", ""], ["c", "w", ""], ["c", "w", ""], ["c", "c", ""]]


def test_a_gradient_nobody_could_use_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    online, z = memory(1, 2, 2), random(1, 1, TOKENS, WIDTH)
    state = online(z, keep_state=True)[1]
    taken: list[LevelWeights] = []

    def counted(*arguments: Tensor) -> LevelWeights:
        taken.append(local_gradient(*arguments))
        return taken[-1]

    monkeypatch.setattr("hopescale.model.cms_online.local_gradient", counted)
    assert state is not None
    state = state._replace(signal=random(1, PATCHES, WIDTH))
    online(z, state, frame_offset=1)
    assert len(taken) == 1
    online(z, state, frame_offset=1, keep_state=True)
    assert len(taken) == 1 + 3


def test_each_level_may_have_a_scale_of_its_own() -> None:
    levels = [{"period": 1, "hidden_multiplier": 1.5, "teach_scale": s} for s in (None, 0.0, 0.2)]
    config = CmsConfig.model_validate({"mode": "online", "levels": levels, "online": {"teach_scale": 0.1}})
    online = OnlineMemory(config, WIDTH, 9)
    assert online.scales == (0.1, 0.0, 0.2)


def test_every_frame_trains_the_parameters_and_no_gradient_runs_through_a_write() -> None:
    online, signals = memory(1, 2), random(2, 4, PATCHES, WIDTH, seed=2)
    z = random(2, 4, TOKENS, WIDTH).requires_grad_()
    outputs, state = frame_by_frame(online, z, signals)
    for t in range(4):
        gradients = torch.autograd.grad(outputs[:, t].square().sum(), [*online.parameters(), z], retain_graph=True)
        assert all(g.any() for g in gradients)
        others = [f for f in range(4) if f != t]
        assert not gradients[-1][:, others].any()
    kept = [t for level in state.levels for t in (*(level.change or ()), *(level.waiting or ()), *level[2:])]
    assert len(kept) == 2 * (2 + 2) + 2
    assert not any(t.requires_grad for t in kept if isinstance(t, Tensor))


def test_parameter_gradients_are_those_at_the_written_weights() -> None:
    online, z = memory(1).requires_grad_(True), random(1, 2, TOKENS, WIDTH)
    signals = random(1, 2, PATCHES, WIDTH, seed=2)
    outputs, state = frame_by_frame(online, z, signals)
    found = torch.autograd.grad(outputs[:, 1].square().sum(), list(online.parameters()))
    (level,), change = online.levels, state.levels[0].change
    assert isinstance(level, CmsLayer)
    assert change is not None
    with torch.no_grad():
        level.fc1.weight += change.fc1[0]
        level.fc2.weight += change.fc2[0]
    expected = torch.autograd.grad(level(z[:, 1]).square().sum(), list(online.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_several_frames_cannot_share_a_state() -> None:
    online, z = memory(1), random(1, 2, TOKENS, WIDTH)
    with pytest.raises(ValueError, match="one frame at a time"):
        online(z, keep_state=True)
    with pytest.raises(ValueError, match="2 frames"):
        online(z, online(z[:, :1], keep_state=True)[1], frame_offset=1)
    assert online.active_levels(3) == [[True] * 3]
