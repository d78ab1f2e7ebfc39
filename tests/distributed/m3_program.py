"""Run by torchrun: M3 on sharded and replicated matrices against M3 on the whole ones. Rank 0 writes what it saw."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from hopescale.optim.m3 import M3
from hopescale.optim.schema import OptimizerConfig, PlanConfig
from hopescale.optim.state import local
from hopescale.parallel.process_group import end_process
from tests.sharded import recorded_exchanges, whole

STEPS = 6
SHARD0: list[Placement] = [Shard(0)]
SHARD1: list[Placement] = [Shard(1)]
SHARD2: list[Placement] = [Shard(2)]
LEVELS = [{"period": 1, "eta": 0.9, "theta": 0.1}, {"period": 3, "eta": 0.8, "theta": 0.2, "weight": 0.5}]

TALL, WIDE, SQUARE, UNEVEN, SHORT = (24, 12), (12, 24), (12, 12), (18, 7), (5, 24)
STACK, HEADS = (4, 12, 24), (5, 2, 24, 12)


@dataclass
class Case:
    """Parameters of these shapes, placed alike, for some steps by one plan."""

    name: str
    shapes: list[tuple[int, ...]]
    placements: list[Placement] | None
    """On the case's mesh; None for plain copies."""
    settings: dict[str, Any] = field(default_factory=dict)
    mesh: tuple[int, ...] | None = None
    """Sizes of the mesh's axes; None for one axis over all ranks."""
    dtype: torch.dtype = torch.float32
    steps: int = STEPS


def cases(size: int) -> Iterator[Case]:
    """Those that a world of this size can have."""
    uneven, even = [TALL, WIDE, SQUARE, UNEVEN, SHORT, (3, 9, 5)], [TALL, WIDE, SQUARE, (2, 24, 12)]
    for plan in ("auto", "owner", "gather"):
        yield Case(f"shard0 {plan}", uneven, SHARD0, {"plan": plan})
        # DTensor cuts any dim unevenly, though FSDP2 does not.
        yield Case(f"shard1 {plan}", uneven, SHARD1, {"plan": plan})
        yield Case(f"stack on a matrix dim {plan}", [STACK, HEADS], SHARD2, {"plan": plan})
        yield Case(f"heads {plan}", [HEADS], [Shard(1)], {"plan": plan})
    yield Case("stack on its leading dim", [STACK, HEADS, (9, 7, 8)], SHARD0)
    yield Case("gram, rows", [TALL, SQUARE, UNEVEN], SHARD0, {"plan": "gram"})
    yield Case("gram, columns", [WIDE, SQUARE, (7, 18), (2, 24)], SHARD1, {"plan": "gram"})
    yield Case("gram, stacked", [STACK, (3, 8, 40)], SHARD2, {"plan": "gram"})
    restart = {"plan": "gram", "newton_schulz": {"precision": "fp32", "restart": 2}}
    yield Case("gram with restart", [TALL, UNEVEN], SHARD0, restart)
    yield Case("many small buckets", [TALL] * 9 + [WIDE] * 5, SHARD0, {"plan": {"bucket_mib": 1e-3}})
    yield Case("many small gram buckets", [TALL] * 9, SHARD0, {"plan": {"strategy": "gram", "bucket_mib": 1e-3}})
    yield Case("fewer matrices than ranks", [TALL], SHARD0, {"plan": "owner"})
    yield Case("bf16 parameters", even, SHARD0, dtype=torch.bfloat16)
    yield Case("plain copies", even, None, {"plan": "replicated"})
    yield Case("plain copies, auto", even, None, {"plan": {"strategy": "auto", "flops": 1e3}})
    yield Case("paper form", even, SHARD0, {"form": "paper", "paper_form": {"period": 2}})
    offloaded = {"buffers": "cascaded", "slow_levels": "offloaded"}
    yield Case("offloaded slow levels", even, SHARD0, {"levels": LEVELS, **offloaded})
    yield Case("fifty steps", even, SHARD0, steps=50)
    if size == 4:
        for plan in ("auto", "owner", "gather", {"strategy": "owner", "across_latency": 0, "across_bandwidth": 1e15}):
            placements: list[Placement] = [Replicate(), Shard(0)]
            yield Case(f"hsdp {plan}", uneven, placements, {"plan": plan}, mesh=(2, 2))
            yield Case(f"two cuts {plan}", uneven, [Shard(0), Shard(0)], {"plan": plan}, mesh=(2, 2))
            yield Case(f"both sides {plan}", uneven, [Shard(0), Shard(1)], {"plan": plan}, mesh=(2, 2))
        for across in (1.0, 1e15):
            plan = {"strategy": "gram", "across_latency": 1 / across, "across_bandwidth": across}
            yield Case(f"hsdp gram {across}", [TALL, UNEVEN], [Replicate(), Shard(0)], {"plan": plan}, mesh=(2, 2))
        yield Case("shards outside", even, [Shard(0), Replicate()], mesh=(2, 2))
        yield Case("replicas alone", even, [Replicate(), Replicate()], {"plan": "replicated"}, mesh=(2, 2))


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(shapes: list[tuple[int, ...]], step: int) -> list[Tensor]:
    """Of changing size, with something in common that slow levels keep; some of them tiny."""
    return [
        (1 + step % 3) * 10.0 ** (-4 * (n % 3)) * (normal(shape, 50 + n) + normal(shape, 1000 * step + n))
        for n, shape in enumerate(shapes)
    ]


