"""The memory of a U block against a slow reference, and the block itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hopescale.model.block import UnifiedBlock
from hopescale.model.compact_titan import CompactTitan
from hopescale.model.init import initialise
from hopescale.model.predictor import HopePredictor
from hopescale.model.schema import MemoryConfig, ModelConfig
from tests.unit.model.titan_cases import correlated_frames, gradients, normal

TOLERANCE = 1e-11

Build = Callable[..., HopePredictor]
Draw = Callable[..., tuple[Tensor, Tensor, Tensor]]


def compact(width: int = 4, seed: int = 5, **fields: Any) -> CompactTitan:
    """A memory in double precision, nothing of which is small."""
    settings = {"hidden_multiplier": 1.5, "eta_max": 3.0, "retention_bias": 1.0} | fields
    if settings.get("retention") is False:
        del settings["retention_bias"]
    built = CompactTitan(MemoryConfig.model_validate(settings), width).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * noise if "norm_weight" in name else 0.6 * noise)
    return built


def recall(w1: Tensor, w2: Tensor, z: Tensor) -> Tensor:
    return z + F.gelu(z @ w1.T) @ w2.T


def reference(memory: CompactTitan, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Clip by clip, chunk by chunk, head by head, the inner gradient by autograd: output, W1 and W2 after the clip."""
    config, heads = memory.config, memory.config.heads
    outputs, after = [], []
    for clip in x:
        trained = [(memory.w1[0, h], memory.w2[0, h]) for h in range(heads)]
        fast, moving, output = list(trained), [(0.0, 0.0)] * heads, []
        for chunk in clip.split(config.chunk_size):
            tokens = chunk.flatten(0, 1)
            query, key, value = (
                [F.normalize(part, dim=-1) for part in project(tokens).chunk(heads, dim=-1)]
                for project in (memory.query, memory.key, memory.value)
            )
            recalled = torch.cat([recall(*fast[h], query[h]) for h in range(heads)], dim=-1)
            normed = F.layer_norm(recalled, recalled.shape[-1:]) * memory.norm_weight[0] + memory.norm_bias[0]
            output.append(memory.out(normed).view_as(chunk))
            seen = trained if config.chunk_rule == "scan" else fast
            if surprise(seen, key, value) < config.surprise_gate:
                continue
            for h in range(heads):
                fast[h], moving[h] = written(memory, h, fast[h], seen[h], moving[h], key[h], value[h])
        outputs.append(torch.cat(output))
        after.append(fast)
    w1, w2 = (torch.stack([torch.stack([clip[h][side] for clip in after]) for h in range(heads)]) for side in (0, 1))
    return torch.stack(outputs), w1.unsqueeze(0), w2.unsqueeze(0)


def surprise(memories: list[tuple[Tensor, Tensor]], key: list[Tensor], value: list[Tensor]) -> float:
    each = []
    for (w1, w2), k, v in zip(memories, key, value, strict=True):
        predicted, target = recall(w1, w2, k), recall(w1, w2, v)
        each.append(((predicted - target).square().sum(-1) / (predicted.square() + target.square()).sum(-1)).mean())
    return torch.stack(each).mean().item()


def written(
    memory: CompactTitan, head: int, now: Any, seen: Any, moving: Any, key: Tensor, value: Tensor
) -> tuple[Any, Any]:
    """One head after one write, feature by feature: columns of W1 and rows of W2 have a step size and a retention."""
    config, tokens, order = memory.config, len(key), memory.config.meta_grad
    features = slice(head * key.shape[-1], (head + 1) * key.shape[-1])
    step = torch.sigmoid(memory.eta_bias[features]) * config.eta_max / tokens
    keep = torch.sigmoid(memory.alpha_bias[features] + config.retention_bias)
    if not config.retention:
        keep = torch.ones_like(keep)
    if order in ("fo", "straight_through"):
        key, value = key.detach(), value.detach()
    w1, w2 = seen if order == "so" else (seen[0].detach(), seen[1].detach())
    target = recall(w1, w2, value)
    inner1, inner2 = (w1 + 0).requires_grad_(), (w2 + 0).requires_grad_()
    with torch.enable_grad():
        loss = (recall(inner1, inner2, key) - target).square().sum()
        grad1, grad2 = torch.autograd.grad(loss, (inner1, inner2), create_graph=True)
    erased = (key @ w1.T).T @ key if config.preconditioner else torch.zeros_like(grad1)
    changes = []
    for delta, w in (((grad1 + erased) * step, now[0]), (grad2 * step[:, None], now[1])):
        size = w.norm() if order == "so" else w.detach().norm()
        changes.append(delta / (1 + (delta.norm() / (config.write_limit * size)).square()).sqrt())
    if config.momentum:
        changes = [c + config.momentum * m for c, m in zip(changes, moving, strict=True)]
    fast = now[0] * keep - changes[0], now[1] * keep[:, None] - changes[1]
    if order == "straight_through":
        trained = memory.w1[0, head], memory.w2[0, head]
        fast = tuple(w.detach() + (w0 - w0.detach()) for w, w0 in zip(fast, trained, strict=True))
        changes = [c.detach() for c in changes]
    return fast, tuple(changes)


