"""Models without memory: built on the meta device, spread over ranks, and only then given numbers.

No rank ever holds more of the model than its own pieces, and one parameter at a time. A parameter's first numbers are a
function of its name and the seed, so they are the same for every number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hopescale.model.init import initial_value


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Let modules that are built inside have parameters without memory; buffers that do not copy one have theirs."""
    register = nn.Module.register_parameter

    def registering(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = registering  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@torch.no_grad()
def materialise(model: nn.Module, device: torch.device, seed: int) -> None:
    """Give a model that was built so its memory on a device, and every parameter its first numbers, sharded or not.

    Args:
        model: Built inside `parameters_on_meta`; its buffers without memory begin at 0.
        device: Of this rank.
        seed: Of the run.
    """
    meta_buffers = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))
    for name in meta_buffers:
        model.get_buffer(name).zero_()
    for name, parameter in model.named_parameters():
        parameter.copy_(_placed(initial_value(name, parameter.shape, seed).to(device), parameter))


def _placed(value: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return value
    # Every rank has drawn all of it: nothing needs to be sent.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
