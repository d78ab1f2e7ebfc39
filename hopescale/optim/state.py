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
)


def local(tensor: Tensor | None) -> Tensor:
    """This rank's piece of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else cast(Tensor, tensor)


def make_state(parameter: Tensor, group: Mapping[str, Any], config: OptimizerConfig) -> dict[str, Tensor]:
    """The zero state of one parameter. AdamW's `step` is a tensor so that it is saved like the rest."""
    zeros = {name: torch.zeros_like(parameter, dtype=torch.float32) for name in _names(group, config)}
    for name in zeros:
        if group["algorithm"] == "m3" and waits_in_host_memory(name, config):
            zeros[name] = _in_host_memory(zeros[name])
    return zeros | ({"step": torch.zeros(())} if group["algorithm"] == "adamw" else {})


def _names(group: Mapping[str, Any], config: OptimizerConfig) -> list[str]:
    own = ["exp_avg", "exp_avg_sq"] if group["algorithm"] == "adamw" else state_names(config)
    return [*own, "period_sum"] if group["period"] > 1 else own


def _in_host_memory(tensor: Tensor) -> Tensor:
    host = tensor.to("cpu")
    if local(tensor).device.type == "cuda":
        piece = local(host).pin_memory()
        return piece if not isinstance(host, DTensor) else DTensor(piece, host._spec, requires_grad=False)
    return host


def check_group(group: dict[str, Any]) -> None:
    """Check a parameter group, and make a list of its parameters.

    Raises:
        ValueError: as `M3` says.
    """
    name = f"optimizer group {group.get('name', 'unnamed')}"
    if isinstance(group["params"], Tensor):
        group["params"] = [group["params"]]
    group["params"] = list(group["params"])
    unknown = sorted(set(group) - set(OPTIONS))
    if unknown:
        raise ValueError(f"{name} has unknown options {', '.join(unknown)}; M3 knows {', '.join(OPTIONS)}")
    if group.get("algorithm") not in ALGORITHMS:
        raise ValueError(f"{name} has algorithm {group.get('algorithm')!r}; it must be one of {', '.join(ALGORITHMS)}")
    if not group["params"]:
        raise ValueError(f"{name} has no parameters; leave the group out")
    period = group.get("period", 1)
    if not isinstance(period, int) or period < 1:
        raise ValueError(f"{name} has period {period!r}; it must be a whole number of at least 1")
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


def check_state(state_dict: Mapping[str, Any], groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
    """Check that a state dict is of an optimizer like this one.

    Raises:
        ValueError: it has other states than these groups keep, of other levels for example.
    """
    for group, saved_group in zip(groups, state_dict["param_groups"], strict=False):
        name = group.get("name", "unnamed")
        for option in ("algorithm", "period"):
            if saved_group.get(option) != group[option]:
                raise ValueError(
                    f"optimizer group {name} was saved with {option} {saved_group.get(option)!r} and has "
                    f"{group[option]!r}; load it with the settings it was saved with"
                )
        expected = {*_names(group, config)} | ({"step"} if group["algorithm"] == "adamw" else set())
        for place, number in enumerate(saved_group["params"]):
            found = set(state_dict["state"].get(number, {}))
            if found != expected:
                parameter = (group.get("param_names") or range(len(group["params"])))[place]
                lacks, surplus = (", ".join(sorted(some)) or "nothing" for some in (expected - found, found - expected))
                raise ValueError(
                    f"saved state of parameter {parameter} in optimizer group {name} lacks {lacks} and has {surplus} "
                    f"too much: it is of other optimizer.levels or another optimizer.form than this optimizer's "
                    f"{len(config.levels)} levels in form {config.form}"
                )


def keep_precision(
    state_dict: Mapping[str, Any], groups: list[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]
) -> None:
    """Put back as fp32 what `Optimizer.load_state_dict` rounded to the dtype of a parameter, and where it was made."""
    for group, saved_group in zip(groups, state_dict["param_groups"], strict=True):
        for parameter, number in zip(group["params"], saved_group["params"], strict=True):
            for key, saved in state_dict["state"][number].items():
                loaded = state[parameter][key]
                if key != "step" and loaded.dtype != torch.float32:
                    state[parameter][key] = saved.to(device=loaded.device, dtype=torch.float32, copy=True)
