"""Speed of the predictor, as ratios from runs that take turns in one process.

`python tests/benchmarks/model.py [--threads 2] [--rounds 5] [--only NAME] [--json]` prints a table, with `--json` a
list of {name, ratio, target, met} as the last line. About five minutes on two cores. Nothing asserts these numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hopescale.model.init import initialise
from hopescale.model.predictor import HopePredictor, normalise
from hopescale.model.schema import ModelConfig
from hopescale.model.titan import TitanMemory
from hopescale.parallel.activation_checkpointing import recompute_blocks
from hopescale.parallel.schema import ParallelConfig
from tests.benchmarks.autograd_loop import autograd_loop
from tests.benchmarks.turns import ratio_in_turns, seconds_in_turns

PHASE_5: dict[str, Any] = {
    "state_dim": 2,
    "block_pattern": "HHHHH",
    "spatial_mixing": True,
    "drop_path": 0.0,
    "output": "absolute",
}
DEMO: dict[str, Any] = {
    "encoder_dim": 112,
    "grid": (8, 8),
    "width": 128,
    "block_pattern": "SHS",
    "memory": {"heads": 4, "hidden_multiplier": 1.0},
    "attention": {"heads": 4, "mlp_multiplier": 2.0},
}


class Row(NamedTuple):
    """One line of the table."""

    name: str
    ratio: float
    target: str
    met: bool


def build(fields: dict[str, Any], **changes: Any) -> HopePredictor:
    """An initialised predictor of one of the shapes above, with changes."""
    settings = {**fields, **changes}
    model = HopePredictor(ModelConfig.model_validate({**settings, "block_pattern": tuple(settings["block_pattern"])}))
    initialise(model, seed=0)
    return model


def clips(config: ModelConfig, batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random features, actions and states of whole clips."""
    generator = torch.Generator().manual_seed(0)
    frames = config.frames - 1
    features = 3 * torch.randn(batch, frames, config.num_patches, config.encoder_dim, generator=generator)
    actions = torch.randn(batch, frames, config.action_dim, generator=generator)
    states = torch.randn(batch, frames, config.state_dim, generator=generator) if config.state_dim else None
    return features, actions, states


def teacher(model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor | None]) -> Callable[[], None]:
    """Forward and backward of the teacher branch."""

    def run() -> None:
        prediction = model(*inputs)
        (prediction.frames - normalise(inputs[0])).abs().mean().backward()
        model.zero_grad(set_to_none=True)

    return run


def titan_passes(titan: TitanMemory, x: Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward and backward of one block's memories: ours, and with autograd in a loop."""

    def ours() -> None:
        titan(x)[0].square().mean().backward()

    def loop() -> None:
        autograd_loop(titan, x).square().mean().backward()

    return ours, loop


FREE = (torch.ops.aten._unsafe_view.default, torch.ops.aten.new_empty_strided.default)
"""Operators that compute nothing and are not marked as views."""


class CallCounter(TorchDispatchMode):
    """Counts operator calls that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count what leads to a kernel."""
        self.calls += not (func.is_view or func in FREE)
        return func(*args, **(kwargs or {}))


def num_calls(run: Callable[[], object]) -> int:
    """Operator calls of a run."""
    with CallCounter() as counter:
        run()
    return counter.calls


class Saved:
    """What autograd keeps of a tensor, alive as long as the graph that keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        # An operation that keeps its own result would otherwise keep itself alive through it.
        self.tensor = tensor.detach()


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward of a result, parameters apart.

    What an operation kept whose result nothing led to is gone by then, and not counted.
    """
    saved: WeakSet[Saved] = WeakSet()

    def pack(tensor: Tensor) -> Saved:
        kept = Saved(tensor)
        saved.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        result = forward()
    storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage().nbytes() for kept in saved}
    assert result.requires_grad
    return sum(storages.values()) - sum(storages.get(p.untyped_storage().data_ptr(), 0) for p in model.parameters())


def gemm_rate(model: HopePredictor, rounds: int, run: Callable[[], None]) -> tuple[float, float]:
    """FLOPs per second of the memories' products alone, and of a whole run that takes turns with them."""
    config = model.config
    hidden, width = round(config.memory.hidden_multiplier * config.width), config.width
    tokens = config.num_tokens
    narrow, w1 = torch.randn(5, tokens, width), torch.randn(5, hidden, width)
    pairs, wide = torch.randn(5, 2 * tokens, width), torch.randn(5, tokens, hidden)

    def products() -> None:
        for _ in range(8):
            torch.bmm(pairs, w1.mT)
            torch.bmm(narrow, w1.mT)
            torch.bmm(wide, w1)
            torch.bmm(wide.mT, narrow)

    flops = 8 * 5 * 2 * width * hidden * tokens * 5
    with FlopCounterMode(display=False) as counter:
        run()
    alone, whole = seconds_in_turns([products, run], rounds)
    return flops / statistics.median(alone), counter.get_total_flops() / statistics.median(whole)


def gemm_share(rounds: int) -> Iterator[Row]:
    """How much of the machine's rate on products a whole training pass reaches."""
    model = build(PHASE_5)
    products, whole = gemm_rate(model, rounds, teacher(model, clips(model.config, 1)))
    share = whole / products
    yield Row("phase 5, one clip: executed FLOP rate / rate of its products alone", share, ">= 0.75", share >= 0.75)


