"""The auxiliary loss: keys and values are taught to be what the main memory recalls for each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hopescale.model.objective import clip_losses
from hopescale.model.objective_schema import ObjectiveConfig
from hopescale.model.predictor import HopePredictor
from hopescale.model.schema import MEMORIES
from hopescale.model.titan import MAIN, TitanMemory
from hopescale.parallel.activation_checkpointing import recompute_blocks
from tests.unit.model.titan_cases import gradients, memory, normal

WEIGHTS = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
"""Of five frames of two clips, the second of which ends early."""


def chunk_by_chunk(titan: TitanMemory, x: Tensor, weights: Tensor) -> Tensor:
    """The same, one chunk and one frame after the other, of clips that each have a memory of their own."""
    size, fast, total = titan.config.chunk_size, titan.start(), torch.zeros(len(x), dtype=x.dtype)
    for begin in range(0, x.shape[1], size):
        chunk = slice(begin, min(begin + size, x.shape[1]))
        if chunk.stop == x.shape[1]:
            break
        tokens = titan.split(x[:, chunk].flatten(1, 2), 0)
        query = F.normalize(titan.split(titan.query(x[:, chunk]).flatten(1, 2), 0), dim=-1)
        _, gates = titan.read(fast, tokens, query)
        w1, w2 = fast.w1[MAIN].expand(-1, len(x), -1, -1), fast.w2[MAIN].expand(-1, len(x), -1, -1)
        recalled = gates.key + F.gelu(gates.key @ w1.mT) @ w2.mT
        apart = 2 * (recalled - gates.value).square().mean(dim=(0, 3)).unflatten(1, (-1, x.shape[2])).mean(-1)
        for clip in range(len(x)):
            counted = [apart[clip, t] for t in range(apart.shape[1]) if weights[clip, begin + t]]
            total[clip] += torch.stack(counted).mean() if counted else 0.0
        fast, _ = titan.write(fast, gates)
    return total


@pytest.mark.parametrize("meta_grad", ["fo", "fo_kv", "straight_through"])
@pytest.mark.parametrize(("heads", "chunk_size"), [(1, 1), (2, 2), (3, 3), (2, 5)])
def test_the_loss_is_the_mean_over_a_chunk_summed_over_chunks(heads: int, chunk_size: int, meta_grad: str) -> None:
    titan, x = memory(6, heads=heads, chunk_size=chunk_size, meta_grad=meta_grad, eta_max=2.0), normal(2, 5, 3, 6)
    output, _, trace = titan(x, auxiliary=WEIGHTS)
    torch.testing.assert_close(trace.auxiliary, chunk_by_chunk(titan, x, WEIGHTS), rtol=1e-12, atol=1e-12)
    plain, _, bare = titan(x)
    assert bare.auxiliary is None
    assert torch.equal(output, plain)


def test_it_teaches_keys_and_values_and_holds_the_memory() -> None:
    titan, x = memory(6, heads=2), normal(2, 2, 3, 6)
    loss = titan(x, auxiliary=WEIGHTS[:, :2])[2].auxiliary.sum()
    found = gradients(titan, loss)
    for name in ("w1", "w2", "norm_weight"):
        taught = {label for row, label in enumerate(MEMORIES) if found[name][row].any()}
        assert taught == {"key", "value"}, name
    assert not found["query.weight"].any()


def test_keys_are_taught_by_held_values_and_values_by_held_keys() -> None:
    titan = memory(6)
    key, value = (F.normalize(normal(1, 2, 4, 6, seed=seed), dim=-1).requires_grad_() for seed in (1, 2))
    gates = titan.read_gates(titan.start(), normal(1, 2, 4, 6))._replace(key=key, value=value)
    titan.disagreement(titan.start(), gates).sum().backward()
    w1, w2 = titan.w1[MAIN, 0].detach(), titan.w2[MAIN, 0].detach()

    def recalled(at: Tensor) -> Tensor:
        return at + F.gelu(at @ w1.T) @ w2.T

    apart = (recalled(key) - value.detach()).square().mean(-1).sum()
    torch.testing.assert_close(key.grad, torch.autograd.grad(apart, key)[0])
    torch.testing.assert_close(value.grad, 2 * (value - recalled(key)).detach() / 6)


def test_without_an_outer_gradient_through_writes_it_alone_trains_keys() -> None:
    x = normal(2, 4, 3, 6)
    for auxiliary, trains in ((None, False), (WEIGHTS[:, :4], True)):
        titan = memory(6, meta_grad="fo")
        output, _, trace = titan(x, auxiliary=auxiliary)
        loss = output.square().sum() + (0.0 if trace.auxiliary is None else trace.auxiliary.sum())
        assert bool(gradients(titan, loss)["w1"][0].any()) == trains


def test_clips_that_share_a_memory_each_have_their_own_loss() -> None:
    # The first chunk is recalled from the trained memory, whoever shares what is written afterwards.
    x = normal(2, 4, 3, 6)
    alone, together = (
        memory(6, scope=scope, chunk_size=3)(x, auxiliary=WEIGHTS[:, :4])[2].auxiliary for scope in ("clip", "batch")
    )
    torch.testing.assert_close(together, alone)
    assert alone[0] != alone[1]


@pytest.mark.parametrize("frames", [1, 3])
def test_a_pass_that_writes_nothing_has_none(frames: int) -> None:
    titan, x = memory(6, chunk_size=3), normal(2, frames, 3, 6)
    assert not titan(x, auxiliary=WEIGHTS[:, :frames])[2].auxiliary.any()
    assert not titan(x, writes=False, auxiliary=WEIGHTS[:, :frames])[2].auxiliary.any()


def test_frame_by_frame_adds_up_to_the_pass_over_all(
    small_predictor: Callable[..., HopePredictor], small_input: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> None:
    levels = [{"period": 1, "hidden_multiplier": 2.0}]
    given, weights = [t.double() for t in small_input()], WEIGHTS[:, :4]
    both = [
        small_predictor(cms={"levels": levels, "mode": mode}).double()(*given, teach_factor=0.0, auxiliary=weights)
        for mode in ("frame_mask", "online")
    ]
    for at_once, one_by_one in zip(both[0].traces, both[1].traces, strict=True):
        torch.testing.assert_close(one_by_one.auxiliary, at_once.auxiliary)


def total_of(model: nn.Module, lengths: list[int], weights: list[float], config: ObjectiveConfig) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    features, actions, states = (
        torch.randn(4, *shape, generator=generator)[: len(lengths)] for shape in ((5, 6, 10), (4, 3), (5, 2))
    )
    found = clip_losses(
        model,
        config,
        features,
        actions,
        states,
        torch.tensor(lengths),
        torch.tensor(weights),
        torch.tensor([n - 1 for n in lengths]),
        None,
    )
    return found.auxiliary


def test_padding_and_clips_that_only_fill_up_do_not_count(small_predictor: Callable[..., HopePredictor]) -> None:
    model, config = small_predictor(), ObjectiveConfig(auxiliary_weight=0.1, jump_weight=0.0)
    both, first = total_of(model, [5, 3], [1.0, 1.0], config), total_of(model, [5], [1.0], config)
    torch.testing.assert_close(total_of(model, [5, 3], [1.0, 0.0], config), first)
    assert 0 < first < both
    # Four transitions are three writes, two are one: the write of frame 1 of the second clip is not needed.
    assert not total_of(model, [5], [1.0], ObjectiveConfig(jump_weight=0.0)).any()


@pytest.mark.parametrize("recompute", ["chunk", "block"])
@pytest.mark.parametrize("pattern", ["SH", "U"])
def test_recomputing_gives_the_same_bits(
    small_predictor: Callable[..., HopePredictor], recompute: str, pattern: str
) -> None:
    config, found = ObjectiveConfig(auxiliary_weight=0.1, jump_weight=0.0), []
    for mode in ("none", recompute):
        model = small_predictor(block_pattern=tuple(pattern))
        recompute_blocks(list(model.blocks), mode)
        loss = total_of(model, [5, 4], [1.0, 1.0], config)
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"auxiliary_weight": 0.1, "teacher_weight": 0.0}, "auxiliary_weight"),
        ({"auxiliary_weight": -0.1}, "auxiliary_weight"),
    ],
)
def test_a_weight_that_could_have_no_effect_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ObjectiveConfig.model_validate(fields)
