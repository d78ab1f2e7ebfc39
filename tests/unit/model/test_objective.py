from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hopescale.model.objective import ClipLosses, clip_losses, distance
from hopescale.model.predictor import HopePredictor, Prediction, normalise
from hopescale.model.schema import ObjectiveConfig

FRAMES = 4


class Clips(NamedTuple):
    features: Tensor
    actions: Tensor
    states: Tensor
    lengths: Tensor
    weights: Tensor
    jump_target: Tensor
    draws: Tensor

    def rows(self, rows: list[int]) -> Clips:
        return Clips(*(column[rows] for column in self))


def clips(batch: int = 4) -> Clips:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    return Clips(
        features=3 * normal(FRAMES, 6, 10),
        actions=normal(FRAMES - 1, 3),
        states=normal(FRAMES, 2),
        lengths=torch.tensor([4, 3, 4, 2][:batch]),
        weights=torch.ones(batch),
        jump_target=torch.tensor([3, 2, 1, 1][:batch]),
        draws=torch.rand(batch, 4, 3, generator=generator),
    )


def losses(model: nn.Module, batch: Clips, config: ObjectiveConfig | None = None) -> ClipLosses:
    return clip_losses(model, config or ObjectiveConfig(), *batch)


def gradients(model: nn.Module, loss: ClipLosses) -> list[Tensor]:
    return list(torch.autograd.grad(loss.teacher + loss.jump, list(model.parameters()), materialize_grads=True))


class Scripted(nn.Module):
    """Predicts what it is told and remembers what it was asked."""

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.answer = answer
        self.asked: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = []

    def forward(
        self,
        features: Tensor,
        actions: Tensor,
        states: Tensor | None = None,
        *,
        target: Tensor | None = None,
        draws: Tensor | None = None,
    ) -> Prediction:
        self.asked.append((features, actions, states, target))
        return Prediction(self.answer(features), None, ())


def test_distances_by_hand() -> None:
    prediction = torch.tensor([[[0.0, 0.5], [3.0, 1.0]]])
    target = torch.zeros(1, 2, 2)
    assert distance(prediction, target, "l1").item() == pytest.approx((0 + 0.5 + 3 + 1) / 4)
    assert distance(prediction, target, "l2").item() == pytest.approx((0 + 0.25 + 9 + 1) / 4)
    assert distance(prediction, target, "huber").item() == pytest.approx((0 + 0.125 + 2.5 + 0.5) / 4)


@pytest.mark.parametrize("loss", ["l1", "l2", "huber"])
def test_losses_are_sums_of_mean_errors_over_valid_transitions_and_clips(loss: str) -> None:
    batch = clips()
    truth = normalise(batch.features)
    found = losses(Scripted(normalise), batch, ObjectiveConfig.model_validate({"loss": loss}))
    teacher = sum(
        float(distance(truth[row, t], truth[row, t + 1], loss))
        for row, length in enumerate(batch.lengths)
        for t in range(int(length) - 1)
    )
    jump = sum(float(distance(truth[row, 0], truth[row, aim], loss)) for row, aim in enumerate(batch.jump_target))
    assert float(found.teacher) == pytest.approx(teacher, rel=1e-5)
    assert float(found.jump) == pytest.approx(jump, rel=1e-5)


def test_a_branch_of_weight_0_is_not_run() -> None:
    for weights, shapes in (({"teacher_weight": 0.0}, [1]), ({"jump_weight": 0.0}, [FRAMES - 1])):
        model = Scripted(normalise)
        found = losses(model, clips(), ObjectiveConfig.model_validate(weights))
        assert [features.shape[1] for features, *_ in model.asked] == shapes
        assert (float(found.teacher) == 0) == ("teacher_weight" in weights)
        assert (float(found.jump) == 0) == ("jump_weight" in weights)


def test_jump_sees_the_first_frame_and_its_action_only() -> None:
    model, batch = Scripted(normalise), clips()
    losses(model, batch)
    features, actions, states, target = model.asked[1]
    assert torch.equal(features, batch.features[:, :1])
    assert torch.equal(actions, batch.actions[:, :1])
    assert states is not None
    assert torch.equal(states, batch.states[:, :1])
    assert target is not None
    assert torch.equal(target, batch.jump_target)


def test_jump_is_compared_with_its_target_frame() -> None:
    batch = clips(1)
    for aim in range(1, FRAMES):
        exact = Scripted(lambda features, aim=aim: normalise(batch.features[:, aim : aim + 1]))
        assert float(losses(exact, batch._replace(jump_target=torch.tensor([aim]))).jump) < 1e-6
        other = aim % (FRAMES - 1) + 1
        assert float(losses(exact, batch._replace(jump_target=torch.tensor([other]))).jump) > 0.1


def test_micro_batches_add_up_to_one_batch(small_predictor: Callable[..., HopePredictor]) -> None:
    model, batch = small_predictor(), clips()
    whole, parts = losses(model, batch), [losses(model, batch.rows(rows)) for rows in ([0], [1, 2, 3])]
    torch.testing.assert_close(parts[0].teacher + parts[1].teacher, whole.teacher, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts[0].jump + parts[1].jump, whole.jump, rtol=1e-5, atol=1e-6)
    for one, first, second in zip(*(gradients(model, loss) for loss in (whole, *parts)), strict=True):
        assert (first + second - one).norm() <= 1e-4 * one.norm()


def test_a_clip_of_weight_0_contributes_nothing(small_predictor: Callable[..., HopePredictor]) -> None:
    model, batch = small_predictor(), clips()
    silent = losses(model, batch.rows([0])._replace(weights=torch.zeros(1)))
    assert silent.teacher.item() == silent.jump.item() == 0.0
    assert all(not gradient.any() for gradient in gradients(model, silent))

    without = losses(model, batch.rows([1, 2, 3]))
    muted = losses(model, batch._replace(weights=torch.tensor([0.0, 1.0, 1.0, 1.0])))
    torch.testing.assert_close(muted.teacher, without.teacher)
    for one, other in zip(gradients(model, muted), gradients(model, without), strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


def test_padding_contributes_nothing(small_predictor: Callable[..., HopePredictor]) -> None:
    model, batch = small_predictor(), clips()
    other = batch._replace(features=batch.features.clone(), actions=batch.actions.clone(), states=batch.states.clone())
    for row, length in enumerate(batch.lengths.tolist()):
        other.features[row, length:] = 100.0 * torch.randn(other.features[row, length:].shape)
        other.actions[row, length - 1 :] = 7.0
        other.states[row, length:] = -7.0
    before, after = losses(model, batch), losses(model, other)
    assert torch.equal(before.teacher, after.teacher)
    assert torch.equal(before.jump, after.jump)
    for one, two in zip(gradients(model, before), gradients(model, after), strict=True):
        assert (one - two).norm() <= 1e-5 * one.norm()


def test_zero_padding_gives_finite_gradients(small_predictor: Callable[..., HopePredictor]) -> None:
    model, batch = small_predictor(), clips()
    features = batch.features * (torch.arange(FRAMES) < batch.lengths[:, None])[..., None, None]
    loss = losses(model, batch._replace(features=features))
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model, loss))


def test_l1_and_huber_agree_with_torch() -> None:
    a, b = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(distance(a, b, "l1").mean(), F.l1_loss(a, b, reduction="none").mean(dim=(1, 2)).mean())
    torch.testing.assert_close(distance(a, b, "huber").mean(), F.huber_loss(a, b))
