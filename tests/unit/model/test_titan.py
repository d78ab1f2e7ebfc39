"""The memories against `titan_reference`: outputs, fast weights and every outer gradient, option by option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hopescale.model.schema import MEMORIES
from hopescale.model.titan import TitanMemory
from hopescale.model.titan_reference import titan_reference
from tests.unit.model.titan_cases import gradients, memory, normal

TOLERANCE = 1e-11

RULES = ["frame_step", "token_exact", "scan"]
ORDERS = ["fo", "fo_kv", "so", "straight_through"]

# Closes for some chunks of the clips below; see the test that says so.
GATE, GATE_OF_TWO_HEADS = 0.6, 0.1

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "two heads": {"heads": 2},
    "momentum, ragged last chunk": {"momentum": 0.5, "chunk_size": 2},
    "no preconditioner": {"preconditioner": False},
    "no retention": {"retention": False},
    "gate": {"surprise_gate": GATE},
    "gate and momentum, two heads": {"surprise_gate": GATE_OF_TWO_HEADS, "momentum": 0.4, "heads": 2},
    "main alone": {"self_modify": ["main"]},
    "value and main, momentum": {"self_modify": ["main", "value"], "momentum": 0.3},
    "key, eta and main": {"self_modify": ["key", "eta", "main"]},
}

CUTS: dict[str, dict[str, Any]] = {
    "every write": {"detach_interval": 1},
    "every write, momentum": {"detach_interval": 1, "momentum": 0.5},
    "every second write": {"detach_interval": 2},
    "all, every write": {"detach_interval": 1, "detach_rule": "all"},
    "all, every second write, momentum": {"detach_interval": 2, "detach_rule": "all", "momentum": 0.2},
    "every second write, gate": {"detach_interval": 2, "surprise_gate": GATE},
    "all, every second write, gate": {
        "detach_interval": 2,
        "detach_rule": "all",
        "surprise_gate": GATE,
        "momentum": 0.3,
    },
}

SHAPES = {
    "one head": {"width": 5, "hidden_multiplier": 1.4, "batch": 1, "frames": 2, "tokens": 4},
    "three heads": {"width": 12, "heads": 3, "hidden_multiplier": 0.75, "batch": 3, "frames": 2, "tokens": 2},
    "one token": {"width": 4, "heads": 2, "hidden_multiplier": 2.5, "batch": 2, "frames": 3, "tokens": 1},
    "one feature a head": {"width": 3, "heads": 3, "hidden_multiplier": 2.0, "batch": 2, "frames": 2, "tokens": 3},
    "one frame": {"width": 4, "hidden_multiplier": 0.5, "batch": 2, "frames": 1, "tokens": 3},
}


def assert_equal_to_reference(titan: TitanMemory, x: Tensor) -> None:
    """Outputs, memories after the last chunk, and the gradients of a loss over both, or over outputs alone."""
    x = x.detach().requires_grad_()
    output, fast, _ = titan(x, keep_state=True)
    expected, memories = titan_reference(titan, x)
    assert fast is not None
    expected1, expected2 = (
        torch.stack(
            [
                torch.stack([torch.stack([clip[m, h][side] for clip in memories]) for h in range(titan.config.heads)])
                for m in range(len(MEMORIES))
            ]
        )
        for side in (0, 1)
    )
    # A pass that keeps no state leaves out what nothing reads.
    only_output = titan(x)[0]
    for ours, theirs in ((output, expected), (only_output, expected), (fast.w1, expected1), (fast.w2, expected2)):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
    assert_same_gradients(titan, x, (output, fast.w1, fast.w2), (expected, expected1, expected2))
    assert_same_gradients(titan, x, (only_output,), (expected,))


def assert_same_gradients(titan: TitanMemory, x: Tensor, ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    """Of a random combination of these tensors, with respect to every parameter and the input."""

    def pulled(tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
        loss = torch.stack([(t * normal(*t.shape, seed=9)).sum() for t in tensors]).sum()
        return gradients(titan, loss, x)

    found = pulled(ours)
    for name, gradient in pulled(theirs).items():
        # Memory by memory, because the gradient of the main one would hide an error of the others.
        per_memory = name in ("w1", "w2", "norm_weight", "norm_bias")
        pairs = zip(found[name], gradient, strict=True) if per_memory else [(found[name], gradient)]
        for which, (mine, other) in enumerate(pairs):
            assert (mine - other).abs().max() <= TOLERANCE * other.abs().max().clamp_min(1e-3), (name, which)


@pytest.mark.parametrize(
    ("rule", "option"),
    # A scan reads memories other than main at the start alone, so there is no choice among them.
    [(r, o) for o in OPTIONS for r in RULES if r != "scan" or len(OPTIONS[o].get("self_modify", ["main"])) == 1],
)
@pytest.mark.parametrize("order", ORDERS)
def test_equals_the_reference(rule: str, order: str, option: str) -> None:
    fields = OPTIONS[option]
    titan = memory(4, hidden_multiplier=1.5, chunk_rule=rule, meta_grad=order, eta_max=2.0, **fields)
    assert_equal_to_reference(titan, normal(2, 3, 3, 4))


@pytest.mark.parametrize(("rule", "order"), [("frame_step", "fo_kv"), ("token_exact", "so"), ("scan", "fo_kv")])
@pytest.mark.parametrize("option", CUTS.values(), ids=CUTS)
def test_cut_gradients_equal_those_of_the_reference(rule: str, order: str, option: dict[str, Any]) -> None:
    titan = memory(4, hidden_multiplier=1.5, chunk_rule=rule, meta_grad=order, eta_max=2.0, **option)
    assert_equal_to_reference(titan, normal(2, 4, 3, 4))


@pytest.mark.parametrize("order", ["fo_kv", "so"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_odd_shapes_equal_the_reference(order: str, shape: dict[str, Any]) -> None:
    fields = dict(shape)
    width, *size = (fields.pop(name) for name in ("width", "batch", "frames", "tokens"))
    assert_equal_to_reference(memory(width, meta_grad=order, eta_max=3.0, **fields), normal(*size, width))


@pytest.mark.parametrize("limit", [1e-3, 1e6])
def test_a_write_far_above_and_far_below_its_limit_equals_the_reference(limit: float) -> None:
    titan = memory(4, hidden_multiplier=1.5, meta_grad="so", eta_max=20.0, write_limit=limit)
    assert_equal_to_reference(titan, normal(2, 3, 3, 4))


@pytest.mark.parametrize(("heads", "gate"), [(1, GATE), (2, GATE_OF_TWO_HEADS)])
@pytest.mark.parametrize("rule", RULES)
def test_the_gate_of_the_cases_closes_for_some_clips_and_not_for_others(rule: str, heads: int, gate: float) -> None:
    titan = memory(4, hidden_multiplier=1.5, chunk_rule=rule, eta_max=2.0, surprise_gate=gate, heads=heads)
    written = titan(normal(2, 3, 3, 4), keep_state=True)[2].gate
    assert ((written == 0) | (written == 1)).all()
    # A clip that is written while the other is not, and a chunk that is not written after one that was.
    assert (written[0] != written[1]).any()
    assert (written.diff(dim=1) < 0).any()


def test_writes_of_the_cases_are_large() -> None:
    titan, x = memory(4, hidden_multiplier=1.5, eta_max=2.0), normal(2, 3, 3, 4)
    trace = titan(x, keep_state=True)[2]
    assert (trace.write_ratio > 0.01).all()
    assert (trace.drift > 0.05).all()
    assert (titan(x)[0] - titan(x, writes=False)[0])[:, 1:].abs().max() > 0.01
