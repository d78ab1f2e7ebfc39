"""Puts the recorder of one rank together: which sinks, which file, and the node's endpoint."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from hopescale.diagnostics import labels
from hopescale.metrics.recorder import Recorder
from hopescale.metrics.sinks.base import Sink
from hopescale.metrics.sinks.console import ConsoleSink
from hopescale.metrics.sinks.discovery import DiscoveryEntry
from hopescale.metrics.sinks.discovery import labels as target_labels
from hopescale.metrics.sinks.jsonl import JsonlSink
from hopescale.metrics.sinks.prometheus import (
    PrometheusEndpoint,
    RankFile,
    TextfileSidecar,
    endpoint_path,
    rank_folder,
)
from hopescale.metrics.sinks.tensorboard import TensorboardSink
from hopescale.slurm.environment import read_job

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
    if config.metrics.listen != "off" or config.metrics.textfile is not None:
        folder = rank_folder(run.path, socket.gethostname(), attempt.incarnation)
        folder.mkdir(parents=True, exist_ok=True)
        if launch.local_rank == 0:
            _serve_node(config, attempt, launch, folder, stack)
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


def _serve_node(config: Config, attempt: Attempt, launch: Launch, folder: Path, stack: ExitStack) -> None:
    """Show this node's numbers to Prometheus: by an endpoint, named to its service discovery, or by a text file."""
    run, node_rank, job = attempt.run, launch.rank // launch.local_world_size, read_job()
    named = target_labels(config.cluster.name, run.path, socket.gethostname(), None if job is None else job.id)
    log_file = run.logs / f"metrics-endpoint-{node_rank}.log"
    if config.metrics.textfile is not None:
        textfile = Path(config.metrics.textfile)
        stack.enter_context(TextfileSidecar(folder, textfile, named, node_rank, run=run.path, log_file=log_file))
        return
    announced = endpoint_path(run.path, node_rank)
    endpoint = PrometheusEndpoint.start(config.metrics, folder, log_file=log_file, endpoint_file=announced)
    assert endpoint is not None
    stack.enter_context(endpoint)
    if config.metrics.discovery is not None:
        stack.enter_context(
            DiscoveryEntry(
                Path(config.metrics.discovery),
                endpoint.target,
                named,
                run=run.path,
                incarnation=attempt.incarnation,
                node_rank=node_rank,
            )
        )


def _sinks(config: Config, run: RunFolder, start_step: int) -> list[Sink]:
    jsonl = JsonlSink(run.metrics)
    jsonl.truncate_after(start_step)
    sinks: list[Sink] = [ConsoleSink(config.train.steps, start_step=start_step), jsonl]
    if config.metrics.tensorboard:
        sinks.append(TensorboardSink(run.tensorboard, start_step=start_step))
    return sinks
