from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hopescale.model.objective import ClipLosses, clip_losses, distance
from hopescale.model.objective_schema import ObjectiveConfig
from hopescale.model.predictor import HopePredictor, Prediction, normalise

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
        jump_target=torch.tensor([3, 2, 2, 1][:batch]),
        draws=torch.rand(batch, 4, 3, generator=generator),
    )


def objective(**fields: Any) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate(fields)


EVERYTHING = objective(jump_context=2, rollout={"weight": 1.0, "context": 1, "steps": 3})


def losses(model: nn.Module, batch: Clips, config: ObjectiveConfig = EVERYTHING) -> ClipLosses:
    return clip_losses(model, config, *batch)


def gradients(model: nn.Module, loss: ClipLosses) -> list[Tensor]:
    total = loss.teacher + loss.jump + loss.rollout
    return list(torch.autograd.grad(total, list(model.parameters()), materialize_grads=True))


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
        **options: Any,
    ) -> Prediction:
        self.asked.append((features, actions, states, target))
        return Prediction(self.answer(features), None, ())


def test_distances_by_hand() -> None:
    prediction = torch.tensor([[[0.0, 0.5], [3.0, 1.0]]])
    target = torch.zeros(1, 2, 2)
    assert distance(prediction, target, "l1").item() == pytest.approx((0 + 0.5 + 3 + 1) / 4)
    assert distance(prediction, target, "l2").item() == pytest.approx((0 + 0.25 + 9 + 1) / 4)
    assert distance(prediction, target, "huber").item() == pytest.approx((0 + 0.125 + 2.5 + 0.5) / 4)
    assert distance(prediction, target, "huber", 0.5).item() == pytest.approx((0 + 0.125 + 1.375 + 0.375) / 4)


@pytest.mark.parametrize("loss", ["l1", "l2", "huber"])
def test_losses_are_sums_of_mean_errors_over_valid_transitions_and_clips(loss: str) -> None:
    batch = clips()
    truth = normalise(batch.features)
    delta = 0.5 if loss == "huber" else 1.0
    rollout = {"weight": 1.0, "context": 2, "steps": 2}
    found = losses(Scripted(normalise), batch, objective(loss=loss, huber_delta=delta, jump_context=2, rollout=rollout))

    def error(row: int, seen: int, goal: int) -> float:
        return float(distance(truth[row, seen], truth[row, goal], loss, delta))

    # What repeats the newest frame jumps to, and rolls out, the last one of its context.
    lengths, aims = batch.lengths.tolist(), batch.jump_target.tolist()
    teacher = sum(error(row, t, t + 1) for row, length in enumerate(lengths) for t in range(length - 1))
    jump = sum(error(row, 1, aims[row]) for row, length in enumerate(lengths) if length > 2)
    rolled = sum(error(row, 1, t) for row, length in enumerate(lengths) for t in range(2, 4) if t < length)
    assert float(found.teacher) == pytest.approx(teacher, rel=1e-5)
    assert float(found.jump) == pytest.approx(jump, rel=1e-5)
    assert float(found.rollout) == pytest.approx(rolled, rel=1e-5)


def test_a_branch_of_weight_0_is_not_run() -> None:
    for branch, shapes in (("teacher", [FRAMES - 1]), ("jump", [1]), ("rollout", [2, 1])):
        weights = {"teacher": 0.0, "jump": 0.0, "rollout": 0.0} | {branch: 0.5}
        model = Scripted(normalise)
        rollout = {"weight": weights["rollout"], "context": 2} if branch == "rollout" else {}
        config = objective(teacher_weight=weights["teacher"], jump_weight=weights["jump"], rollout=rollout)
        found = losses(model, clips(), config)._asdict()
        assert [features.shape[1] for features, *_ in model.asked] == shapes
        assert [name for name in weights if float(found[name]) > 0] == [branch]


def test_jump_sees_the_first_frame_and_its_action_only() -> None:
    model, batch = Scripted(normalise), clips()
    losses(model, batch, ObjectiveConfig())
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
        config, other = ObjectiveConfig(), aim % (FRAMES - 1) + 1
        assert float(losses(exact, batch._replace(jump_target=torch.tensor([aim])), config).jump) < 1e-6
        assert float(losses(exact, batch._replace(jump_target=torch.tensor([other])), config).jump) > 0.1


def test_micro_batches_add_up_to_one_batch(small_predictor: Callable[..., HopePredictor]) -> None:
    model, batch = small_predictor(), clips()
    whole, parts = losses(model, batch), [losses(model, batch.rows(rows)) for rows in ([0], [1, 2, 3])]
    torch.testing.assert_close(parts[0].teacher + parts[1].teacher, whole.teacher, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts[0].jump + parts[1].jump, whole.jump, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts[0].rollout + parts[1].rollout, whole.rollout, rtol=1e-5, atol=1e-6)
    for one, first, second in zip(*(gradients(model, loss) for loss in (whole, *parts)), strict=True):
        assert (first + second - one).norm() <= 1e-4 * one.norm()


def test_a_clip_of_weight_0_contributes_nothing(small_predictor: Callable[..., HopePredictor]) -> None:
    model, batch = small_predictor(), clips()
    silent = losses(model, batch.rows([0])._replace(weights=torch.zeros(1)))
    assert silent.teacher.item() == silent.jump.item() == silent.rollout.item() == 0.0
    assert all(not gradient.any() for gradient in gradients(model, silent))

    without = losses(model, batch.rows([1, 2, 3]))
    muted = losses(model, batch._replace(weights=torch.tensor([0.0, 1.0, 1.0, 1.0])))
    torch.testing.assert_close(muted.teacher, without.teacher)
    torch.testing.assert_close(muted.rollout, without.rollout)
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
    assert torch.equal(before.rollout, after.rollout)
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
