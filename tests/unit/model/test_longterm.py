"""Memories that outlive a clip: what they start from, what they keep, and what they hand on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hopescale.model.compact_titan import CompactTitan
from hopescale.model.init import initialise
from hopescale.model.longterm import LongTermChange, LongTermMemory
from hopescale.model.objective import clip_losses
from hopescale.model.objective_schema import ObjectiveConfig
from hopescale.model.predictor import HopePredictor
from hopescale.model.schema import LongTermConfig, MemoryConfig, ModelConfig
from hopescale.model.titan import MemoryTrace, TitanMemory
from hopescale.model.write_rules import FastWeights, apply_write, frame_step
from hopescale.parallel.activation_checkpointing import recompute_blocks
from tests.unit.model.titan_cases import normal

Draw = Callable[..., tuple[Tensor, Tensor, Tensor]]


def memory(kind: type[TitanMemory] = TitanMemory, longterm: dict[str, Any] | None = None, **fields: Any) -> TitanMemory:
    """A block's memories in double precision, nothing of which is small, some of it carried over."""
    config = MemoryConfig.model_validate({"hidden_multiplier": 1.5, "eta_max": 3.0, "heads": 2} | fields)
    built = kind(config, 4, LongTermConfig.model_validate({"hidden_multiplier": 1.0} | (longterm or {}))).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in (*built.named_parameters(), *built.named_buffers()):
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(1 + 0.3 * noise if "norm_weight" in name else 0.5 * noise)
    return built


def assert_equal(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def lasting(titan: TitanMemory) -> LongTermMemory:
    assert titan.longterm is not None
    return titan.longterm


def bounded(carried: Tensor, trained: Tensor) -> Tensor:
    """Scaled to stay below the trained matrix in norm."""
    share = carried.norm(dim=(-2, -1), keepdim=True) / trained.norm(dim=(-2, -1), keepdim=True)
    return carried / (1 + share.square()).sqrt()


def change_of(trace: MemoryTrace) -> LongTermChange:
    assert trace.longterm is not None
    return trace.longterm


def end_of(state: FastWeights | None) -> FastWeights:
    assert state is not None
    assert state.longterm is not None
    return state.longterm


def predictor(small_config: Callable[..., ModelConfig], **fields: Any) -> HopePredictor:
    """A small predictor with long-term memories that have carried something over."""
    longterm = {"hidden_multiplier": 1.5}
    model = HopePredictor(small_config(**{"block_pattern": ("S", "H", "U"), "longterm": longterm} | fields))
    initialise(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    return model.double()


@pytest.mark.parametrize("gate", ["input", "retrieval"])
@pytest.mark.parametrize("kind", [TitanMemory, CompactTitan])
def test_what_it_recalls_is_added_through_its_gate(kind: type[TitanMemory], gate: str) -> None:
    titan = memory(kind, {"gate": gate})
    x = normal(2, 1, 3, 4)
    own, without = lasting(titan), kind(titan.config, 4).double()
    without.load_state_dict({n: t for n, t in titan.state_dict().items() if "longterm" not in n})
    without.out = titan.out = torch.nn.Linear(4, 4).double()
    query = F.normalize(titan.query(x).unflatten(-1, (2, 2)), dim=-1)
    start1, start2 = own.w1 + bounded(own.carried.w1, own.w1), own.w2 + bounded(own.carried.w2, own.w2)
    heads = [q + F.gelu(q @ start1[0, h].T) @ start2[0, h].T for h, q in enumerate(query.unbind(-2))]
    retrieved = F.layer_norm(torch.cat(heads, dim=-1), (4,)) * own.norm_weight[0] + own.norm_bias[0]
    given = torch.cat([x, retrieved], dim=-1) if gate == "retrieval" else x
    added = torch.sigmoid(own.gate(given)) * retrieved
    difference = titan(x)[0] - without(x)[0]
    assert_equal(difference, added @ titan.out.weight.T)


def test_a_write_is_that_of_the_main_memory_with_a_floor_under_retention() -> None:
    titan, x = memory(longterm={"retention_floor": 0.7}), normal(2, 1, 3, 4)
    own = lasting(titan)
    start, tokens = own.start(), titan.split(x.flatten(1, 2), 0)
    gates = titan.read_gates(titan.start(), tokens)
    _, state, _ = titan(x, keep_state=True)
    end = end_of(state)
    expected = apply_write(
        start,
        frame_step(start, gates, preconditioner=True),
        0.7 + 0.3 * gates.retention,
        limit=0.1,
        momentum=0.0,
        gate=0.0,
        live=False,
    )[0]
    assert_equal(end.w1, expected.w1)
    assert_equal(end.w2, expected.w2)


def test_the_floor_holds_for_a_chunk_of_tokens_that_forget_one_by_one() -> None:
    titan = memory(longterm={"retention_floor": 0.6}, chunk_rule="token_exact", retention_bias=-300.0)
    gates = lasting(titan).lasting(titan.read_gates(titan.start(), titan.split(normal(2, 5, 4), 0)))
    assert gates.token_retention is not None
    assert_equal(gates.retention, torch.full_like(gates.retention, 0.6))
    assert_equal(gates.token_retention.prod(dim=2, keepdim=True), gates.retention)


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        *((TitanMemory, rule) for rule in ("frame_step", "token_exact", "scan")),
        *((CompactTitan, rule) for rule in ("frame_step", "scan")),
    ],
)
def test_the_change_is_what_a_clip_leaves_beyond_what_is_carried_over(kind: type[TitanMemory], rule: str) -> None:
    titan, x = memory(kind, chunk_rule=rule, momentum=0.3), normal(3, 4, 3, 4)
    weights = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    _, state, trace = titan(x, keep_state=True, consolidate=weights[:, None].expand(-1, 4))
    own, end = lasting(titan), end_of(state)
    begins = (own.w1 + own.carried.w1).unsqueeze(2), (own.w2 + own.carried.w2).unsqueeze(2)
    for change, after, begin in zip(change_of(trace), (end.w1, end.w2), begins, strict=True):
        assert_equal(change, torch.einsum("b,mhbij->mhij", weights, after - begin))
        assert not change.requires_grad
    _, nothing, alone = titan(x, consolidate=weights[:, None].expand(-1, 4))
    assert nothing is None
    assert_equal(change_of(alone).w1, change_of(trace).w1)


