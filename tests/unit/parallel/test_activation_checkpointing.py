from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hopescale.model.init import initialise
from hopescale.model.predictor import HopePredictor
from hopescale.model.schema import ModelConfig
from hopescale.parallel.activation_checkpointing import recompute_blocks
from tests.ledger import Ledger

SMALL: dict[str, Any] = {
    "encoder_dim": 10,
    "grid": (2, 3),
    "frames": 5,
    "action_dim": 3,
    "width": 24,
    "block_pattern": ("S", "H", "T", "H"),
    "attention": {"heads": 2},
    "spatial_mixing": True,
    "drop_path": 0.3,
}
MEMORIES: dict[str, dict[str, Any]] = {
    "default": {},
    "so, two heads, momentum": {"meta_grad": "so", "heads": 2, "momentum": 0.5},
    "cut after every write": {"detach_interval": 1},
    "all cut after every second": {"detach_interval": 2, "detach_rule": "all"},
    "token by token, gated": {"chunk_rule": "token_exact", "surprise_gate": 0.003},
    "chunks of two frames": {"chunk_size": 2},
    "shared": {"scope": "batch"},
    "straight through": {"meta_grad": "straight_through"},
    "main alone": {"self_modify": ["main"]},
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def predictor(recompute: str, memory: dict[str, Any], **fields: Any) -> HopePredictor:
    model = HopePredictor(ModelConfig.model_validate(SMALL | {"memory": {"hidden_multiplier": 2.0} | memory} | fields))
    initialise(model, seed=0)
    recompute_blocks(list(model.blocks), recompute)
    return model


def loss(model: HopePredictor) -> Tensor:
    """Of a teacher pass, a jump, and a rollout through whose state gradients flow."""
    features, actions = normal(2, 4, 6, 10, seed=1), normal(2, 4, 3, seed=2)
    draws = torch.rand(2, len(model.blocks), 3, generator=torch.Generator().manual_seed(3))
    teacher = model(features, actions, draws=draws)
    jump = model(features[:, :1], actions[:, :1], target=torch.tensor([2, 4]), draws=draws)
    context = model(features[:, :2], actions[:, :2], draws=draws, keep_state=True)
    further = model(context.frames[:, -1:], actions[:, 2:3], state=context.state, frame_offset=2, draws=draws)
    parts = [(p.frames * normal(*p.frames.shape, seed=4)).sum() for p in (teacher, jump, further)]
    return torch.stack(parts).sum()


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_recomputing_gives_the_same_gradients_bit_for_bit(memory: dict[str, Any]) -> None:
    found: dict[str, dict[str, Tensor]] = {}
    for recompute in ("none", "chunk", "block"):
        model = predictor(recompute, memory)
        loss(model).backward()
        found[recompute] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for recompute in ("chunk", "block"):
        assert found[recompute].keys() == found["none"].keys()
        differing = [name for name, g in found["none"].items() if not torch.equal(g, found[recompute][name])]
        assert differing == [], recompute


def test_the_gate_of_the_cases_closes_for_some_clips_and_not_for_others() -> None:
    model = predictor("none", MEMORIES["token by token, gated"])
    traces = model(normal(2, 4, 6, 10, seed=1), normal(2, 4, 3, seed=2)).traces
    assert all(0 < trace.gate.sum() < trace.gate.numel() for trace in traces)


def test_recomputing_in_bf16_gives_the_same_gradients_bit_for_bit() -> None:
    found = []
    for recompute in ("none", "chunk", "block"):
        model = predictor(recompute, {})
        with torch.autocast("cpu", torch.bfloat16):
            total = loss(model)
        total.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def kept_bytes(recompute: str) -> int:
    """Of all tensors a teacher pass leaves alive for backward."""
    model, given = predictor(recompute, {}), (normal(2, 4, 6, 10, seed=1), normal(2, 4, 3, seed=2))
    with Ledger() as ledger:
        result = model(*given).frames.sum()
    assert result.requires_grad
    return ledger.alive()


def test_chunks_keep_less_than_everything_and_blocks_less_than_chunks() -> None:
    none, chunk, block = (kept_bytes(recompute) for recompute in ("none", "chunk", "block"))
    assert block < 0.25 * none
    assert 2 * block < chunk < 0.75 * none


def backward_operations(recompute: str, pattern: tuple[str, ...]) -> int:
    model = predictor(recompute, {}, block_pattern=pattern, drop_path=0.0)
    total = loss(model)
    with FlopCounterMode(display=False) as counter:
        total.backward()
    return counter.get_total_flops()


def test_only_memories_run_again_by_chunks() -> None:
    assert backward_operations("chunk", ("S", "T")) == backward_operations("none", ("S", "T"))
    none, chunk, block = (backward_operations(kind, ("H", "T")) for kind in ("none", "chunk", "block"))
    assert none < chunk < block


def test_without_gradients_nothing_is_kept_or_run_again() -> None:
    plain = predictor("none", {})
    with torch.no_grad():
        for recompute in ("chunk", "block"):
            model = predictor(recompute, {})
            assert not loss(model).requires_grad
            assert torch.equal(loss(model), loss(plain))
