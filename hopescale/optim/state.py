"""What M3 keeps of each parameter: made with it, of its shape and placement, fp32; checked when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .momentum import state_names, waits_in_host_memory
from .schema import OptimizerConfig

ALGORITHMS = ("m3", "adamw")
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
    return tensor.to_local() if isinstance(tensor, DTensor) else cast(Tensor, tensor)


def local_gradient(parameter: Tensor) -> Tensor:
    """This rank's piece of a gradient, placed as the parameter is; one that is placed otherwise is brought there."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout != torch.strided:
        raise TypeError(
            f"M3 got a gradient of layout {gradient.layout}; it takes dense ones: make the module's not sparse"
        )
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor) and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    return local(gradient)


def make_state(parameter: Tensor, group: Mapping[str, Any], config: OptimizerConfig) -> dict[str, Tensor]:
    """The zero state of one parameter. AdamW's `step` is a tensor so that it is saved like the rest, on the host."""
    zeros = {name: torch.zeros_like(parameter, dtype=torch.float32) for name in _names(group, config)}
    for name in zeros:
        if group["algorithm"] == "m3" and waits_in_host_memory(name, config) and not parameter.is_meta:
            zeros[name] = _in_host_memory(zeros[name])
    counted = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
    return zeros | (counted if group["algorithm"] == "adamw" else {})


def _names(group: Mapping[str, Any], config: OptimizerConfig) -> list[str]:
    own = ["exp_avg", "exp_avg_sq"] if group["algorithm"] == "adamw" else state_names(config)
    return [*own, "period_sum"] if group["period"] > 1 else own


def _in_host_memory(tensor: Tensor) -> Tensor:
    host = tensor.to("cpu")
    if local(tensor).is_cuda:
        piece = local(host).pin_memory()
        return DTensor(piece, host._spec, requires_grad=False) if isinstance(host, DTensor) else piece
    return host


def time_scales(config: OptimizerConfig) -> str:
    """What the state of an m3 group can be gone on with, as text that a state dict keeps."""
    if config.form == "paper":
        return f"paper, period {config.paper_form.period}, {config.paper_form.momentum}"
    periods = ", ".join(str(level.period) for level in config.levels)
    return f"levels of periods {periods}, {config.buffers} buffers, {config.slow_levels}"


def check_group(group: dict[str, Any]) -> None:
    """Check a parameter group, and make a list of its parameters.

    Raises:
        ValueError: as `M3` says.
    """
    name = f"optimizer group {group.get('name', 'unnamed')}"
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
    if len(set(map(id, group["params"]))) < len(group["params"]):
        raise ValueError(f"{name} holds a parameter twice; name it once")
    for parameter in group["params"]:
        shape = tuple(parameter.shape)
        if not parameter.is_floating_point():
            raise ValueError(f"{name} holds a {parameter.dtype} parameter of shape {shape}; only real floats train")
        if group["algorithm"] == "m3" and (parameter.ndim < 2 or not parameter.numel()):
            raise ValueError(
                f"{name} holds a {parameter.ndim}-D parameter of shape {shape}; m3 takes matrices: give it to adamw"
            )


def _check_numbers(name: str, group: Mapping[str, Any]) -> None:
    for option, least in (("period", 1), ("num_steps", 0)):
        value = group.get(option, least)
        if type(value) is not int or value < least:
            raise ValueError(f"{name} has {option} {value!r}; it must be a whole number of at least {least}")
    for option in ("lr", "weight_decay"):
        value = group.get(option, 0.0)
        if not float(value) >= 0 or float(value) == float("inf"):
            raise ValueError(f"{name} has {option} {value!r}; it must be a number of at least 0")
    betas = group.get("betas")
    if betas is not None and group["algorithm"] == "m3":
        raise ValueError(f"{name} has betas {betas!r}, which are adamw's; m3's are optimizer.levels: leave them out")
    if betas is not None and not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
        raise ValueError(f"{name} has betas {betas!r}; they must be two numbers of at least 0 and below 1")


def check_state(state_dict: Mapping[str, Any], optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
    """Check that a state dict is of an optimizer like this one.

    Raises:
        ValueError: it has other groups, or other states than these groups keep, of other levels for example.
    """
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if len(groups) != len(saved_groups):
        raise ValueError(f"state of {len(saved_groups)} optimizer groups does not fit an optimizer of {len(groups)}")
    for group, saved_group in zip(groups, saved_groups, strict=True):
        name = group.get("name", "unnamed")
        for option in ("algorithm", "period", "time_scales"):
            if saved_group.get(option) != group.get(option):
                raise ValueError(
                    f"optimizer group {name} was saved with {option} {saved_group.get(option)!r} and has "
                    f"{group.get(option)!r}; load it with the settings it was saved with"
                )
        if "num_steps" not in saved_group or len(saved_group["params"]) != len(group["params"]):
            raise ValueError(f"saved optimizer group {name} lacks num_steps, or has another number of parameters")
        expected = {*_names(group, config)} | ({"step"} if group["algorithm"] == "adamw" else set())
        for place, number in enumerate(saved_group["params"]):
            parameter = (group.get("param_names") or range(len(group["params"])))[place]
            where = f"saved state of parameter {parameter} in optimizer group {name}"
            saved = state_dict["state"].get(number, {})
            lacks, surplus = sorted(expected - set(saved)), sorted(set(saved) - expected)
            if lacks or surplus:
                raise ValueError(
                    f"{where} lacks {', '.join(lacks) or 'nothing'}, has {', '.join(surplus) or 'nothing'} too much: "
                    f"it is of another optimizer than this one, {time_scales(config)}"
                )
            own = optimizer.state[group["params"][place]]
            wrong = [key for key in expected if saved[key].shape != own[key].shape]
            if wrong:
                shapes = f"{tuple(saved[wrong[0]].shape)} instead of {tuple(own[wrong[0]].shape)}"
                raise ValueError(f"{where} has {wrong[0]} of shape {shapes}: it is of another model")


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
