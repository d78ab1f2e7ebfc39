from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from torch import nn

from hopescale.checkpoint.contents import RunState, optimizer_steps, restore_optimizer_steps, tensors
from hopescale.curriculum import Progress
from hopescale.optim.m3 import M3


def test_all_persistent_tensors_are_named(trained: Callable[[int], tuple[nn.Module, M3]]) -> None:
    model, optimizer = trained(0)
    named = tensors(model, optimizer)
    kept = ("exp_avg", "exp_avg_sq", "step")
    adam = [f"optimizer/{name}/{key}" for name in ("stack", "vector", "scalar") for key in kept]
    momenta = [f"optimizer/matrix/{key}" for key in ("momentum_0", "momentum_1", "buffer_1")]
    weights = [f"model/{name}" for name in ("matrix", "stack", "vector", "scalar")]
    assert sorted(named) == sorted(adam + momenta + weights)
    assert sorted(tensors(model, None)) == sorted(weights)


def test_tensors_are_the_ones_in_use(trained: Callable[[int], tuple[nn.Module, M3]]) -> None:
    model, optimizer = trained(0)
    for tensor in tensors(model, optimizer).values():
        assert not tensor.requires_grad
        tensor.fill_(3.0)
    assert all((p == 3).all() for p in model.parameters())
    assert all((t == 3).all() for state in optimizer.state.values() for t in state.values())


def test_steps_of_the_optimizer_come_back(trained: Callable[[int], tuple[nn.Module, M3]]) -> None:
    _, optimizer = trained(0)
    assert optimizer_steps(optimizer) == {"m3": 2, "adamw": 2}
    restore_optimizer_steps(optimizer, {"m3": 9, "adamw": 4})
    assert optimizer_steps(optimizer) == {"m3": 9, "adamw": 4}


def test_run_state_survives_json() -> None:
    progress = Progress(phase=2, window_began=4, window_sum=0.1 + 0.2, window_count=2, mean_before=1 / 3)
    state = RunState(
        step=3, attempted_steps=5, best=0.25, evaluations_without_gain=1, curriculum=progress, data={"seed": 7}
    )
    assert RunState.from_json(json.loads(json.dumps(state.to_json()))) == state


@pytest.mark.parametrize("change", [{"surplus": 1}, {"step": None}])
def test_run_state_with_other_fields_is_refused(change: dict[str, object]) -> None:
    saved = RunState().to_json() | change
    if change == {"step": None}:
        del saved["step"]
    with pytest.raises(ValueError, match="run state has fields"):
        RunState.from_json(saved)
