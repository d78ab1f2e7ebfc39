"""What the training loss reaches: every memory from every frame and branch, and no parameter not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hopescale.model.init import initialise
from hopescale.model.objective import clip_losses, distance
from hopescale.model.objective_schema import ObjectiveConfig
from hopescale.model.predictor import HopePredictor, normalise
from hopescale.model.schema import MEMORIES, ModelConfig
from hopescale.model.titan import ALPHA, ETA, KEY, MAIN, VALUE, TitanMemory
from hopescale.optim.m3 import M3
from hopescale.optim.routing import parameter_groups
from hopescale.optim.schema import OptimizerConfig
from tests.unit.model.titan_cases import gradients, memory, normal

Configure = Callable[..., ModelConfig]
Draw = Callable[..., tuple[Tensor, Tensor, Tensor]]

OF_MEMORIES = ("w1", "w2", "norm_weight", "norm_bias")


def learning(gradient: dict[str, Tensor], prefix: str = "") -> list[set[str]]:
    """For each of the memories' parameters, the memories whose gradient is not exactly zero."""
    return [
        {label for which, label in enumerate(MEMORIES) if gradient[prefix + name][which].any()} for name in OF_MEMORIES
    ]


@pytest.mark.parametrize("rule", ["frame_step", "token_exact", "scan"])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("order", ["fo", "fo_kv", "so", "straight_through"])
def test_key_and_value_memories_learn_as_far_as_meta_grad_says(order: str, heads: int, rule: str) -> None:
    titan = memory(16, heads=heads, meta_grad=order, chunk_rule=rule)
    expected = {
        "fo": {"eta", "alpha", "main"},
        "fo_kv": set(MEMORIES),
        "so": set(MEMORIES),
        "straight_through": {"main"},
    }[order]
    for frames in (2, 3):
        gradient = gradients(titan, titan(normal(2, frames, 4, 16))[0].square().sum())
        assert learning(gradient) == [expected] * len(OF_MEMORIES)


@pytest.mark.parametrize("order", ["fo_kv", "so"])
def test_one_chunk_teaches_the_main_memory_only(order: str) -> None:
    titan = memory(12, heads=2, meta_grad=order)
    gradient = gradients(titan, titan(normal(2, 1, 4, 12))[0].square().sum())
    assert learning(gradient) == [{"main"}] * len(OF_MEMORIES)


def small(small_config: Configure, pattern: str, heads: int = 1, **memory: Any) -> HopePredictor:
    options = {"heads": heads, "hidden_multiplier": 2.0} | memory
    return HopePredictor(small_config(block_pattern=tuple(pattern), memory=options, frames=4, drop_path=0.0))


def loss(model: HopePredictor, given: tuple[Tensor, ...], objective: ObjectiveConfig) -> Tensor:
    features, actions, states = given
    count = len(features)
    lengths, target = torch.full((count,), 4), torch.tensor([1, 3])
    found = clip_losses(model, objective, features, actions[:, :3], states, lengths, torch.ones(count), target, None)
    return objective.teacher_weight * found.teacher + objective.jump_weight * found.jump


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("pattern", ["H", "SHS", "THT", "SUTH"])
@pytest.mark.parametrize("order", ["fo_kv", "so"])
def test_every_parameter_has_a_gradient_by_the_second_step(
    small_config: Configure, small_input: Draw, pattern: str, heads: int, order: str
) -> None:
    model = small(small_config, pattern, heads, meta_grad=order)
    initialise(model, seed=0)
    config = OptimizerConfig.model_validate({"lr": 1e-3})
    optimizer = M3(parameter_groups(model.named_parameters(), config), config)
    loss(model, small_input(), ObjectiveConfig()).backward()
    # A fresh output matrix of the mixing over tokens is zero, and lets no gradient through to what is before it.
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in without if "norm3" not in name and "spatial_mixing.first" not in name] == []
    optimizer.step()
    optimizer.zero_grad()
    loss(model, small_input(), ObjectiveConfig()).backward()
    named = {name: p.grad for name, p in model.named_parameters()}
    assert [name for name, gradient in named.items() if gradient is None or not gradient.any()] == []
    gradient = {name: g for name, g in named.items() if g is not None}
    for number, block in enumerate(model.blocks):
        part = getattr(block, "memory", None)
        if type(part) is TitanMemory:
            expected = [set(MEMORIES)] * len(OF_MEMORIES)
            assert learning(gradient, f"blocks.{number}.memory.") == expected
    # Of the targets' embeddings, those that were jumped to.
    assert gradient["target_position.weight"].any(dim=1).nonzero().flatten().tolist() == [1, 3]


@pytest.mark.parametrize("interval", [0, 1, 2])
def test_every_frame_trains_the_main_memory_of_every_block(
    small_config: Configure, small_input: Draw, interval: int
) -> None:
    model = small(small_config, "SHTH", detach_interval=interval)
    initialise(model, seed=0)
    features, actions, states = (t.double() for t in small_input())
    model = model.double()
    predicted = model(features[:, :-1], actions[:, :-1], states[:, :-1]).frames
    errors = distance(predicted, normalise(features)[:, 1:], "l1").sum(0)
    for t, error in enumerate(errors):
        named = dict(model.named_parameters())
        found = torch.autograd.grad(error, list(named.values()), retain_graph=True, materialize_grads=True)
        gradient = dict(zip(named, found, strict=True))
        for block in (1, 3):
            w1 = gradient[f"blocks.{block}.memory.w1"]
            assert w1[MAIN].abs().max() > 1e-9, (t, block)
            # The last block's first read has no write before it; those of earlier blocks neither.
            others = {which for which in (KEY, VALUE, ETA, ALPHA) if w1[which].any()}
            assert others == ({KEY, VALUE, ETA, ALPHA} if t else set()), (t, block)


@pytest.mark.parametrize("branch", ["teacher_weight", "jump_weight"])
def test_every_branch_alone_trains_the_memories(small_config: Configure, small_input: Draw, branch: str) -> None:
    model = small(small_config, "SHS")
    initialise(model, seed=0)
    weights = {"teacher_weight": 0.0, "jump_weight": 0.0} | {branch: 1.0}
    loss(model, small_input(), ObjectiveConfig.model_validate(weights)).backward()
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = set(MEMORIES) if branch == "teacher_weight" else {"main"}
    assert learning(gradient, "blocks.1.memory.") == [expected] * len(OF_MEMORIES)
