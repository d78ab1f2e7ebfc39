"""What persists between incarnations of a run. Nothing outside this list does.

Tensors (through DCP, sharded, by global shape):
    model/NAME                every parameter, and what long-term memories carry over
    optimizer/NAME/KEY        every optimizer tensor of that parameter
    waiting/NAME              one row a rank: changes of long-term memories that are not carried over yet
Numbers (JSON, in the manifest):
    step                      optimizer steps taken
    attempted_steps           steps tried, skipped ones included; random draws count in them
    skipped_in_a_row          the last steps, if their gradients were not finite
    unscored                  whether the evaluation due at this step was cut off, to be made when the run goes on
    optimizer_steps           steps each optimizer group has seen; it has fired on every period-th of them
    best, evaluations_without_gain      early stopping
    curriculum                phases begun, and the surprise seen since by one that waits for its plateau
    data                      the reader's state: position in the clips, and which clips in which order that counts in
Random draws need no state: each is a function of (seed, step, position, layer, purpose).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hopescale.curriculum import Progress
from hopescale.optim.state import is_spread
from hopescale.parallel.consolidation import longterm_memories, restore_waiting, waiting_changes


@dataclass
class RunState:
    """The numbers that move while a run trains."""

    step: int = 0
    attempted_steps: int = 0
    skipped_in_a_row: int = 0
    unscored: bool = False
    best: float | None = None
    evaluations_without_gain: int = 0
    curriculum: Progress = field(default_factory=Progress)
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def skipped_steps(self) -> int:
        """Attempted steps that moved nothing."""
        return self.attempted_steps - self.step

    def to_json(self) -> dict[str, Any]:
        """Plain numbers for the manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> RunState:
        """The inverse of `to_json`; what a manifest lacks or has too much of is an error."""
        expected = {f.name for f in fields(cls)}
        if set(saved) != expected:
            raise ValueError(f"run state has fields {sorted(saved)}; expected {sorted(expected)}")
        return cls(**{**saved, "curriculum": Progress(**saved["curriculum"])})


def tensors(model: nn.Module, optimizer: Optimizer | None, *, saved_by: int | None = None) -> dict[str, Tensor]:
    """All persistent tensors by name, as they lie in memory: loading into them restores the run.

    Only what waits to be carried over does not lie so: it has one row a rank, and `restore_rows` hands loaded rows out.

    Args:
        model: predictor.
        optimizer: over its parameters; None leaves out what only training needs.
        saved_by: ranks that saved what is to be loaded; None to save.
    """
    named = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    for name, memory in longterm_memories(model):
        for number, part in enumerate(memory.carried, 1):
            named[f"model/{name}.carried{number}"] = part
    if optimizer is None:
        return named
    waiting = waiting_changes(model, saved_by, spread=is_spread(optimizer))
    named |= {f"waiting/{name}": rows for name, rows in waiting.items()}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            # What the optimizer moves counts, which with ZeRO is not what the model computes with.
            named[f"model/{name}"] = parameter.detach()
            for key, value in optimizer.state[parameter].items():
                named[f"optimizer/{name}/{key}"] = value
    return named


def restore_rows(model: nn.Module, named: dict[str, Tensor]) -> None:
    """Take over what was loaded into the rows of `tensors`."""
    restore_waiting(model, {name.removeprefix("waiting/"): tensor for name, tensor in named.items()})


def optimizer_steps(optimizer: Optimizer) -> dict[str, int]:
    """Steps each optimizer group has seen."""
    return {group["name"]: group["num_steps"] for group in optimizer.param_groups}


def restore_optimizer_steps(optimizer: Optimizer, saved: dict[str, int]) -> None:
    """The inverse of `optimizer_steps`."""
    for group in optimizer.param_groups:
        group["num_steps"] = saved[group["name"]]
