"""Run by torchrun: what `hopescale plan` foresees of a step, against what a real step does. Rank 0 writes both as JSON.

Every cell is a name of a model and settings. All of them take turns in one process group; each takes two steps, and the
third is looked at. Figures are those of the rank with most.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from data_pipeline.batch import StepBatches
from hopescale.checkpoint.contents import RunState
from hopescale.checkpoint.manager import CheckpointManager
from hopescale.checkpoint.staging import step_folder
from hopescale.config.compose import load_config
from hopescale.config.schema import Config
from hopescale.parallel.engine import Engine
from hopescale.parallel.process_group import choose_device, end_process, process_group, read_launch
from hopescale.plan.job import job_of
from hopescale.plan.spread import NUMBER_BYTES
from hopescale.plan.traffic import Share, by_kind
from hopescale.resilience.control_word import ControlWord
from hopescale.resilience.preemption import StopRequests
from hopescale.train import build
from hopescale.train_step import train_step
from tests.clip_batches import clips_for, step_of
from tests.ledger import Ledger, plain
from tests.presets import TRAINED_HERE

CLIPS = 4
KINDS = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
}
"""What the process group calls them."""


def config_of(cell: str, world_size: int) -> Config:
    """The configuration of a cell."""
    name, *settings = cell.split()
    sizes = [f"train.global_batch={CLIPS * world_size}", f"cluster.gpus_per_node={world_size}"]
    return load_config([*TRAINED_HERE[name], *sizes, "parallel.device=cpu", *settings])


def batch_of(config: Config, share: Share, step: int, world_size: int) -> StepBatches:
    batch = step_of(*(clips_for(config.model, share.micro_batch) for _ in range(share.micro_batches)))
    return StepBatches(step, batch.lengths.repeat(world_size), batch.micro)


def all_tensors() -> Iterator[Tensor]:
    """Every tensor with numbers that Python knows, pieces of sharded ones by themselves."""
    for one in gc.get_objects():
        if type(one) in (Tensor, nn.Parameter, DTensor):
            yield from (leaf for leaf in plain(one) if not leaf.is_meta and leaf.untyped_storage().nbytes())


def gathered_parameters(model: nn.Module) -> list[Tensor]:
    """The parameters that backward sees: those of FSDP2 while they are gathered, or the model's."""
    found = list[Tensor](model.parameters())
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                found += [p._unsharded_param for p in group.fsdp_params if hasattr(p, "_unsharded_param")]
    return found


def open_ledger(engine: Engine, earlier: set[int]) -> Ledger:
    """A ledger of all that the engine holds between steps; of what it did not make itself, nothing."""
    of_optimizer = [p for group in engine.optimizer.param_groups for p in group["params"]]
    states = [t for p in of_optimizer for name, t in engine.optimizer.state[p].items() if name != "step"]
    own = [*engine.model.parameters(), *of_optimizer]
    own += [vars(p)["ds_tensor"] for p in engine.model.parameters() if "ds_tensor" in vars(p)]
    ledger = Ledger((p.shape for p in of_optimizer), parameters=own, optimizer=states)
    for tensor in all_tensors():
        if tensor.untyped_storage()._cdata not in earlier and not ledger.knows(tensor):
            ledger.file(tensor, "buffers")
    return ledger


def file_gradients(engine: Engine, ledger: Ledger) -> list[Any]:
    """Let the ledger know gradients as they come to be, and those that the optimizer is given."""

    def whole(parameter: Tensor) -> None:
        if parameter.grad is not None:
            ledger.file(parameter.grad, "gradients", only="activations")

    step = engine.step

    def stepping(update: Callable[[], None]) -> None:
        def updating() -> None:
            for group in engine.optimizer.param_groups:
                for gradient in (p.grad for p in group["params"] if p.grad is not None):
                    ledger.file(gradient, "gradients")
            update()

        step(updating)

    engine.step = stepping  # type: ignore[method-assign]
    return [p.register_post_accumulate_grad_hook(whole) for p in gathered_parameters(engine.model)]


def checkpointing(engine: Engine, folder: Path) -> dict[str, int]:
    """Most bytes of tensors that saving and restoring make beside those of the engine."""
    manager, made = CheckpointManager(folder, keep=1, config={}), {}
    state = RunState(step=3)
    for name, act in (
        ("saving", lambda: manager.save(engine.model, engine.optimizer, state)),
        ("restoring", lambda: manager.restore(step_folder(folder, 3), engine.model, engine.optimizer)),
    ):
        gc.collect()
        ledger = open_ledger(engine, set())
        before = ledger.alive()
        with ledger:
            act()
        made[name] = ledger.peaks()["total"] - before
    return most_of_all_ranks(made)


def look(cell: str, device: torch.device, world_size: int, folder: Path) -> dict[str, Any]:
    """Foreseen and seen bytes of a cell."""
    config = config_of(cell, world_size)
    job = job_of(config)
    gc.collect()
    earlier = {tensor.untyped_storage()._cdata for tensor in all_tensors()}
    with Ledger() as building:
        engine = build(config, device, world_size)
    for step in range(2):
        train_step(engine, batch_of(config, job.share, step, world_size), config, attempt=step, step=step)
    batch = batch_of(config, job.share, 2, world_size)
    gc.collect()
    ledger = open_ledger(engine, earlier)
    hooks = file_gradients(engine, ledger)
    with ledger.watching():
        # What the trainer adds to taking a batch.
        with ControlWord(StopRequests(None)).word(0):
            pass
        train_step(engine, batch, config, attempt=2, step=2)
    for hook in hooks:
        hook.remove()
    sent = {KINDS[name]: sum(sizes) for name, sizes in ledger.collectives.items()}
    return {
        "engine": job.spread.engine,
        "to_build": building.peaks()["total"],
        "largest_parameter": NUMBER_BYTES * max(p.numel for p in job.model.parameters),
        "to_checkpoint": checkpointing(engine, folder),
        "foreseen": job.memory.by_category,
        "seen": most_of_all_ranks({name: ledger.peaks().get(name, 0) for name in job.memory.by_category}),
        "collectives_foreseen": by_kind(job.collectives),
        "collectives_seen": most_of_all_ranks({name: sent.get(name, 0) for name in KINDS.values()}),
    }


def most_of_all_ranks(sizes: dict[str, int]) -> dict[str, int]:
    most = torch.tensor(list(sizes.values()), dtype=torch.int64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return dict(zip(sizes, most.tolist(), strict=True))


def main(out: Path, cells: list[str]) -> None:
    launch = read_launch()
    parallel = config_of(cells[0], launch.world_size).parallel
    device = choose_device(parallel, launch)
    with process_group(parallel, launch, device):
        seen = {
            cell: look(cell, device, launch.world_size, out.with_name(f"{out.stem}-{number}"))
            for number, cell in enumerate(cells)
        }
    if launch.is_first:
        out.write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
    end_process(0)