def against_autograd(rounds: int) -> Iterator[Row]:
    """The closed form against autograd in a loop, at both shapes."""
    yield from against_autograd_at("phase 5", PHASE_5, batch=1, least=1.25, rounds=rounds)
    yield from against_autograd_at("demo", DEMO, batch=8, least=1.5, rounds=rounds)


def against_autograd_at(name: str, fields: dict[str, Any], batch: int, least: float, rounds: int) -> Iterator[Row]:
    """Speed, operator calls and saved bytes at one shape."""
    model = build(fields)
    titan = next(m for m in model.modules() if isinstance(m, TitanMemory))
    x = torch.randn(batch, 7, model.config.num_tokens, model.config.width)
    ours, loop = titan_passes(titan, x)
    speed = ratio_in_turns(loop, ours, rounds)
    yield Row(f"{name}: autograd loop / closed form, seconds", speed, f">= {least}", speed >= least)
    calls = num_calls(ours) / num_calls(loop)
    yield Row(f"{name}: closed form / autograd loop, operator calls", calls, "<= 0.33", calls <= 1 / 3)
    kept = saved_bytes(titan, lambda: titan(x)[0]) / saved_bytes(titan, lambda: autograd_loop(titan, x))
    yield Row(f"{name}: closed form / autograd loop, bytes kept for backward", kept, "<= 0.5", kept <= 0.5)


def bf16(rounds: int) -> Iterator[Row]:
    """Products in bf16, fast weights in fp32."""
    model = build(PHASE_5, block_pattern="H")
    inputs = clips(model.config, 1)
    full = teacher(model, inputs)

    def half() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            full()

    speed = ratio_in_turns(full, half, rounds)
    yield Row("phase 5 block: fp32 / bf16 products, seconds", speed, ">= 1.5", speed >= 1.5)


def compiled(rounds: int) -> Iterator[Row]:
    """torch.compile of a block."""
    eager, model = build(PHASE_5, block_pattern="H"), build(PHASE_5, block_pattern="H")
    for block in model.blocks:
        block.compile()
    inputs = clips(model.config, 1)
    for what, difference in zip(("outputs", "gradients"), differences(eager, model, inputs), strict=True):
        yield Row(f"phase 5 block: difference of compiled and eager {what}", difference, "<= 1e-4", difference <= 1e-4)
    speed = ratio_in_turns(teacher(eager, inputs), teacher(model, inputs), rounds)
    on = ParallelConfig.model_fields["compile"].default
    yield Row("phase 5 block: eager / compiled, seconds", speed, "> 1, or off", speed > 1 or not on)


def differences(one: nn.Module, other: nn.Module, inputs: tuple[Tensor, Tensor, Tensor | None]) -> tuple[float, float]:
    """Norms of what differs over norms: of the outputs, and of the gradients of the parameter that differs most."""
    frames = [model(*inputs).frames for model in (one, other)]
    found = [
        torch.autograd.grad((f - normalise(inputs[0])).abs().mean(), list(model.parameters()), materialize_grads=True)
        for f, model in zip(frames, (one, other), strict=True)
    ]
    largest = torch.tensor([apart(a, b) for a, b in zip(*found, strict=True) if a.any() or b.any()]).max()
    return apart(*(f.detach() for f in frames)), float(largest)


def apart(a: Tensor, b: Tensor) -> float:
    """|a - b| / |a|."""
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(a))


def activations(rounds: int) -> Iterator[Row]:
    """Most bytes kept for backward with recomputed blocks: what forward leaves, and then one block that runs again."""
    del rounds
    kept: dict[tuple[str, str], int] = {}
    for pattern in ("HHHHH", "H"):
        for recompute in ("none", "block"):
            model = build(PHASE_5, block_pattern=pattern)
            recompute_blocks(list(model.blocks), recompute)
            kept[pattern, recompute] = saved_bytes(model, partial(frames_of, model, clips(model.config, 1)))
    most = kept["HHHHH", "block"] + kept["H", "none"] - kept["H", "block"]
    share = most / kept["HHHHH", "none"]
    yield Row("phase 5: most bytes kept with recompute block / none", share, "<= 0.25", share <= 0.25)


def frames_of(model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
    """What the model predicts."""
    return model(*inputs).frames


def per_clip(rounds: int) -> Iterator[Row]:
    """Memories of each clip's own against one set for the batch."""
    own, shared = (build(PHASE_5, block_pattern="H", memory={"scope": scope}) for scope in ("clip", "batch"))
    inputs = clips(own.config, 8)
    cost = ratio_in_turns(teacher(own, inputs), teacher(shared, inputs), rounds)
    yield Row("phase 5 block, 8 clips: memory per clip / per batch, seconds", cost, "<= 1.25", cost <= 1.25)


PARTS: tuple[Callable[[int], Iterator[Row]], ...] = (
    gemm_share,
    against_autograd,
    bf16,
    compiled,
    activations,
    per_clip,
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=[part.__name__ for part in PARTS])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    rows = []
    print(f"{'what':<72}{'ratio':>8}  {'target':<15}met")
    for part in PARTS:
        if arguments.only not in (None, part.__name__):
            continue
        for row in part(arguments.rounds):
            rows.append(row)
            print(f"{row.name:<72}{row.ratio:>8.3g}  {row.target:<15}{'yes' if row.met else 'NO'}", flush=True)
    if arguments.json:
        print(json.dumps([row._asdict() for row in rows]))


if __name__ == "__main__":
    main()
