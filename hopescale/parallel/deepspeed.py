"""DeepSpeed's ZeRO behind the same calls as FSDP2, and everything that is known of its insides.

DeepSpeed sees one parameter group and an optimizer that does nothing of its own: when ZeRO asks it to step, gradients
are reduced, not yet clipped, and lie beside the flat fp32 buffer of this rank's numbers. M3 works on that buffer, cut
into the pieces of the parameters (`optim/flat_piece.py`), so that clipping, skipped steps, groups and checkpoints are
those of every other engine. ZeRO then gathers the new parameters.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hopescale.config.schema import Config
from hopescale.errors import ConfigError, Problem, missing_extra
from hopescale.model.build import Predictor
from hopescale.model.passes import passes
from hopescale.optim.flat_piece import FlatPiece, FlatRanges, check_cover, cut
from hopescale.optim.m3 import M3
from hopescale.optim.routing import parameter_groups

from .process_group import name_accelerator
from .schema import ParallelConfig

TESTED = ("0.19.8",)
"""Releases whose insides are those described here."""
KEPT_WHOLE = 4096
"""Numbers up to which stage 3 leaves a parameter on every rank, norms and biases above all: gathering them costs more
than they weigh."""
BUCKET = 2**24
"""Most numbers of gradients that are reduced at once, for which every rank makes room: DeepSpeed's own half a billion
would be 2 GB of it, whatever the model."""
ZERO_ALIGNMENT = 2
"""Stages 1 and 2 fill their buffer up to a multiple of so many numbers a rank."""
ONE_SUB_GROUP = 10**15
"""Numbers a sub-group of stage 3 may have: more than any model, so that there is one."""


class DeepSpeedEngine:
    """A model under ZeRO stage 0 to 3 in fp32, whose products run in bf16 where the trainer's autocast says so."""

    def __init__(self, model: Predictor, config: Config, device: torch.device) -> None:
        """Spread a model over all ranks.

        Args:
            model: Whole, on `device`, the same on every rank; has `blocks`.
            config: Of the run.
            device: Of this rank.

        Raises:
            ConfigError: DeepSpeed is of a release that is not known here.
            MissingExtra: It is not installed.
            RuntimeError: Its buffers are not laid out as described here; ValueError: nor are their parts.
        """
        stage, world_size = config.parallel.zero_stage or 0, dist.get_world_size()
        deepspeed = import_deepspeed(config.parallel)
        self._gather: Any = deepspeed.zero.GatheredParameters
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._client = _Client([p for _, p in named])
        # Stage 3 leaves placeholders.
        shapes = {name: tuple(p.shape) for name, p in named}
        with _quiet():
            self._engine: Any = deepspeed.initialize(
                model=model,
                optimizer=self._client,
                config=_settings(config, device, sum(p.numel() for _, p in named)),
                dist_init_required=False,
            )[0]
        self.model: nn.Module = model
        if stage == 3:
            model.register_forward_pre_hook(lambda *_: _look_out(model, True))
            model.register_forward_hook(lambda *_: _look_out(model, False))
        self._world_size, self._stage = world_size, stage
        self.shards = world_size if stage else 1
        self.shard_group = dist.group.WORLD if stage else None
        self._pieces = _pieces(self._engine.optimizer, stage, named, shapes) if stage else dict(named)
        self._had_gradient: set[str] = set()
        for name, parameter in named:
            parameter.register_post_accumulate_grad_hook(partial(self._see_gradient, name))
        groups = parameter_groups(self._pieces.items(), config.optimizer, config.model.cms.parameter_periods)
        self.optimizer = M3(groups, config.optimizer, process_group=None if stage else dist.group.WORLD)
        self._check_round_trip(named)

    def begin_micro_batch(self, *, last: bool) -> None:
        """See `Engine`."""
        if self._stage:
            # What DeepSpeed does where its own `forward` is called: the gradients of the backward before are complete.
            self._engine.optimizer.clear_backward_seen_flag()
        self._engine.set_gradient_accumulation_boundary(last)

    def backward(self, objective: Tensor) -> None:
        """See `Engine`."""
        # It divides by the number of ranks what we want summed.
        self._engine.backward(objective * self._world_size, scale_wrt_gas=False)

    def step(self, update: Callable[[], None]) -> None:
        """See `Engine`."""
        updated = False

        def with_gradients() -> None:
            nonlocal updated
            updated = True
            self._give_gradients()
            update()
            for parameter in self._pieces.values():
                parameter.grad = None

        self._client.update = with_gradients
        try:
            self._engine.step()
        finally:
            self._client.update = None
            # Also where DeepSpeed has left the update out.
            self._had_gradient.clear()
        if self._stage == 3 and not updated:
            # It would look there for numbers that are not finite again, also where no gradient comes any more.
            self._engine.optimizer.grad_partitions_flat_buffer.zero_()

    def finish_evaluation(self) -> None:
        """See `Engine`: stage 3 frees each module's parameters behind it."""

    @torch.no_grad()
    def take_loaded(self) -> None:
        """See `Engine`."""
        if self._stage in (1, 2):
            self._engine.optimizer.update_lp_params()
        elif self._stage == 3:
            for number in range(len(self._engine.optimizer.fp16_groups)):
                self._engine.optimizer._reassign_or_swap_out_partitioned_parameters(number)

    def _see_gradient(self, name: str, _: Tensor) -> None:
        self._had_gradient.add(name)

    def _give_gradients(self) -> None:
        """Cut the gradient of the flat buffer as the buffer is cut.

        A parameter that no backward of this step reached has none, as with every engine: DeepSpeed would give it zeros,
        or what its buffer holds of an earlier step.
        """
        flat = _flat_buffer(self._engine.optimizer, self._stage) if self._stage else None
        for name, parameter in self._pieces.items():
            if name not in self._had_gradient:
                parameter.grad = None
                continue
            if flat is None:
                continue
            assert flat.grad is not None
            assert isinstance(parameter, FlatPiece)
            first = parameter.piece.storage_offset() - flat.storage_offset()
            parameter.grad = FlatPiece(flat.grad[first : first + parameter.piece.numel()], parameter.spec)

    def _check_round_trip(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Check, on one parameter, that what lies in the pieces is what the model computes with.

        Raises:
            RuntimeError: It is not, on every rank.
        """
        if not self._stage:
            return
        # The same one on every rank: to gather it is a collective.
        name, parameter = max(named, key=lambda item: self._pieces[item[0]].numel())
        piece = self._pieces[name]
        assert isinstance(piece, FlatPiece)
        start, stop = piece.spec.own
        with self._gathered(parameter):
            same = torch.equal(parameter.detach().reshape(-1)[start:stop].to(piece.piece), piece.piece)
        agreed = torch.tensor(int(same), device=parameter.device)
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
        if not agreed:
            raise RuntimeError(f"DeepSpeed's buffer does not hold numbers {start} to {stop} of {name} where expected")

    @contextmanager
    def _gathered(self, parameter: Tensor) -> Iterator[None]:
        if self._stage < 3:
            yield
            return
        with self._gather([parameter]):
            yield


class _Client(torch.optim.Optimizer):
    """What DeepSpeed takes for the optimizer: it calls back whoever is about to update."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.update: Callable[[], None] | None = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Run the update, if there is one: DeepSpeed also steps while it starts."""
        if self.update is not None:
            self.update()


def import_deepspeed(config: ParallelConfig) -> Any:
    """DeepSpeed, imported so that it builds nothing and says nothing.

    Args:
        config: Names the device it is to use.

    Raises:
        ConfigError: A release that is not known here, or the environment names another device.
        MissingExtra: It is not installed.
    """
    name_accelerator(config)
    try:
        with _quiet():
            import deepspeed
    except ImportError as error:
        raise missing_extra("deepspeed", "deepspeed", "parallel.engine=deepspeed") from error
    if deepspeed.__version__ not in TESTED:
        rule = f"DeepSpeed {deepspeed.__version__} is installed, and {', '.join(TESTED)} is known here"
        fix = f"pip install deepspeed=={TESTED[-1]}"
        raise ConfigError(Problem("parallel.engine", "deepspeed", rule, fix))
    # On a CPU it would compile a library of its own when it starts, in half a minute and into the user's home, for
    # collectives of inference. Training uses gloo's.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It calls collectives by names that torch is about to drop, every step.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)
    return deepspeed


def bucket_numbers(parallel: ParallelConfig, numbers: int) -> int:
    """How many gradients of a model of so many numbers are reduced at once."""
    return int(parallel.zero_optimization.get("reduce_bucket_size", min(BUCKET, numbers)))


def _settings(config: Config, device: torch.device, numbers: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a model of so many numbers."""
    parallel, world_size = config.parallel, dist.get_world_size()
    stage = parallel.zero_stage or 0
    # It wants numbers that fit each other; none of them decides what is computed here.
    settings: dict[str, Any] = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        "steps_per_print": sys.maxsize,
        "zero_optimization": {"stage": stage, "sub_group_size": ONE_SUB_GROUP},
    }
    zero = settings["zero_optimization"]
    if stage:
        zero["reduce_bucket_size"] = bucket_numbers(parallel, numbers)
    if stage in (1, 2) and not parallel.offload_optimizer:
        zero["compute_grad_norm"] = False
    if stage in (1, 2):
        zero["overlap_comm"] = device.type == "cuda"
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = KEPT_WHOLE
        if len(passes(config.model, config.objective, config.model.frames)) > 1:
            # What it gathers ahead at the end of a forward, for backward, it throws away when the next forward begins.
            zero["stage3_prefetch_bucket_size"] = 0
        # It would replace torch's linear layers in the whole process, by ones that round otherwise under autocast.
        zero["memory_efficient_linear"] = False
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    zero.update(parallel.zero_optimization)
    return settings


def _flat_buffer(zero: Any, stage: int) -> Tensor:
    """This rank's fp32 numbers."""
    buffers = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    if len(buffers) != 1:
        raise RuntimeError(f"DeepSpeed cut the parameters into {len(buffers)} groups, where one was expected")
    return buffers[0]


def _pieces(
    zero: Any, stage: int, named: Sequence[tuple[str, Tensor]], shapes: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """This rank's part of every parameter, by name in the order of the model: views of the flat fp32 buffer.

    Raises:
        RuntimeError: The buffer lacks a parameter.
        ValueError: The ranks do not hold every number of one once.
    """
    flat, group = _flat_buffer(zero, stage), dist.group.WORLD
    assert group is not None
    rank, world_size = dist.get_rank(), dist.get_world_size()
    names = {id(parameter): name for name, parameter in named}
    made: dict[str, Tensor] = {}
    for parameter, ranges, offset in _layout(zero, stage, rank, world_size):
        name = names[id(parameter)]
        check_cover(name, shapes[name], ranges)
        spec = FlatRanges(shapes[name], ranges, group, rank)
        start, stop = spec.own
        made[name] = FlatPiece(flat.detach()[offset : offset + stop - start], spec)
    if made.keys() != set(names.values()):
        raise RuntimeError(f"DeepSpeed's buffer lacks {sorted(set(names.values()) - made.keys())}")
    return {name: made[name] for name, _ in named}


def _look_out(model: nn.Module, on: bool) -> None:
    """Let stage 3 gather parameters that a module reads of another one, whose own forward is not called."""
    for module in model.modules():
        module._parameters._in_forward = on  # type: ignore[attr-defined]


Placed = tuple[Tensor, tuple[tuple[int, int], ...], int]
"""A parameter, what every rank holds of it, and where this rank's numbers begin in its buffer."""


def _layout(zero: Any, stage: int, rank: int, world_size: int) -> Iterator[Placed]:
    if stage == 3:
        offset = 0
        for parameter in zero.fp16_groups[0]:
            # Each parameter is padded to equal parts.
            part = parameter.ds_tensor.ds_numel
            yield parameter, cut(0, parameter.ds_numel, part, world_size).ranges, offset
            offset += part
        return
    # All parameters one after the other, cut into equal parts.
    part, first = int(zero.partition_size[0]), 0
    for parameter in zero.round_robin_bit16_groups[0]:
        placed = cut(first, parameter.numel(), part, world_size)
        yield parameter, placed.ranges, placed.offsets[rank]
        first += parameter.numel()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep DeepSpeed's remarks out of the run's log: above all that it does not know this optimizer."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(logging.WARNING)
