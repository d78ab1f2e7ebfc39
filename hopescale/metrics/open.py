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


def serve_node(config: Config, attempt: Attempt, launch: Launch, stack: ExitStack) -> DiscoveryEntry | None:
    """Show a node's numbers to Prometheus: by an endpoint, named to its service discovery, or by a text file.

    It comes before whatever may take long or never end, so that a start of which nothing comes is noticed.

    Args:
        config: of the run.
        attempt: this incarnation and its run folder.
        launch: which rank this is; the first of each node serves it.
        stack: closes what is opened here.

    Returns:
        The node's entry in service discovery, to be told when the run begins; None without one.

    Raises:
        UserError: the endpoint's port, token or extra.
        OSError: the run folder cannot be written.
    """
    folder = _rank_folder(config, attempt)
    if folder is None or launch.local_rank != 0:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    run, node_rank, job = attempt.run, launch.rank // launch.local_world_size, read_job()
    named = target_labels(config.cluster.name, run.path, socket.gethostname(), None if job is None else job.id)
    log_file = run.logs / f"metrics-endpoint-{node_rank}.log"
    if config.metrics.textfile is not None:
        textfile = Path(config.metrics.textfile)
        stack.enter_context(TextfileSidecar(folder, textfile, named, node_rank, run=run.path, log_file=log_file))
        return None
    announced = endpoint_path(run.path, node_rank)
    endpoint = PrometheusEndpoint.start(config.metrics, folder, log_file=log_file, endpoint_file=announced)
    assert endpoint is not None
    stack.enter_context(endpoint)
    if config.metrics.discovery is None:
        return None
    entries, start = Path(config.metrics.discovery), attempt.incarnation
    entry = DiscoveryEntry(entries, endpoint.target, named, run=run.path, incarnation=start, node_rank=node_rank)
    return stack.enter_context(entry)


def open_recorder(
    config: Config,
    attempt: Attempt,
    launch: Launch,
    groups: Sequence[str],
    start_step: int,
    device: torch.device,
    stack: ExitStack,
) -> Recorder:
    """The recorder of this rank, whose numbers `serve_node` shows.

    Args:
        config: of the run.
        attempt: this incarnation and its run folder.
        launch: which rank this is.
        groups: names of the optimizer's groups.
        start_step: step the run goes on from; records after it in metrics.jsonl are of a lost incarnation and are cut.
        device: of the figures that are added up.
        stack: closes what is opened here.

    Raises:
        OSError: the run folder cannot be written.
    """
    folder, rank_file = _rank_folder(config, attempt), None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        rank_file = RankFile(folder, launch.rank)
    recorder = Recorder(
        _sinks(config, attempt.run, start_step) if launch.is_first else [],
        rank=launch.rank,
        world_size=launch.world_size,
        all_reduce=dist.all_reduce,
        rank_file=rank_file,
        labels={"group": groups, **labels(config.model)},
        device=device,
    )
    stack.enter_context(closing(recorder))
    return recorder


def _rank_folder(config: Config, attempt: Attempt) -> Path | None:
    """Where ranks of this node leave their numbers; None where nobody asks for them."""
    if config.metrics.listen == "off" and config.metrics.textfile is None:
        return None
    return rank_folder(attempt.run.path, socket.gethostname(), attempt.incarnation)


def _sinks(config: Config, run: RunFolder, start_step: int) -> list[Sink]:
    jsonl = JsonlSink(run.metrics)
    jsonl.truncate_after(start_step)
    sinks: list[Sink] = [ConsoleSink(config.train.steps, start_step=start_step), jsonl]
    if config.metrics.tensorboard:
        sinks.append(TensorboardSink(run.tensorboard, start_step=start_step))
    return sinks