def test_a_chunk_that_reaches_past_the_end_of_a_clip_changes_nothing() -> None:
    titan, x = memory(chunk_size=2), normal(2, 5, 3, 4)
    counted = (torch.arange(5) < torch.tensor([[5], [3]])).double()
    long, short, both = (
        change_of(titan(part, consolidate=weights)[2]).w1
        for part, weights in ((x[:1], counted[:1]), (x[1:, :2], torch.ones(1, 2).double()), (x, counted))
    )
    assert_equal(both, long + short)


@pytest.mark.parametrize("pattern", ["H", "UH"])
def test_frame_by_frame_with_carried_state_equals_one_pass(
    small_config: Callable[..., ModelConfig], small_input: Draw, pattern: str
) -> None:
    model = predictor(small_config, block_pattern=tuple(pattern))
    features, actions, states = (t.double() for t in small_input(frames=4))
    counted = torch.ones(2, 4, dtype=torch.float64)
    whole = model(features, actions, states, consolidate=counted)
    state, frames, changes = None, [], []
    for t in range(4):
        now = slice(t, t + 1)
        step = model(
            *(given[:, now] for given in (features, actions, states)),
            state=state,
            frame_offset=t,
            keep_state=True,
            consolidate=counted[:, now],
        )
        state = step.state
        frames.append(step.frames)
        changes.append([change_of(trace).w2 for trace in step.traces])
    assert_equal(torch.cat(frames, dim=1), whole.frames)
    for block, trace in enumerate(whole.traces):
        assert_equal(torch.stack([step[block] for step in changes]).sum(0), change_of(trace).w2)


def test_levels_that_learn_within_a_clip_go_together_with_it(
    small_config: Callable[..., ModelConfig], small_input: Draw
) -> None:
    levels = {"mode": "online", "levels": [{"period": 1, "hidden_multiplier": 1.0}], "online": {"teach_scale": 0.0}}
    model = predictor(small_config, cms=levels)
    plain = predictor(small_config, cms={"levels": levels["levels"]})
    plain.load_state_dict(model.state_dict())
    given, counted = [t.double() for t in small_input()], torch.ones(2, 4, dtype=torch.float64)
    frame_by_frame, at_once = model(*given, consolidate=counted), plain(*given, consolidate=counted)
    assert_equal(frame_by_frame.frames, at_once.frames)
    for one, other in zip(frame_by_frame.traces, at_once.traces, strict=True):
        assert_equal(change_of(one).w1, change_of(other).w1)