def config_of(case: Case) -> OptimizerConfig:
    levels = {} if case.settings.get("form") == "paper" else {"levels": LEVELS}
    base = {"lr": 0.02, "newton_schulz": {"precision": "fp32"}, **levels}
    return OptimizerConfig.model_validate(base | case.settings)


def optimizer_of(parameters: list[nn.Parameter], config: OptimizerConfig, group: Any = None) -> M3:
    return M3([{"params": parameters, "algorithm": "m3", "weight_decay": 0.1}], config, group)


def run_case(case: Case, size: int) -> dict[str, Any]:
    """Largest difference to the whole matrices' optimizer, and what travelled on a step."""
    config, mesh = config_of(case), init_device_mesh("cpu", case.mesh or (size,))
    place = placer(case, mesh)
    start = [normal(shape, n).to(case.dtype) for n, shape in enumerate(case.shapes)]
    parameters = [nn.Parameter(place(tensor)) for tensor in start]
    references = [nn.Parameter(tensor.clone()) for tensor in start]
    optimizer = optimizer_of(parameters, config, dist.group.WORLD if case.placements is None else None)
    alone = config.model_copy(update={"plan": type(config.plan)()})
    reference = optimizer_of(references, alone)
    for step in range(case.steps):
        grads = [gradient.to(case.dtype) for gradient in gradients(case.shapes, step)]
        for parameter, other, gradient in zip(parameters, references, grads, strict=True):
            parameter.grad, other.grad = place(gradient), gradient.clone()
        with recorded() as seen:
            optimizer.step(finite=True)
        reference.step()
    pairs = list(zip(parameters, references, strict=True))
    errors = [float((whole(p.detach()) - other.detach()).abs().max()) for p, other in pairs]
    (schedule,) = optimizer.schedules()
    planned = [sum(sent.total[dist.get_rank()] for sent in traffic) for traffic in schedule.traffic]
    return {
        "error": max(errors),
        "moved": min(float((other.detach() - s).abs().max()) for other, s in zip(references, start, strict=True)),
        "plans": [bucket.plan for bucket in schedule.buckets],
        "exchanges": len(seen),
        "planned_exchanges": sum(map(schedule.num_exchanges, schedule.buckets)),
        "bytes": sum(seen),
        "planned_bytes": sum(planned),
    }


def placer(case: Case, mesh: DeviceMesh) -> Callable[[Tensor], Tensor]:
    if case.placements is None:
        return lambda tensor: tensor.clone()
    placements = case.placements
    return lambda tensor: distribute_tensor(tensor.clone(), mesh, placements)


