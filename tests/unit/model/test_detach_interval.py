"""`memory.detach_interval`: what a cut of the outer gradient changes, and what it must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hopescale.model.titan import ALPHA, ETA, KEY, MAIN, VALUE, TitanMemory
from tests.unit.model.titan_cases import gradients, memory, normal

FRAMES = 5


def frame_losses(titan: TitanMemory, x: Tensor) -> list[Tensor]:
    """A loss of every frame's output alone."""
    output = titan(x)[0]
    return [(output[:, t] * normal(*output[:, t].shape, seed=3)).sum() for t in range(x.shape[1])]


def by_frame(titan: TitanMemory) -> list[dict[str, Tensor]]:
    """Gradients of each frame's loss alone."""
    x = normal(2, FRAMES, 3, 6)
    return [gradients(titan, frame_losses(titan, x)[t]) for t in range(FRAMES)]


@pytest.mark.parametrize(
    "fields", [{}, {"chunk_rule": "token_exact"}, {"chunk_rule": "scan"}, {"momentum": 0.5}], ids=str
)
@pytest.mark.parametrize("rule", ["keep_start", "all"])
@pytest.mark.parametrize("interval", [1, 2, 3])
def test_values_are_those_of_never_cutting_bit_for_bit(interval: int, rule: str, fields: dict[str, Any]) -> None:
    x = normal(2, FRAMES, 3, 6)
    never, cut = memory(6, **fields), memory(6, detach_interval=interval, detach_rule=rule, **fields)
    (expected, end, _), (output, same, _) = never(x, keep_state=True), cut(x, keep_state=True)
    assert torch.equal(output, expected)
    assert torch.equal(same.w1, end.w1)
    assert torch.equal(same.w2, end.w2)


@pytest.mark.parametrize("interval", [1, 2, 3])
@pytest.mark.parametrize("order", ["fo", "fo_kv", "so"])
def test_every_frame_trains_the_memories_it_starts_from(interval: int, order: str) -> None:
    for t, gradient in enumerate(by_frame(memory(6, meta_grad=order, detach_interval=interval))):
        for name in ("w1", "w2", "norm_weight"):
            assert gradient[name][MAIN].abs().max() > 1e-6, (t, name)
        # What a read of frame t sees of the write before it; the first frame has none.
        learning = [ETA, ALPHA] if order == "fo" else [KEY, VALUE, ETA, ALPHA]
        for which in (KEY, VALUE, ETA, ALPHA):
            assert (gradient["w1"][which].abs().max() > 0) == (t > 0 and which in learning), (t, which)


@pytest.mark.parametrize("interval", [1, 2])
def test_a_read_sees_the_write_just_before_it_whole(interval: int) -> None:
    """With respect to frame 0 itself, the read of frame 1 has the gradient of never cutting."""
    titans = [memory(6, detach_interval=n) for n in (0, interval)]
    pulled = []
    for titan in titans:
        x = normal(2, FRAMES, 3, 6).requires_grad_()
        losses = frame_losses(titan, x)
        pulled.append([torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in losses])
    uncut, cut = pulled
    torch.testing.assert_close(cut[1], uncut[1], rtol=1e-12, atol=1e-14)
    for t in range(1, FRAMES):
        assert cut[t][:, t - 1].abs().max() > 1e-6, t
    for t in range(interval + 1, FRAMES):
        assert not torch.allclose(cut[t], uncut[t], rtol=1e-3, atol=0), t


@pytest.mark.parametrize("interval", [1, 2])
def test_cutting_changes_how_much_old_frames_count_not_whether_the_start_does(interval: int) -> None:
    never, cut = by_frame(memory(6)), by_frame(memory(6, detach_interval=interval))
    # Nothing was cut yet where the first reads were made.
    for t in range(interval + 1):
        torch.testing.assert_close(cut[t]["w1"], never[t]["w1"], rtol=1e-12, atol=1e-14)
    for t in range(interval + 1, FRAMES):
        assert not torch.allclose(cut[t]["w1"], never[t]["w1"], rtol=1e-3, atol=0)
        ratio = cut[t]["w1"][MAIN].norm() / never[t]["w1"][MAIN].norm()
        assert 0.2 < ratio < 5


@pytest.mark.parametrize("interval", [1, 2])
def test_cutting_all_leaves_late_frames_nothing_to_train(interval: int) -> None:
    gradients_of = by_frame(memory(6, detach_interval=interval, detach_rule="all"))
    for t, gradient in enumerate(gradients_of):
        # The write before the read of frame t is cut where t is a multiple of the interval.
        for which in (KEY, VALUE, ETA, ALPHA):
            assert (gradient["norm_weight"][which].abs().max() > 0) == (t % interval != 0), (t, which)
        assert (gradient["w1"][MAIN].abs().max() > 0) == (t < interval), t


def test_cuts_bound_how_far_back_a_gradient_reaches_if_all_is_cut() -> None:
    x = normal(2, FRAMES, 3, 6).requires_grad_()
    loss = frame_losses(memory(6, detach_interval=2, detach_rule="all"), x)[-2]
    (pull,) = torch.autograd.grad(loss, x)
    assert [t for t in range(FRAMES) if pull[:, t].abs().max() > 0] == [2, 3]
