"""Ways to take one step on the same matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.optim._muon as torch_muon
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hopescale.optim.m3 import M3
from hopescale.optim.newton_schulz import orthogonalise, shape_factor, steps_of
from hopescale.optim.schema import OptimizerConfig

Step = Callable[[], None]

WIDTH, HIDDEN, BLOCKS = 384, (768, 960, 1152), 2
SHAPES: list[tuple[int, int]] = BLOCKS * [
    *((hidden, WIDTH) for hidden in HIDDEN),
    *((WIDTH, hidden) for hidden in HIDDEN),
    (WIDTH, WIDTH),
    (WIDTH, WIDTH),
]


def gradients() -> list[Tensor]:
    """The same on every rank."""
    return [torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n, shape in enumerate(SHAPES)]


def ours(parameters: Sequence[nn.Parameter], grads: Sequence[Tensor], config: OptimizerConfig) -> Step:
    """A step of M3."""
    optimizer = M3([{"params": list(parameters), "algorithm": "m3"}], config)

    def run() -> None:
        optimizer.step(finite=True)

    return _with_gradients(parameters, grads, run)


def muon(parameters: Sequence[nn.Parameter], grads: Sequence[Tensor], precision: str) -> Step:
    """A step of torch.optim.Muon, whose iteration is bf16 unless it is replaced by the same in fp32."""
    optimizer = torch.optim.Muon(list(parameters), lr=1e-3, momentum=0.9, nesterov=False)
    original = torch_muon._zeropower_via_newtonschulz

    def run() -> None:
        torch_muon._zeropower_via_newtonschulz = original if precision == "bf16" else _fp32_iteration
        optimizer.step()
        torch_muon._zeropower_via_newtonschulz = original

    return _with_gradients(parameters, grads, run)


def _fp32_iteration(grad: Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float) -> Tensor:
    """What torch.optim.Muon iterates, operation by operation, without its rounding to bf16."""
    a, b, c = ns_coefficients
    x = grad.T if grad.size(0) > grad.size(1) else grad.clone()
    x = x / x.norm().clamp(min=eps)
    for _ in range(ns_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if grad.size(0) > grad.size(1) else x


def gather(parameters: Sequence[nn.Parameter], grads: Sequence[Tensor], config: OptimizerConfig) -> Step:
    """A step that gathers one matrix after the other on every rank, with M3's own Newton-Schulz."""
    momenta = [torch.zeros_like(gradient) for gradient in grads]
    newton_schulz, level = config.newton_schulz, config.levels[0]
    steps = steps_of(newton_schulz.coefficients, newton_schulz.steps)
    assert newton_schulz.precision != "auto"
    precision = newton_schulz.precision

    def run() -> None:
        for parameter, gradient, momentum in zip(parameters, grads, momenta, strict=True):
            momentum.mul_(level.eta).add_(gradient, alpha=level.theta)
            assert isinstance(momentum, DTensor)
            assert isinstance(parameter, DTensor)
            update = orthogonalise(momentum.full_tensor(), steps, precision)
            mesh, placements = parameter.device_mesh, parameter.placements
            piece = distribute_tensor(update.contiguous(), mesh, placements, src_data_rank=None).to_local()
            local = parameter.to_local()
            rows, columns = parameter.shape
            local.mul_(1 - config.lr * config.weight_decay)
            local.add_(piece, alpha=-config.lr * shape_factor(rows, columns, config.adjust))

    return torch.no_grad()(run)


def _with_gradients(parameters: Sequence[nn.Parameter], grads: Sequence[Tensor], run: Step) -> Step:
    for parameter, gradient in zip(parameters, grads, strict=True):
        parameter.grad = gradient
    return run