@contextmanager
def recorded() -> Iterator[list[int]]:
    """Bytes that this rank sends to others in each exchange, and a failure for every other collective."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a collective beside the exchanges")

    with recorded_exchanges() as sent_bytes, ExitStack() as stack:
        for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast"):
            stack.enter_context(patch.object(dist, name, forbidden))
        yield sent_bytes


def skipped_steps(size: int) -> dict[str, Any]:
    """One rank's piece of a gradient is not finite: nobody moves anything."""
    mesh = init_device_mesh("cpu", (size,))
    config = OptimizerConfig.model_validate({"levels": LEVELS, "newton_schulz": {"precision": "fp32"}})
    matrix = nn.Parameter(distribute_tensor(normal(TALL, 0), mesh, SHARD0))
    vector = nn.Parameter(distribute_tensor(normal((9,), 1), mesh, SHARD0))
    optimizer = M3(
        [
            {"params": [matrix], "algorithm": "m3", "period": 2},
            {"params": [vector], "algorithm": "adamw"},
        ],
        config,
    )
    seen: dict[str, Any] = {"skipped": [], "changed": []}
    for step, bad in enumerate((None, float("nan"), None, float("inf"), None)):
        gradient = normal(TALL, 10 + step)
        if bad is not None:
            gradient[-1, -1] = bad
        matrix.grad = distribute_tensor(gradient, mesh, SHARD0)
        vector.grad = distribute_tensor(normal((9,), 20 + step), mesh, SHARD0)
        before = [t.clone() for t in tensors(optimizer)]
        counts = [group["num_steps"] for group in optimizer.param_groups]
        optimizer.step()
        seen["skipped"].append(optimizer.skipped)
        same = all(torch.equal(a, b) for a, b in zip(before, tensors(optimizer), strict=True))
        seen["changed"].append(not same or counts != [group["num_steps"] for group in optimizer.param_groups])
    return seen


