from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hopescale.model.cms import CmsLayer, ContinuumMemory
from hopescale.model.schema import CmsConfig

WIDTH = 8


def cms(*periods: int, mode: str = "frame_mask") -> ContinuumMemory:
    torch.manual_seed(0)
    levels = [{"period": p, "hidden_multiplier": 1.5} for p in periods]
    config = CmsConfig.model_validate({"mode": mode, "levels": levels})
    return ContinuumMemory(config, WIDTH).requires_grad_(False)


def frames(count: int, seed: int = 1) -> Tensor:
    return torch.randn(2, count, 3, WIDTH, generator=torch.Generator().manual_seed(seed))


def touched(memory: ContinuumMemory, z: Tensor, frame_offset: int) -> list[bool]:
    return (memory(z, frame_offset) != z).flatten(2).any(dim=2).all(dim=0).tolist()


@pytest.mark.parametrize(
    ("num_frames", "offset", "expected"),
    [
        (1, 0, {1: [0], 3: [0], 7: [0]}),
        (1, 6, {1: [0], 3: [0], 7: []}),
        (1, 7, {1: [0], 3: [], 7: [0]}),
        (7, 0, {1: list(range(7)), 3: [0, 3, 6], 7: [0]}),
        (8, 0, {1: list(range(8)), 3: [0, 3, 6], 7: [0, 7]}),
        (8, 2, {1: list(range(8)), 3: [1, 4, 7], 7: [5]}),
        (7, 8, {1: list(range(7)), 3: [1, 4], 7: [6]}),
    ],
)
def test_levels_are_active_on_multiples_of_their_period(
    num_frames: int, offset: int, expected: dict[int, list[int]]
) -> None:
    rows = cms(1, 3, 7).active_levels(num_frames, offset)
    for row, (period, active) in zip(rows, expected.items(), strict=True):
        assert row == [t in active for t in range(num_frames)]
        assert touched(cms(period), frames(num_frames), offset) == row


@pytest.mark.parametrize("offset", [0, 1, 5])
def test_forward_equals_each_frame_through_its_active_levels(offset: int) -> None:
    memory, z = cms(1, 3, 2), frames(7)
    out = memory(z, offset)
    for t in range(7):
        row = z[:, t]
        for level, active in zip(memory.levels, memory.active_levels(7, offset), strict=True):
            if active[t]:
                assert isinstance(level, CmsLayer)
                row = row + level.fc2(F.gelu(level.fc1(level.norm(row))))
        torch.testing.assert_close(out[:, t], row)


def test_frames_of_no_active_level_pass_bit_equal() -> None:
    memory, z = cms(3, 7), frames(8)
    out = memory(z)
    assert touched(memory, z, 0) == [True, False, False, True, False, False, True, True]
    assert torch.equal(out[:, [1, 2, 4, 5]], z[:, [1, 2, 4, 5]])
    assert memory(frames(1), 1).equal(frames(1))


@pytest.mark.parametrize("offset", [0, 1, 7])
def test_all_levels_touch_all_frames_where_periods_are_the_optimizers(offset: int) -> None:
    memory, z = cms(1, 3, 7, mode="param_period"), frames(8)
    assert memory.active_levels(8, offset) == [[True] * 8] * 3
    expected = z
    for level in memory.levels:
        expected = level(expected)
    assert torch.equal(memory(z, offset), expected)


def test_frame_by_frame_equals_the_whole_clip() -> None:
    memory, z = cms(1, 3, 7), frames(8)
    single = torch.cat([memory(z[:, t : t + 1], t) for t in range(8)], dim=1)
    torch.testing.assert_close(single, memory(z), rtol=1e-5, atol=1e-6)


def test_gradient_reaches_a_level_only_through_its_frames() -> None:
    memory, z = cms(1, 3).requires_grad_(True), frames(4)
    skipped = memory(z)[:, 1:3].sum()
    gradients = torch.autograd.grad(skipped, list(memory.levels[1].parameters()), allow_unused=True)
    assert all(g is None or not g.any() for g in gradients)
    used = torch.autograd.grad(memory(z)[:, 3].square().sum(), list(memory.levels[1].parameters()))
    assert all(g.any() for g in used)
