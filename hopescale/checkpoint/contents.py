"""What persists between incarnations of a run. Nothing outside this list does.

Tensors (through DCP, sharded, by global shape):
    model/NAME                every parameter
    optimizer/NAME/KEY        every optimizer tensor of that parameter
Numbers (JSON, in the manifest):
    step                      optimizer steps taken
    attempted_steps           steps tried, skipped ones included: the position in the data is attempted x global batch
    skipped_in_a_row          the last steps, if their gradients were not finite
    optimizer_steps           steps taken by each optimizer group
    best, evaluations_without_gain      early stopping
    order                     seed, global batch and data fingerprint that `attempted_steps` counts in
Random draws need no state: each is a function of (seed, step, position, layer, purpose).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass
class RunState:
    """The numbers that move while a run trains."""

    step: int = 0
    attempted_steps: int = 0
    skipped_in_a_row: int = 0
    best: float | None = None
    evaluations_without_gain: int = 0
    order: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers for the manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> RunState:
        """The inverse of `to_json`; what a manifest lacks or has too much of is an error."""
        expected = {f.name for f in fields(cls)}
        if set(saved) != expected:
            raise ValueError(f"run state has fields {sorted(saved)}; expected {sorted(expected)}")
        return cls(**saved)


def tensors(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """All persistent tensors by name, as they lie in memory: loading into them restores the run."""
    named = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    if optimizer is None:
        return named
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            for key, value in optimizer.state[parameter].items():
                named[f"optimizer/{name}/{key}"] = value
    return named


def optimizer_steps(optimizer: Optimizer) -> dict[str, int]:
    """Steps each optimizer group has taken."""
    return {group["name"]: group["num_steps"] for group in optimizer.param_groups}


def restore_optimizer_steps(optimizer: Optimizer, saved: dict[str, int]) -> None:
    """The inverse of `optimizer_steps`."""
    for group in optimizer.param_groups:
        group["num_steps"] = saved[group["name"]]