@pytest.mark.parametrize("rule", ["frame_step", "scan"])
@pytest.mark.parametrize("order", ["fo", "fo_kv", "so", "straight_through"])
@pytest.mark.parametrize(
    "option",
    [
        {},
        {"heads": 2},
        {"momentum": 0.4, "chunk_size": 2},
        {"preconditioner": False, "retention": False},
        {"surprise_gate": 0.8, "heads": 2, "momentum": 0.3},
    ],
    ids=["default", "two heads", "momentum, ragged last chunk", "nothing erased", "gate"],
)
def test_equals_the_reference(rule: str, order: str, option: dict[str, Any]) -> None:
    memory = compact(chunk_rule=rule, meta_grad=order, **option)
    x = normal(2, 3, 3, 4).requires_grad_()
    output, fast, trace = memory(x, keep_state=True)
    expected = reference(memory, x)
    assert fast is not None
    found = output, fast.w1, fast.w2
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
    if "surprise_gate" in option:
        assert 0 < trace.gate.sum() < trace.gate.numel()

    def loss(*parts: Tensor) -> Tensor:
        return torch.stack([(part * normal(*part.shape, seed=9)).sum() for part in parts]).sum()

    theirs = gradients(memory, loss(*expected), x)
    for name, gradient in gradients(memory, loss(*found), x).items():
        error = (gradient - theirs[name]).abs().max()
        assert error <= TOLERANCE * theirs[name].abs().max().clamp_min(1e-3), name


@pytest.mark.parametrize(("order", "dead"), [("fo", {"key.weight", "value.weight"}), ("fo_kv", set()), ("so", set())])
def test_who_learns_from_later_reads_alone(order: str, dead: set[str]) -> None:
    memory = compact(meta_grad=order)
    found = gradients(memory, memory(normal(2, 3, 3, 4))[0][:, 1:].square().sum())
    assert {name for name, gradient in found.items() if not gradient.any()} == dead


def test_every_frame_trains_the_memory_it_starts_from() -> None:
    memory = compact()
    for t in range(4):
        found = gradients(memory, memory(normal(1, 4, 3, 4))[0][:, t].square().sum())
        assert found["w1"].any()
        assert found["w2"].any()


def test_a_fresh_memory_keeps_almost_all_and_its_first_writes_lower_the_inner_loss() -> None:
    memory = CompactTitan(MemoryConfig(hidden_multiplier=2.0), 64)
    initialise(memory, seed=0)
    x = correlated_frames(2, 7, 20, 64)
    _, _, trace = memory(x, keep_state=True)
    assert trace.retention_min.min() >= 0.98
    torch.testing.assert_close(trace.step_size, torch.full_like(trace.step_size, 15.0))
    assert (trace.norm_ratio > 0.6).all()
    _, _, again = memory(x[:, :1].expand(-1, 7, -1, -1), keep_state=True)
    assert (again.surprise.diff(dim=1) < 0).all()


