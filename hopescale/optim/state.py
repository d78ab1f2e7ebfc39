"""What M3 keeps of each parameter: made with it, of its shape and placement, fp32; checked when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .flat_piece import FlatPiece
from .momentum import state_names, waits_in_host_memory
from .schema import M3Config

ALGORITHMS = ("m3", "adamw")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Of parameters; what is computed with them is fp32."""
SCHEDULERS = ("initial_lr", "max_lr", "min_lr")
"""What torch's schedulers leave in a group."""
OPTIONS = (
    "params",
    "param_names",
    "name",
    "algorithm",
    "lr",
    "lr_scale",
    "weight_decay",
    "betas",
    "period",
    "num_steps",
    "time_scales",
    *SCHEDULERS,
)


def local(tensor: Tensor | None) -> Tensor:
    """This rank's piece of a sharded tensor, or the tensor itself."""
    if isinstance(tensor, FlatPiece):
        return tensor.piece
    return tensor.to_local() if isinstance(tensor, DTensor) else cast(Tensor, tensor)


def is_spread(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the parameters of an optimizer, or copies of them, lie on several ranks that train together."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    shared = getattr(optimizer, "process_group", None) is not None
    return shared or any(isinstance(p, DTensor | FlatPiece) for p in parameters)


def local_gradient(parameter: Tensor) -> Tensor:
    """This rank's piece of a gradient, placed as the parameter is; one that is placed otherwise is brought there."""
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor) and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    return local(gradient)


def make_state(parameter: Tensor, group: Mapping[str, Any], config: M3Config) -> dict[str, Tensor]:
    """The zero state of one parameter. AdamW's `step` is a tensor so that it is saved like the rest, on the host."""
    zeros = {name: torch.zeros_like(parameter, dtype=torch.float32) for name in _names(group, config)}
    for name in zeros:
        if group["algorithm"] == "m3" and waits_in_host_memory(name, config) and not parameter.is_meta:
            zeros[name] = _in_host_memory(zeros[name])
    counted = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
    return zeros | (counted if group["algorithm"] == "adamw" else {})


def _names(group: Mapping[str, Any], config: M3Config) -> list[str]:
    own = ["exp_avg", "exp_avg_sq"] if group["algorithm"] == "adamw" else state_names(config)
    return [*own, "period_sum"] if group["period"] > 1 else own


def state_tensors(group: Mapping[str, Any], config: M3Config) -> tuple[int, int]:
    """How many tensors of a parameter's shape a group keeps for each on its device, and how many in host memory."""
    names = _names({"period": 1, **group}, config)
    there = sum(group["algorithm"] == "m3" and waits_in_host_memory(name, config) for name in names)
    return len(names) - there, there


def _in_host_memory(tensor: Tensor) -> Tensor:
    host = tensor.to("cpu")
    if local(tensor).is_cuda:
        piece = local(host).pin_memory()
        if isinstance(host, FlatPiece):
            return FlatPiece(piece, host.spec)
        return DTensor(piece, host._spec, requires_grad=False) if isinstance(host, DTensor) else piece
    return host


def time_scales(config: M3Config) -> str:
    """What the state of an m3 group can be gone on with, as text that a state dict keeps."""
    if config.form == "paper":
        return f"paper, period {config.paper_form.period}, {config.paper_form.momentum}"
    periods = ", ".join(str(level.period) for level in config.levels)
    return f"levels of periods {periods}, {config.buffers} buffers, {config.slow_levels}"


def check_gradients(groups: Sequence[Mapping[str, Any]]) -> None:
    """Check that all gradients are dense.

    Raises:
        TypeError: one is not.
    """
    for index, group in enumerate(groups):
        for number, parameter in enumerate(group["params"]):
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise TypeError(
                    f"parameter {_parameter(group, number)} of {_label(group, index)} has a gradient of layout "
                    f"{parameter.grad.layout}; M3 takes dense ones: make the module's not sparse"
                )


def _label(group: Mapping[str, Any], index: int) -> str:
    return f"optimizer group {group.get('name', index)}"


def _parameter(group: Mapping[str, Any], number: int) -> str | int:
    return group["param_names"][number] if group.get("param_names") else number


def check_group(group: dict[str, Any], others: Sequence[Mapping[str, Any]]) -> None:
    """Check a parameter group, and make a list of its parameters.

    Args:
        group: new.
        others: before it.

    Raises:
        ValueError: as `M3` says.
    """
    name = _label(group, len(others))
    if "params" not in group:
        raise ValueError(f"{name} has no key params; it must hold the group's parameters")
    if isinstance(group["params"], set):
        raise ValueError(f"{name} holds a set, whose order may differ between ranks; give a list")
    group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    if group["params"] and isinstance(group["params"][0], tuple):
        group["param_names"] = [name for name, _ in group["params"]]
        group["params"] = [parameter for _, parameter in group["params"]]
    unknown = sorted(set(group) - set(OPTIONS))
    if unknown:
        raise ValueError(f"{name} has unknown options {', '.join(unknown)}; M3 knows {', '.join(OPTIONS)}")
    if group.get("algorithm") not in ALGORITHMS:
        raise ValueError(f"{name} has algorithm {group.get('algorithm')!r}; it must be one of {', '.join(ALGORITHMS)}")
    if not group["params"]:
        raise ValueError(f"{name} has no parameters; leave the group out")
    _check_numbers(name, group)
    if len(group.get("param_names", group["params"])) != len(group["params"]):
        raise ValueError(f"{name} has {len(group['param_names'])} param_names for {len(group['params'])} parameters")
    _check_each_once(name, group, others)
    for number, parameter in enumerate(group["params"]):
        what = f"parameter {_parameter(group, number)} of shape {tuple(parameter.shape)}"
        if parameter.dtype not in DTYPES:
            raise ValueError(f"{name} holds {what} in {parameter.dtype}; M3 trains {', '.join(map(str, DTYPES))} alone")
        if group["algorithm"] == "m3" and (parameter.ndim < 2 or not parameter.numel()):
            raise ValueError(f"{name} holds {what}; m3 takes matrices: give it to adamw")


