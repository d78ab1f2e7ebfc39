"""Every figure of `MemoryTrace` against its definition, computed from the memories before and after each write."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hopescale.model.block import HopeBlock
from hopescale.model.cms import ContinuumMemory
from hopescale.model.cms_online import OnlineMemory
from hopescale.model.schema import MEMORIES, CmsConfig, ModelConfig
from hopescale.model.titan import FastWeights, TitanMemory
from hopescale.model.write_rules import Gates
from tests.unit.model.titan_cases import memory, normal

LEVELS = [{"period": 1, "hidden_multiplier": 1.5}, {"period": 3, "hidden_multiplier": 1.0}]


def frame_by_frame(titan: TitanMemory, x: Tensor) -> list[tuple[FastWeights, Gates, FastWeights]]:
    """The memories before each write, the gates read from them, and the memories after."""
    fast, found = titan.start(), []
    for t in range(x.shape[1]):
        tokens = titan.inputs(x[:, t : t + 1]).squeeze(2)
        query = F.normalize(titan.split(titan.query(x[:, t]), 0), dim=-1)
        gates, after = titan.read(fast, tokens, query)[1], titan(x[:, t : t + 1], fast, keep_state=True)[1]
        assert after is not None
        found.append((fast, gates, after))
        fast = after
    return found


@pytest.mark.parametrize("heads", [1, 2])
def test_gates_are_summed_up_as_they_say(heads: int) -> None:
    titan, x = memory(6, heads=heads, hidden_multiplier=1.5, eta_max=2.0), normal(2, 3, 70, 6)
    trace = titan(x, keep_state=True)[2]
    for write, (_, gates, _) in enumerate(frame_by_frame(titan, x)):
        for clip in range(2):
            sizes = gates.step_size[:, clip, :, 0]
            assert trace.step_size[clip, write].item() == pytest.approx(sizes.sum().item() / heads)
            ordered = sorted(sizes.flatten().tolist())
            above = ordered[math.ceil(0.99 * len(ordered)) - 1]
            assert trace.step_size_p99[clip, write].item() == pytest.approx(70 * above)
            kept = gates.retention[:, clip, 0, 0]
            assert trace.retention[clip, write].item() == pytest.approx(kept.mean().item())
            assert trace.retention_min[clip, write].item() == pytest.approx(kept.min().item())
    assert (trace.step_size_p99 > trace.step_size).all()
    assert (trace.retention_min < trace.retention).all() == (heads > 1)


def test_clips_behind_the_gate_keep_all_of_their_memories() -> None:
    titan, x = memory(6, heads=2, hidden_multiplier=1.5, surprise_gate=1.9), normal(2, 3, 4, 6)
    trace = titan(x, keep_state=True)[2]
    assert not trace.gate.any()
    assert torch.equal(trace.retention, torch.ones_like(trace.retention))
    assert torch.equal(trace.retention_min, torch.ones_like(trace.retention))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("limit", [0.02, 1e6])
@pytest.mark.parametrize("names", [list(MEMORIES), ["eta", "main"]])
def test_writes_are_measured_by_what_they_change(limit: float, names: list[str], momentum: float) -> None:
    settings = {"eta_max": 2.0, "write_limit": limit, "self_modify": names, "momentum": momentum}
    titan = memory(6, heads=2, hidden_multiplier=1.5, **settings)
    x = normal(2, 3, 4, 6)
    trace = titan(x, keep_state=True)[2]
    for write, (before, gates, after) in enumerate(frame_by_frame(titan, x)):
        for number, name in enumerate(MEMORIES):
            for clip in range(2):
                ratios = []
                for old, new in ((before.w1, after.w1), (before.w2, after.w2)):
                    for head in range(2):
                        own = old.expand(-1, -1, 2, -1, -1)[number, head, clip]
                        change = gates.retention[head, clip] * own - new[number, head, clip]
                        ratios.append(change.norm() / own.norm())
                expected = torch.stack(ratios).mean().item() if name in names else 0.0
                assert trace.write_ratio[clip, write, number].item() == pytest.approx(expected, abs=1e-12)
    written = [MEMORIES.index(name) for name in names]
    assert (trace.limited[..., written].mean() > 0.5) == (limit < 1)
    assert trace.limited.sum() == trace.limited[..., written].sum()


@pytest.mark.parametrize("names", [list(MEMORIES), ["eta", "main"]])
def test_sizes_at_the_end_are_those_of_the_memories_at_the_end(names: list[str]) -> None:
    titan, x = memory(6, heads=2, hidden_multiplier=1.5, eta_max=2.0, self_modify=names), normal(2, 3, 4, 6)
    _, fast, trace = titan(x, keep_state=True)
    assert fast is not None
    trained = titan.w1.unsqueeze(2)
    size = trained.norm(dim=(-2, -1)).mean(dim=1)
    for found, part in ((trace.norm_ratio, fast.w1), (trace.drift, fast.w1 - trained)):
        torch.testing.assert_close(found, (part.norm(dim=(-2, -1)).mean(dim=1) / size).T)
    moved = (trace.drift > 0).all(dim=0)
    assert [name for name, changed in zip(MEMORIES, moved.tolist(), strict=True) if changed] == list(
        dict.fromkeys(name for name in MEMORIES if name in names)
    )


def test_a_pass_that_writes_nothing_leaves_the_memories_their_size() -> None:
    titan, x = memory(6), normal(3, 2, 4, 6)
    for options in ({"writes": False}, {"writes": False, "keep_state": True}):
        trace = titan(x, **options)[2]
        assert torch.equal(trace.norm_ratio, torch.ones(3, 5, dtype=torch.float64))
        assert torch.equal(trace.drift, torch.zeros(3, 5, dtype=torch.float64))
    # A pass that only reads what an earlier one has written is not such a pass.
    _, fast, written = titan(x, keep_state=True)
    reread = titan(x, fast, writes=False)[2]
    assert reread.surprise.shape == (3, 0)
    torch.testing.assert_close(reread.drift, written.drift)


def test_figures_have_no_graph() -> None:
    trace = memory(6, heads=2)(normal(2, 3, 4, 6), keep_state=True)[2]
    assert not any(figure.requires_grad for figure in trace if isinstance(figure, Tensor))


def added(memory: Any, before: Tensor, offset: int) -> list[Tensor]:
    """Norm of what each level adds to each frame over the norm of the frame, level by level."""
    found = []
    for level, active in zip(memory.levels, memory.active_levels(before.shape[1], offset), strict=True):
        change = torch.stack(
            [level(z) - z if on else torch.zeros_like(z) for z, on in zip(before.unbind(1), active, strict=True)], dim=1
        )
        found.append(change.flatten(2).norm(dim=-1) / before.flatten(2).norm(dim=-1))
        before = before + change
    return found


@pytest.mark.parametrize("mode", ["frame_mask", "param_period"])
@pytest.mark.parametrize("offset", [0, 1, 2])
def test_levels_tell_how_much_they_add(mode: str, offset: int) -> None:
    cms = ContinuumMemory(CmsConfig.model_validate({"mode": mode, "levels": LEVELS}), 8).double().requires_grad_(False)
    for frames in (1, 5):
        z = normal(2, frames, 3, 8)
        out, ratios = cms.traced(z, offset)
        assert torch.equal(out, cms(z, offset))
        for found, expected in zip(ratios, added(cms, z, offset), strict=True):
            torch.testing.assert_close(found, expected)


def test_levels_that_learn_tell_how_much_they_add() -> None:
    config = CmsConfig.model_validate({"mode": "online", "levels": LEVELS})
    cms = OnlineMemory(config, 8, longest=7).double().requires_grad_(False)
    z = normal(2, 3, 3, 8)
    ratios = cms.traced(z)[-1]
    for found, expected in zip(ratios, added(cms, z, 0), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("levels", [[], LEVELS])
def test_a_block_hands_on_the_figures_of_its_levels(levels: list[dict[str, Any]]) -> None:
    config = ModelConfig.model_validate(
        {
            "width": 8,
            "grid": (1, 3),
            "memory": {"hidden_multiplier": 1.0},
            "cms": {"levels": levels},
            "block_pattern": ["H"],
        }
    )
    block = HopeBlock(config, 0.0).double()
    with torch.no_grad():
        for number, parameter in enumerate(block.parameters()):
            parameter.copy_(0.3 * normal(*parameter.shape, seed=number))
    ratio = block(normal(2, 5, 4, 8))[2].level_ratio
    assert ratio.shape == (2, 5, len(levels))
    assert not ratio.requires_grad
    if levels:
        assert (ratio > 0).all(dim=0).T.tolist() == [[True] * 5, [True, False, False, True, False]]