def test_a_read_only_memory_projects_no_keys_and_values() -> None:
    memory, x = compact(), normal(2, 3, 3, 4)
    still = memory(x, writes=False)[0]
    with torch.no_grad():
        memory.key.weight.fill_(torch.nan)
        memory.value.weight.fill_(torch.nan)
    torch.testing.assert_close(memory(x, writes=False)[0], still)
    # One chunk is read before it is written.
    torch.testing.assert_close(memory(x[:, :1])[0], still[:, :1])


def test_clips_share_one_memory_with_scope_batch() -> None:
    x = normal(3, 2, 4, 4)
    shared = compact(scope="batch")(x)[0]
    # The same tokens as those of one clip.
    alone = compact()(x.transpose(0, 1).flatten(1, 2).unsqueeze(0))[0]
    torch.testing.assert_close(shared.transpose(0, 1).flatten(1, 2).unsqueeze(0), alone)


@pytest.mark.parametrize("pattern", ["U", "SUH", "UTU"])
def test_frame_by_frame_with_carried_state_equals_one_pass(
    small_predictor: Build, small_input: Draw, pattern: str
) -> None:
    model = small_predictor(block_pattern=tuple(pattern)).double()
    features, actions, states = (t.double() for t in small_input(frames=5))
    state, predicted = None, []
    for t in range(5):
        now = slice(t, t + 1)
        step = model(features[:, now], actions[:, now], states[:, now], state=state, frame_offset=t, keep_state=True)
        predicted.append(step.frames)
        state = step.state
    whole = model(features, actions, states).frames
    torch.testing.assert_close(torch.cat(predicted, dim=1), whole, rtol=0, atol=1e-12)


def test_a_frame_changes_no_earlier_output_and_every_later_one(small_predictor: Build, small_input: Draw) -> None:
    model, (features, actions, states) = small_predictor(block_pattern=("U",)), small_input(frames=4)
    before = model(features, actions, states).frames
    for t in range(4):
        changed = features.clone()
        changed[:, t] = -changed[:, t]
        after = model(changed, actions, states).frames
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).flatten(2).any(dim=-1).all()


def test_clips_do_not_depend_on_their_batch(small_predictor: Build, small_input: Draw) -> None:
    model, given = small_predictor(block_pattern=("U", "H")).double(), [t.double() for t in small_input(batch=4)]
    whole, order = model(*given).frames, torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(model(*(g[order] for g in given)).frames, whole[order], rtol=0, atol=1e-12)
    torch.testing.assert_close(model(*(g[:1] for g in given)).frames, whole[:1], rtol=0, atol=1e-12)


def test_the_memory_of_the_block_is_heard_beside_its_attention(small_predictor: Build, small_input: Draw) -> None:
    model, given = small_predictor(block_pattern=("U",)), small_input()
    on, off = model(*given), model(*given, writes=False)
    assert [trace.write_ratio.shape for trace in (*on.traces, *off.traces)] == [(2, 3, 1), (2, 0, 1)]
    torch.testing.assert_close(off.frames[:, 0], on.frames[:, 0])
    assert not torch.allclose(off.frames[:, 1:], on.frames[:, 1:], atol=1e-4)


def test_every_branch_of_the_block_has_its_own_draw(small_config: Callable[..., ModelConfig]) -> None:
    block = UnifiedBlock(small_config(block_pattern=("U",)), drop_rate=0.5)
    initialise(block, seed=0)
    x = torch.randn(1, 2, 8, 24, generator=torch.Generator().manual_seed(2))
    outputs = []
    for branch in range(3):
        draws = torch.zeros(1, 3)
        draws[0, branch] = 0.9
        outputs.append(block(x, None, draws)[0])
    assert torch.equal(block(x, None, torch.zeros(1, 3))[0], x)
    assert not any(torch.equal(a, b) for a, b in ((outputs[0], outputs[1]), (outputs[1], outputs[2]), (outputs[0], x)))


def test_every_parameter_of_a_fresh_block_has_a_gradient(
    small_config: Callable[..., ModelConfig], small_input: Draw
) -> None:
    model = HopePredictor(small_config(block_pattern=("U",)))
    initialise(model, seed=0)
    model(*small_input()).frames.square().mul(torch.arange(10.0)).sum().backward()
    dead = [name for name, p in model.named_parameters() if name.startswith("blocks") and not p.grad.any()]  # type: ignore[union-attr]
    assert dead == []