def test_a_pass_moves_nothing_and_what_is_carried_over_matters(
    small_config: Callable[..., ModelConfig], small_input: Draw
) -> None:
    model, given = predictor(small_config), [t.double() for t in small_input()]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    first = model(*given, consolidate=torch.ones(2, 4, dtype=torch.float64)).frames
    assert torch.equal(model(*given).frames, first)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert {name.rsplit(".", 1)[1] for name in before} == {"carried1", "carried2"}
    model.get_buffer("blocks.1.memory.longterm.carried1").zero_()
    assert not torch.allclose(model(*given).frames, first, atol=1e-6)


@pytest.mark.parametrize("recompute", ["block", "chunk"])
def test_recomputing_gives_the_same_bits(
    small_config: Callable[..., ModelConfig], small_input: Draw, recompute: str
) -> None:
    found = []
    for mode in ("none", recompute):
        model = predictor(small_config, longterm={"hidden_multiplier": 1.5, "gate": "retrieval"})
        recompute_blocks(list(model.blocks), mode)
        prediction = model(*(t.double() for t in small_input()), consolidate=torch.ones(2, 4, dtype=torch.float64))
        prediction.frames.square().mul(torch.arange(10.0)).sum().backward()
        changes = [part for trace in prediction.traces for part in change_of(trace)]
        found.append([prediction.frames, *changes, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_only_the_teacher_branch_hands_on_and_only_what_counts(
    small_config: Callable[..., ModelConfig], small_input: Draw
) -> None:
    model, (features, _, states) = predictor(small_config), [t.double() for t in small_input(batch=3, frames=5)]
    actions = small_input(batch=3, frames=4)[1].double()
    lengths, weights = torch.tensor([5, 3, 5]), torch.tensor([1.0, 1.0, 0.0])
    config = ObjectiveConfig.model_validate({"rollout": {"weight": 1.0, "context": 2, "steps": 2}})
    target = torch.tensor([4, 2, 4])
    losses = clip_losses(model, config, features, actions, states, lengths, weights, target, None, consolidate=True)
    expected = [
        model(
            features[n : n + 1, :t], actions[n : n + 1, :t], states[n : n + 1, :t], consolidate=torch.ones(1, t)
        ).traces
        for n, t in ((0, 4), (1, 2))
    ]
    for block, trace in enumerate(losses.traces):
        apart = torch.stack([change_of(traces[block]).w1 for traces in expected]).sum(0)
        assert_equal(change_of(trace).w1, apart)
    plain = clip_losses(model, config, features, actions, states, lengths, weights, target, None)
    assert all(trace.longterm is None for trace in plain.traces)


def test_what_is_carried_over_stays_below_what_is_trained() -> None:
    own = lasting(memory())
    for scale in (1e-3, 1.0, 1e6):
        with torch.no_grad():
            for part in own.carried:
                part.mul_(scale)
        start = own.start()
        for begin, trained, carried in ((start.w1, own.w1, own.carried.w1), (start.w2, own.w2, own.carried.w2)):
            moved = (begin.squeeze(2) - trained).norm(dim=(-2, -1))
            assert (moved <= trained.norm(dim=(-2, -1))).all()
            assert (moved <= carried.norm(dim=(-2, -1))).all()
            assert (moved > 0).all()


def test_its_parameters_start_and_learn_as_they_should(
    small_config: Callable[..., ModelConfig], small_input: Draw
) -> None:
    model = HopePredictor(small_config(block_pattern=("H", "U"), longterm={"gate": "retrieval"}))
    initialise(model, seed=0)
    own = {name: p for name, p in model.named_parameters() if "longterm" in name}
    assert len(own) == 12
    assert all((p == 1).all() for name, p in own.items() if name.endswith("gate.bias"))
    assert not any(buffer.any() for buffer in model.buffers())
    model(*small_input()).frames.square().mul(torch.arange(10.0)).sum().backward()
    assert [name for name, p in own.items() if p.grad is None or not p.grad.any()] == []