def _check_numbers(name: str, group: Mapping[str, Any]) -> None:
    for option, least in (("period", 1), ("num_steps", 0)):
        value = group.get(option, least)
        if type(value) is not int or value < least:
            raise ValueError(f"{name} has {option} {value!r}; it must be a whole number of at least {least}")
    for option in ("lr", "lr_scale", "weight_decay"):
        value = group.get(option, 0.0)
        if not isinstance(value, Real | Tensor) or not 0 <= float(value) < float("inf"):
            raise ValueError(f"{name} has {option} {value!r}; it must be a number of at least 0")
    betas = group.get("betas")
    if betas is not None and group["algorithm"] == "m3":
        raise ValueError(f"{name} has betas {betas!r}, which are adamw's; m3's are optimizer.levels: leave them out")
    if betas is not None and not _are_betas(betas):
        raise ValueError(f"{name} has betas {betas!r}; they must be two numbers of at least 0 and below 1")


def _are_betas(betas: Any) -> bool:
    pair = isinstance(betas, list | tuple) and len(betas) == 2
    return pair and all(isinstance(beta, Real | Tensor) and 0 <= float(beta) < 1 for beta in betas)


def _check_each_once(name: str, group: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> None:
    seen = {
        id(parameter): f"parameter {_parameter(other, number)} of {_label(other, index)} too"
        for index, other in enumerate(others)
        for number, parameter in enumerate(other["params"])
    }
    for number, parameter in enumerate(group["params"]):
        what = f"parameter {_parameter(group, number)}"
        if id(parameter) in seen:
            raise ValueError(f"{name} holds a parameter twice: its {what} is {seen[id(parameter)]}; name it once")
        seen[id(parameter)] = f"its {what} too"


def check_state(state_dict: Mapping[str, Any], optimizer: torch.optim.Optimizer, config: M3Config) -> None:
    """Check that a state dict is of an optimizer like this one.

    Raises:
        ValueError: it is no optimizer's, or has other groups, or other states than these groups keep, of other levels
            for example.
    """
    missing = [key for key in ("state", "param_groups") if key not in state_dict]
    if missing:
        raise ValueError(f"state dict lacks {' and '.join(missing)}: it is not that of an optimizer")
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if len(groups) != len(saved_groups):
        raise ValueError(f"state of {len(saved_groups)} optimizer groups does not fit an optimizer of {len(groups)}")
    for index, (group, saved_group) in enumerate(zip(groups, saved_groups, strict=True)):
        _check_saved_group(_label(group, index), group, saved_group)
        for number, saved_number in enumerate(saved_group["params"]):
            parameter, saved = group["params"][number], state_dict["state"].get(saved_number, {})
            where = f"saved state of parameter {_parameter(group, number)} in {_label(group, index)}"
            expected = {*_names(group, config)} | ({"step"} if group["algorithm"] == "adamw" else set())
            lacks, surplus = sorted(expected - set(saved)), sorted(set(saved) - expected)
            if lacks or surplus:
                raise ValueError(
                    f"{where} lacks {', '.join(lacks) or 'nothing'}, has {', '.join(surplus) or 'nothing'} too much: "
                    f"it is of another optimizer than this one, {time_scales(config)}"
                )
            own = optimizer.state[parameter]
            wrong = [key for key in expected if saved[key].shape != own[key].shape]
            if wrong:
                shapes = f"{tuple(saved[wrong[0]].shape)} instead of {tuple(own[wrong[0]].shape)}"
                raise ValueError(f"{where} has {wrong[0]} of shape {shapes}: it is of another model")


def _check_saved_group(name: str, group: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    for option in ("algorithm", "period", "time_scales"):
        if saved.get(option) != group.get(option):
            raise ValueError(
                f"{name} was saved with {option} {saved.get(option)!r} and has {group.get(option)!r}; load it with "
                "the settings it was saved with"
            )
    if "num_steps" not in saved:
        raise ValueError(f"{name} was saved without num_steps: its state is not that of an M3")
    if len(saved["params"]) != len(group["params"]):
        here, there = (group.get("param_names") or (), saved.get("param_names") or ())
        odd = sorted(set(here) ^ set(there)) if here and there else []
        raise ValueError(
            f"{name} was saved with {len(saved['params'])} parameters and has {len(group['params'])}"
            + (f"; not in both are {', '.join(odd)}" if odd else "")
            + ": it is of another model"
        )


def take_over(
    state_dict: Mapping[str, Any], groups: list[dict[str, Any]], own: Mapping[Tensor, dict[str, Tensor]]
) -> dict[Tensor, dict[str, Tensor]]:
    """Copy a state dict's tensors into those that were made with the optimizer, and return these.

    `Optimizer.load_state_dict` would round them to the dtype of their parameter, and move to its device what waits in
    host memory.
    """
    for group, saved_group in zip(groups, state_dict["param_groups"], strict=True):
        for parameter, number in zip(group["params"], saved_group["params"], strict=True):
            for key, saved in state_dict["state"][number].items():
                local(own[parameter][key]).copy_(local(saved))
    return dict(own)
