"""Puts the recorder of one rank together: which sinks, which file, and the node's endpoint."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack, closing, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from hopescale.diagnostics import labels
from hopescale.metrics.recorder import Recorder
from hopescale.metrics.sinks.base import Sink
from hopescale.metrics.sinks.console import ConsoleSink
from hopescale.metrics.sinks.jsonl import JsonlSink
from hopescale.metrics.sinks.prometheus import PrometheusEndpoint, RankFile, endpoint_path, rank_folder
from hopescale.metrics.sinks.tensorboard import TensorboardSink

if TYPE_CHECKING:
    from hopescale.config.schema import Config
    from hopescale.parallel.process_group import Launch
    from hopescale.run_folder import Attempt, RunFolder


def open_recorder(
    config: Config,
    attempt: Attempt,
    launch: Launch,
    groups: Sequence[str],
    start_step: int,
    device: torch.device,
    stack: ExitStack,
) -> Recorder:
    """The recorder of this rank; the node's endpoint lives beside it where this rank serves it.

    Args:
        config: of the run.
        attempt: this incarnation and its run folder.
        launch: which rank this is.
        groups: names of the optimizer's groups.
        start_step: step the run goes on from; records after it in metrics.jsonl are of a lost incarnation and are cut.
        device: of the figures that are added up.
        stack: closes what is opened here, the recorder before the endpoint.

    Raises:
        UserError: the endpoint's port, token or extra.
        OSError: the run folder cannot be written.
    """
    run, rank_file = attempt.run, None
    if config.metrics.listen != "off":
        node_rank = launch.rank // launch.local_world_size
        folder = rank_folder(run.path, socket.gethostname(), attempt.incarnation)
        folder.mkdir(parents=True, exist_ok=True)
        if launch.local_rank == 0:
            log_file = run.logs / f"metrics-endpoint-{node_rank}.log"
            announced = endpoint_path(run.path, node_rank)
            endpoint = PrometheusEndpoint.start(config.metrics, folder, log_file=log_file, endpoint_file=announced)
            stack.enter_context(endpoint or nullcontext())
        rank_file = RankFile(folder, launch.rank)
    recorder = Recorder(
        _sinks(config, run, start_step) if launch.is_first else [],
        rank=launch.rank,
        world_size=launch.world_size,
        all_reduce=dist.all_reduce,
        rank_file=rank_file,
        labels={"group": groups, **labels(config.model)},
        device=device,
    )
    stack.enter_context(closing(recorder))
    return recorder


def _sinks(config: Config, run: RunFolder, start_step: int) -> list[Sink]:
    jsonl = JsonlSink(run.metrics)
    jsonl.truncate_after(start_step)
    sinks: list[Sink] = [ConsoleSink(config.train.steps, start_step=start_step), jsonl]
    if config.metrics.tensorboard:
        sinks.append(TensorboardSink(run.tensorboard, start_step=start_step))
    return sinks