def tensors(optimizer: M3) -> list[Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = [p.detach() for p in parameters] + [t for p in parameters for t in optimizer.state[p].values()]
    return [piece(t) for t in found]


def piece(tensor: Tensor) -> Tensor:
    return local(tensor.detach())


def gradients_on_some_ranks(size: int) -> dict[str, Any]:
    """A parameter has no gradient on the first rank alone: no hang, and it stays where it is there."""
    mesh = init_device_mesh("cpu", (size,))
    config = OptimizerConfig.model_validate({"plan": "owner", "newton_schulz": {"precision": "fp32"}})
    parameters = [nn.Parameter(distribute_tensor(normal(TALL, n), mesh, SHARD0)) for n in range(2)]
    optimizer = optimizer_of(parameters, config)
    parameters[0].grad = distribute_tensor(normal(TALL, 5), mesh, SHARD0)
    parameters[1].grad = None if dist.get_rank() == 0 else distribute_tensor_alone(normal(TALL, 6), mesh)
    before = [piece(p).clone() for p in parameters]
    optimizer.step()
    return {"moved": [not torch.equal(piece(p), b) for p, b in zip(parameters, before, strict=True)]}


def distribute_tensor_alone(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """A sharded tensor made without talking to other ranks."""
    own = tensor.chunk(mesh.size(), 0)[mesh.get_local_rank()].clone()
    return DTensor.from_local(own, mesh, SHARD0, run_check=False, shape=tensor.shape, stride=tensor.stride())


def paper_without_gradients(size: int) -> bool:
    """The first rank has no gradient when the slow momentum is due: nobody waits for it in vain."""
    mesh = init_device_mesh("cpu", (size,))
    fields = {"form": "paper", "paper_form": {"period": 1}, "newton_schulz": {"precision": "fp32"}}
    parameter = nn.Parameter(distribute_tensor(normal(TALL, 0), mesh, SHARD0))
    optimizer = optimizer_of([parameter], OptimizerConfig.model_validate(fields))
    parameter.grad = None if dist.get_rank() == 0 else distribute_tensor_alone(normal(TALL, 1), mesh)
    before = piece(parameter).clone()
    optimizer.step(finite=True)
    return torch.equal(piece(parameter), before)


def unsummed_gradients(size: int) -> float:
    """Gradients that are still to be summed over ranks move replicas as the sum does."""
    mesh = init_device_mesh("cpu", (size,))
    config = OptimizerConfig.model_validate({"newton_schulz": {"precision": "fp32"}})
    start, shares = normal(SQUARE, 0), [normal(SQUARE, 1 + rank) for rank in range(size)]
    parameter, other = nn.Parameter(distribute_tensor(start.clone(), mesh, [Replicate()])), nn.Parameter(start.clone())
    parameter.grad = DTensor.from_local(shares[dist.get_rank()], mesh, [Partial()], run_check=False)
    other.grad = torch.stack(shares).sum(0)
    for one in (parameter, other):
        optimizer_of([one], config).step()
    return float((piece(parameter) - other.detach()).abs().max())


def pieces_by_themselves(size: int) -> dict[str, Any]:
    """block_periodic: exact on every second step, each rank's own piece on the others."""
    mesh = init_device_mesh("cpu", (size,))
    config = OptimizerConfig.model_validate(
        {"plan": {"strategy": "block_periodic", "block_period": 2}, "newton_schulz": {"precision": "fp32"}}
    )
    seen: dict[str, Any] = {"exchanges": [], "as_whole": []}
    parameter, other = (
        nn.Parameter(make(normal((24, 12), 0))) for make in (placer(Case("", [], SHARD0), mesh), Tensor.clone)
    )
    sharded, alone = (
        optimizer_of([parameter], config),
        optimizer_of([other], config.model_copy(update={"plan": PlanConfig()})),
    )
    for _ in range(4):
        gradient = normal((24, 12), 5)
        parameter.grad, other.grad = distribute_tensor(gradient.clone(), mesh, SHARD0), gradient
        before, before_alone = whole(parameter.detach()).clone(), other.detach().clone()
        with recorded() as sent:
            sharded.step(finite=True)
        alone.step()
        moved, moved_alone = whole(parameter.detach()) - before, other.detach() - before_alone
        seen["exchanges"].append(len(sent))
        # But for the decay of weights that differ by now.
        seen["as_whole"].append(float((moved - moved_alone).norm()) < 0.02 * float(moved_alone.norm()))
    return seen


def disagreement(size: int, kind: str) -> str:
    """The first rank's configuration differs."""
    mesh = init_device_mesh("cpu", (size,))
    odd = dist.get_rank() == 0
    fields: dict[str, Any] = {"newton_schulz": {"precision": "fp32", "steps": 4 if odd and kind == "steps" else 5}}
    if kind == "paper period":
        fields |= {"form": "paper", "paper_form": {"period": 1 if odd else 3}}
    if kind == "levels":
        fields |= {"levels": LEVELS[:1] if odd else LEVELS}
    parameter = nn.Parameter(distribute_tensor(normal(TALL, 0), mesh, SHARD0))
    parameter.grad = distribute_tensor(normal(TALL, 1), mesh, SHARD0)
    period = 2 if odd and kind == "group period" else 1
    group = {"params": [parameter], "algorithm": "m3", "period": period}
    try:
        M3([group], OptimizerConfig.model_validate(fields)).step()
    except RuntimeError as error:
        return str(error)
    return "no error"


def main(out: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    size = dist.get_world_size()
    seen: dict[str, Any] = {"cases": {case.name: run_case(case, size) for case in cases(size)}}
    seen["skipped"] = skipped_steps(size)
    if size > 1:
        seen["some"] = gradients_on_some_ranks(size)
        seen["paper"] = paper_without_gradients(size)
        seen["unsummed"] = unsummed_gradients(size)
        seen["pieces"] = pieces_by_themselves(size)
        kinds = ("steps", "paper period", "levels", "group period")
        seen["disagreement"] = {kind: disagreement(size, kind) for kind in kinds}
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, seen)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(everyone))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    end_process(0)
