"""Puts the recorder of one rank together: which sinks, which file, and the node's endpoint."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from hopescale.metrics.recorder import Recorder
from hopescale.metrics.sinks.base import Sink
from hopescale.metrics.sinks.console import ConsoleSink
from hopescale.metrics.sinks.jsonl import JsonlSink
from hopescale.metrics.sinks.prometheus import PrometheusEndpoint, RankFile, endpoint_path, rank_folder
from hopescale.metrics.sinks.tensorboard import TensorboardSink

if TYPE_CHECKING:
    from hopescale.config.schema import Config
    from hopescale.parallel.process_group import Launch
    from hopescale.run_folder import RunFolder


def open_recorder(
    config: Config,
    run: RunFolder,
    launch: Launch,
    groups: Sequence[str],
    info: dict[str, str],
    start_step: int,
    device: torch.device,
) -> tuple[Recorder, AbstractContextManager[object]]:
    """The recorder of this rank, and the node's endpoint on the rank that serves it.

    Args:
        config: of the run.
        run: its folder; records after `start_step` in metrics.jsonl are of a lost incarnation and are cut off.
        launch: which rank this is.
        groups: names of the optimizer's groups.
        info: labels of `hopescale_run_info`.
        start_step: step the run goes on from.
        device: of the figures that are added up.

    Returns:
        The recorder, and a context that keeps the endpoint alive (does nothing on other ranks).
    """
    rank_file, endpoint = None, None
    if config.metrics.listen != "off":
        node_rank = launch.rank // launch.local_world_size
        folder = rank_folder(run.path, socket.gethostname(), int(info["incarnation"]))
        if launch.local_rank == 0:
            endpoint = PrometheusEndpoint.start(
                config.metrics,
                folder,
                log_file=run.logs / f"metrics-endpoint-{node_rank}.log",
                endpoint_file=endpoint_path(run.path, node_rank),
            )
        folder.mkdir(parents=True, exist_ok=True)
        rank_file = RankFile(folder, launch.rank)
    recorder = Recorder(
        _sinks(config, run, start_step) if launch.is_first else [],
        rank=launch.rank,
        world_size=launch.world_size,
        all_reduce=dist.all_reduce,
        rank_file=rank_file,
        groups=groups,
        device=device,
    )
    recorder.set("run_info", 1, **info)
    return recorder, endpoint or nullcontext()


def _sinks(config: Config, run: RunFolder, start_step: int) -> list[Sink]:
    jsonl = JsonlSink(run.metrics)
    jsonl.truncate_after(start_step)
    sinks: list[Sink] = [ConsoleSink(config.train.steps, start_step=start_step), jsonl]
    if config.metrics.tensorboard:
        sinks.append(TensorboardSink(run.tensorboard, start_step=start_step))
    return sinks
