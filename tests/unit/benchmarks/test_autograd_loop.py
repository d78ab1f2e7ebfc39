"""What the benchmark measures the memories against computes the same as they do."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.autograd_loop import autograd_loop
from tests.benchmarks.model import num_calls, saved_bytes
from tests.unit.model.titan_cases import gradients, memory, normal

TOLERANCE = 1e-12


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("heads", [1, 2])
def test_the_loop_has_the_outputs_and_gradients_of_the_memories(heads: int, frames: int) -> None:
    titan = memory(width=10, heads=heads, hidden_multiplier=1.4)
    x = normal(3, frames, 7, 10).requires_grad_()
    ours, theirs = titan(x)[0], autograd_loop(titan, x)
    torch.testing.assert_close(theirs, ours, rtol=TOLERANCE, atol=TOLERANCE)
    weights = normal(*ours.shape, seed=2)
    expected, found = (gradients(titan, (weights * output).sum(), x) for output in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    if frames > 1:
        assert all(gradient.any() for gradient in found.values())


def test_bytes_are_those_of_what_the_result_depends_on_each_storage_once() -> None:
    linear, x = torch.nn.Linear(3, 5), torch.ones(4, 3)

    def forward() -> torch.Tensor:
        out = linear(x)
        # A graph that ends in nothing; tanh keeps its own result.
        dead = out.exp().tanh()
        del dead
        # Both factors are one storage.
        return (out * out.view(5, 4).view(4, 5)).sum()

    assert saved_bytes(linear, forward) == x.nbytes + 4 * 5 * 4


def test_calls_are_counted_without_views() -> None:
    x = torch.ones(4, 3)
    assert num_calls(lambda: x.mT.reshape(2, 6).add(1).unsqueeze(0).mul_(2)) == 3
