"""What a pass reads, writes, keeps and leaves alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hopescale.model.schema import MEMORIES
from hopescale.model.titan import MAIN, FastWeights, TitanMemory
from tests.ledger import Ledger
from tests.unit.model.titan_cases import gradients, memory, normal

RULES = ["frame_step", "token_exact", "scan"]

PER_WRITE = ("surprise", "retention", "step_size", "gate", "write_ratio", "limited")
AT_THE_END = ("norm_ratio", "drift")

VARIANTS: dict[str, dict[str, Any]] = {
    "frame_step": {},
    "frame_step of two frames": {"chunk_size": 2},
    "frame_step, momentum and gate": {"momentum": 0.5, "surprise_gate": 0.05},
    "token_exact": {"chunk_rule": "token_exact"},
    "scan": {"chunk_rule": "scan"},
    "scan of two frames, momentum": {"chunk_rule": "scan", "chunk_size": 2, "momentum": 0.5},
    "two memories": {"self_modify": ["main", "value"]},
    "cut": {"detach_interval": 2},
    "straight through": {"meta_grad": "straight_through"},
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


@variants
def test_a_chunk_is_read_before_it_is_written(variant: dict[str, Any]) -> None:
    titan, x = memory(6, **variant), normal(2, 4, 3, 6)
    size = titan.config.chunk_size
    written, unwritten = titan(x)[0], titan(x, writes=False)[0]
    assert torch.equal(written[:, :size], unwritten[:, :size])
    assert (written[:, size:] != unwritten[:, size:]).flatten(1).any(dim=1).all()


@variants
def test_future_frames_change_no_earlier_output(variant: dict[str, Any]) -> None:
    titan, x = memory(6, **variant), normal(2, 4, 3, 6)
    before = titan(x)[0]
    for t in range(1, 4):
        other = x.clone()
        other[:, t:] += 1
        assert torch.equal(titan(other)[0][:, :t], before[:, :t])
        assert not torch.equal(titan(other)[0][:, t:], before[:, t:])


@variants
@pytest.mark.parametrize("heads", [1, 3])
def test_a_clip_does_not_depend_on_the_others_of_its_batch(variant: dict[str, Any], heads: int) -> None:
    titan, x = memory(12, heads=heads, **variant), normal(4, 4, 3, 12)
    whole, fast, _ = titan(x, keep_state=True)
    alone, own, _ = titan(x[:1], keep_state=True)
    torch.testing.assert_close(whole[:1], alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fast.w1[:, :, :1], own.w1, rtol=1e-12, atol=1e-12)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(whole[order], titan(x[order])[0], rtol=1e-12, atol=1e-12)


@variants
@pytest.mark.parametrize("heads", [1, 2])
def test_chunk_by_chunk_with_carried_state_equals_one_pass(variant: dict[str, Any], heads: int) -> None:
    titan, x = memory(6, heads=heads, **variant), normal(2, 6, 3, 6)
    whole, end, whole_trace = titan(x, keep_state=True)
    fast: FastWeights | None = None
    outputs, traces = [], []
    for chunk in x.split(titan.config.chunk_size, dim=1):
        output, fast, trace = titan(chunk, fast, keep_state=True)
        outputs.append(output)
        traces.append(trace)
    assert fast is not None
    assert fast.num_writes == end.num_writes == len(outputs)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-11, atol=1e-11)
    for ours, theirs in zip(fast[:4], end[:4], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    together = torch.cat([trace.write_ratio for trace in traces], dim=1)
    torch.testing.assert_close(together, whole_trace.write_ratio, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(traces[-1].drift, whole_trace.drift, rtol=1e-10, atol=1e-12)

    # Cuts count writes since the start of the clip, not since the start of a pass.
    ours, theirs = (gradients(titan, out.square().sum()) for out in (torch.cat(outputs, dim=1), whole))
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-9)


def test_only_the_named_memories_are_written() -> None:
    titan, x = memory(12, heads=2, self_modify=["main", "key"]), normal(2, 2, 4, 12)
    _, fast, trace = titan(x, keep_state=True)
    for which, name in enumerate(MEMORIES):
        written = name in ("main", "key")
        for start, now in ((titan.w1, fast.w1), (titan.w2, fast.w2)):
            assert torch.equal(start[which].unsqueeze(1).expand_as(now[which]), now[which]) != written, name
        for figure in (trace.write_ratio, trace.limited):
            assert (figure[..., which] == 0).all() or written
        assert (trace.drift[:, which] > 0).all() == written
        assert (trace.write_ratio[..., which] > 0).all() == written


def test_a_memory_is_written_the_same_whether_or_not_others_are() -> None:
    x = normal(2, 1, 4, 12)
    everything, one = memory(12), memory(12, self_modify=["value", "main"])
    for full, part in zip(everything(x, keep_state=True)[1][:2], one(x, keep_state=True)[1][:2], strict=True):
        for name in ("value", "main"):
            torch.testing.assert_close(part[MEMORIES.index(name)], full[MEMORIES.index(name)])


def test_surprise_is_that_of_the_main_memory_whatever_else_is_written() -> None:
    x = normal(2, 1, 4, 12)
    expected = memory(12)(x, keep_state=True)[2].surprise
    for names in (["main", "key"], ["key", "main"], ["main"]):
        torch.testing.assert_close(memory(12, self_modify=names)(x, keep_state=True)[2].surprise, expected)


def test_a_memory_that_nothing_writes_is_the_same_as_writes_disabled() -> None:
    x = normal(2, 3, 4, 12)
    never, disabled = memory(12, self_modify=[]), memory(12)
    output, _, trace = never(x)
    off, fast, off_trace = disabled(x, writes=False, keep_state=True)
    assert torch.equal(output, off)
    for figures in (trace, off_trace):
        assert all(getattr(figures, name).shape[:2] == (2, 0) for name in PER_WRITE)
        assert (figures.norm_ratio == 1).all()
        assert (figures.drift == 0).all()
    assert fast.num_writes == 0
    # What stays for later must be a copy: the parameter may be a sharded one that is freed after the pass.
    for mine, trained in ((fast.w1, disabled.w1), (fast.w2, disabled.w2)):
        assert torch.equal(mine.squeeze(2), trained)
        assert mine.data_ptr() != trained.data_ptr()
    # And one that nothing has written goes on like the trained one, whatever the batch.
    torch.testing.assert_close(disabled(x, fast)[0], disabled(x)[0], rtol=0, atol=0)


def executed(titan: TitanMemory, x: Tensor, **options: bool) -> int:
    """Floating-point operations of all matrix products of a pass."""
    with FlopCounterMode(display=False) as counter:
        titan(x, **options)
    return counter.get_total_flops()


READING, GRADIENT = 1.0, 3.5
"""Of one memory and one token: two products, and for a write five more for what is recalled and the gradient."""


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("rule", ["frame_step", "scan"])
@pytest.mark.parametrize(
    ("chunk_size", "options", "whole", "last"),
    [
        (1, {}, 3, 1),
        (1, {"keep_state": True}, 5, 0),
        (2, {}, 2, 2),
        (2, {"keep_state": True}, 5, 0),
        (3, {}, 0, 3),
        (5, {}, 0, 0),
        (1, {"writes": False}, 0, 0),
        (1, {"writes": False, "keep_state": True}, 0, 0),
    ],
)
def test_nothing_is_computed_that_nobody_reads(
    heads: int, rule: str, chunk_size: int, options: dict[str, bool], whole: int, last: int
) -> None:
    """`whole` frames are written into all memories, `last` ones into the main memory, which alone is read once more."""
    width, hidden, tokens = 12, 24, 2 * 3
    titan = memory(width, heads=heads, hidden_multiplier=2.0, chunk_size=chunk_size, chunk_rule=rule)
    x = normal(2, 5, 3, width)
    # In a scan nothing reads what other memories than the main one have learned.
    written = 5 if rule == "frame_step" else 1
    readings = (whole + last) * 5 * READING + (whole * written + last) * GRADIENT
    readings += (5 - whole - last) * READING
    projections = 5 * tokens * 4 * width**2
    assert executed(titan, x, **options) == projections + tokens * int(readings * 4 * width * hidden / heads)
    assert titan(x, **options)[2].surprise.shape == (2, -(-(whole + last) // chunk_size))


def test_memories_that_are_only_read_cost_their_readings_alone() -> None:
    titan, x = memory(12, hidden_multiplier=2.0, self_modify=["main", "key"]), normal(2, 3, 3, 12)
    tokens = 2 * 3
    readings = (5 * READING + 2 * GRADIENT) + (5 * READING + GRADIENT) + READING
    assert executed(titan, x) == 3 * tokens * 4 * 12**2 + tokens * int(readings * 4 * 12 * 24)


@torch.no_grad()
def test_a_longer_clip_holds_no_more_memories_at_once() -> None:
    titan = memory(16)

    def most_held(frames: int) -> int:
        x = normal(1, frames, 2, 16)
        with Ledger() as ledger:
            titan(x)
        return ledger.peaks()["total"]

    of_one_clip = 2 * titan.w1.numel() * titan.w1.element_size()
    assert most_held(12) < most_held(4) + of_one_clip


def test_a_pass_leaves_the_parameters_and_the_state_it_was_given_alone() -> None:
    titan, x = memory(6), normal(2, 3, 4, 6)
    before = {name: p.detach().clone() for name, p in titan.named_parameters()}
    _, fast, _ = titan(x, keep_state=True)
    given = [w.detach().clone() for w in fast[:2]]
    titan(x, fast, keep_state=True)
    assert all(torch.equal(before[name], p) for name, p in titan.named_parameters())
    assert all(torch.equal(old, now) for old, now in zip(given, fast[:2], strict=True))


@pytest.mark.parametrize("scope", ["clip", "batch"])
def test_figures_have_their_shapes_and_stay_in_their_ranges(scope: str) -> None:
    titan = memory(12, heads=2, scope=scope, surprise_gate=0.03, eta_max=5.0)
    trace = titan(normal(3, 4, 5, 12), keep_state=True)[2]
    assert not any(getattr(trace, name).requires_grad for name in (*PER_WRITE, *AT_THE_END))
    for name in PER_WRITE:
        assert getattr(trace, name).shape == ((3, 4, 5) if name in ("write_ratio", "limited") else (3, 4)), name
    for name in AT_THE_END:
        assert getattr(trace, name).shape == (3, 5), name
    assert ((trace.surprise >= 0) & (trace.surprise <= 2)).all()
    assert ((trace.retention > 0) & (trace.retention < 1)).all()
    assert ((trace.step_size > 0) & (trace.step_size < 5)).all()
    assert ((trace.write_ratio >= 0) & (trace.write_ratio <= 0.1 + 1e-9)).all()
    assert torch.equal(trace.gate, (trace.surprise >= 0.03).to(trace.gate))


def test_norms_and_drift_are_of_the_memories_after_the_pass() -> None:
    titan = memory(6)
    _, fast, trace = titan(normal(2, 3, 4, 6), keep_state=True)
    for clip in range(2):
        for m in range(len(MEMORIES)):
            start, now = titan.w1[m, 0], fast.w1[m, 0, clip]
            assert trace.norm_ratio[clip, m].item() == pytest.approx((now.norm() / start.norm()).item())
            assert trace.drift[clip, m].item() == pytest.approx(((now - start).norm() / start.norm()).item())


@pytest.mark.parametrize("rule", RULES)
def test_a_memory_shared_by_one_clip_is_its_own(rule: str) -> None:
    x = normal(1, 3, 4, 6)
    own, shared = (memory(6, chunk_rule=rule, scope=scope) for scope in ("clip", "batch"))
    (one, fast, figures), (other, same, same_figures) = own(x, keep_state=True), shared(x, keep_state=True)
    assert torch.equal(one, other)
    assert torch.equal(fast.w1, same.w1)
    for name in (*PER_WRITE, *AT_THE_END):
        assert torch.equal(getattr(figures, name), getattr(same_figures, name)), name


@pytest.mark.parametrize("variant", [{}, {"chunk_size": 2}, {"chunk_rule": "scan"}, {"momentum": 0.5, "heads": 2}])
def test_clips_that_share_a_memory_are_written_like_the_tokens_of_one(variant: dict[str, Any]) -> None:
    x = normal(3, 3, 4, 6)
    one_clip = x.transpose(0, 1).flatten(1, 2).unsqueeze(0)
    own, shared = memory(6, meta_grad="so", **variant), memory(6, meta_grad="so", scope="batch", **variant)
    expected, fast, _ = own(one_clip, keep_state=True)
    output, same, _ = shared(x, keep_state=True)
    assert same.w1.shape[2] == 1
    expected = expected.view(3, 3, 4, 6).transpose(0, 1)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(same.w1, fast.w1, rtol=1e-12, atol=1e-12)
    weights = normal(*x.shape, seed=7)
    ours, theirs = gradients(shared, (output * weights).sum()), gradients(own, (expected * weights).sum())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-10, atol=1e-10)


def test_a_shared_write_is_the_mean_of_those_of_its_clips() -> None:
    fields = {"retention": False, "write_limit": 1e9}
    own, shared = memory(6, **fields), memory(6, scope="batch", **fields)
    x = normal(3, 1, 4, 6)
    changes = own(x, keep_state=True)[1].w1 - own.w1.unsqueeze(2)
    together = shared(x, keep_state=True)[1].w1 - shared.w1.unsqueeze(2)
    torch.testing.assert_close(together, changes.mean(2, keepdim=True), rtol=1e-10, atol=1e-12)


def test_shared_memory_lets_clips_depend_on_each_other_and_not_on_their_order() -> None:
    shared, x = memory(6, scope="batch"), normal(3, 3, 4, 6)
    other = x.clone()
    other[2] += 1
    output, changed = shared(x)[0], shared(other)[0]
    torch.testing.assert_close(changed[:2, 0], output[:2, 0], rtol=1e-12, atol=1e-12)
    assert ((changed - output)[:2, 1:].abs().flatten(1).amax(dim=1) > 1e-6).all()
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(shared(x[order])[0], output[order], rtol=1e-11, atol=1e-11)


def test_shared_memory_carried_chunk_by_chunk_equals_one_pass() -> None:
    shared, x = memory(6, scope="batch"), normal(3, 4, 4, 6)
    fast, outputs = None, []
    for frame in x.split(1, dim=1):
        output, fast, _ = shared(frame, fast, keep_state=True)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), shared(x)[0], rtol=1e-11, atol=1e-11)


def test_more_writes_move_a_memory_further() -> None:
    titan, x = memory(6, retention_bias=20.0), normal(1, 5, 4, 6)
    drifts = [titan(x[:, :t], keep_state=True)[2].drift[0, MAIN].item() for t in range(1, 6)]
    assert all(late > early for early, late in pairwise(drifts))


def test_memories_written_for_one_clip_do_not_serve_others() -> None:
    titan = memory(6)
    _, written, _ = titan(normal(1, 2, 4, 6), keep_state=True)
    with pytest.raises(ValueError, match="those of 1 clips, and 3 are given"):
        titan(normal(3, 1, 4, 6), written)
    _, as_trained, _ = titan(normal(1, 2, 4, 6), writes=False, keep_state=True)
    x = normal(3, 1, 4, 6)
    assert torch.equal(titan(x, as_trained)[0], titan(x)[0])
