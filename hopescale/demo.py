"""The main job from nothing: simulate, encode, shard, train on two ranks, evaluate, report.

Every stage is what its own command does. Pixels, features and shards are kept under names derived from their
content and made once; training, evaluation and report always run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.cache import cached_folder, content_key, write_json
from data_pipeline.encode.run import FEATURES_FILE, encode, features_key_parts
from data_pipeline.pixels.simulate import PIXELS_FILE, SIMULATOR_VERSION, SimulationSpec, simulate
from data_pipeline.shard.run import shard, shards_key_parts
from hopescale.config.compose import load_config
from hopescale.config.schema import Config
from hopescale.errors import ConfigError, Problem, UserError
from hopescale.evaluate_run import evaluate_run
from hopescale.metrics.sinks.prometheus import check_endpoint
from hopescale.parallel.process_group import Launch
from hopescale.preflight import preflight
from hopescale.report.page import write_report
from hopescale.report.style import require_matplotlib
from hopescale.report.tables import print_result
from hopescale.run_folder import RunFolder, make_run_folder

Bar = Callable[[str], Callable[[int, int], None]]

SMOKE = SimulationSpec(num_train=12, num_heldout=4)
SMOKE_STEPS = 20


class TrainingFailed(UserError):
    """The training ranks ended with an exit code of their own."""

    def __init__(self, run: Path, code: int) -> None:
        super().__init__(
            Problem("run.dir", run, f"training ended with exit code {code}", f"read {run / 'logs'} and the lines above")
        )
        self.exit_code = code


def run_demo(overrides: Sequence[str], bar: Bar) -> dict[str, Any]:
    """Run the whole path and return what result.json holds.

    Args:
        overrides: settings on top of experiment=demo.
        bar: makes a progress display for a named stage.

    Raises:
        UserError: bad settings, before anything is made; or a stage that cannot go on.
    """
    settings = _settings(overrides)
    config = load_config(settings)
    check_endpoint(config.metrics)
    require_matplotlib()
    seconds: dict[str, float] = {}
    cached: list[str] = []
    began = time.monotonic()
    pixels, data = make_data(config, bar, seconds, cached)

    path = make_run_folder(config).absolute()
    settings = [*settings, f"data.path={data.absolute()}", f"run.dir={path}"]
    preflight(load_config(settings), Launch(world_size=config.demo.ranks))
    with _timed(seconds, "train"):
        train_ranks(path, config.demo.ranks, settings)
    with _timed(seconds, "eval"):
        result = evaluate_run(path, [], pixels)
    result["run"]["command"] = " ".join(["hopescale", "demo", *overrides])
    result["seconds"] = seconds
    result["cached"] = cached
    run = RunFolder(path)
    write_json(run.result, result)
    with _timed(seconds, "report"):
        page = write_report(path)
    seconds["total"] = round(time.monotonic() - began, 2)
    result["paths"] |= {"report": str(page), "result": str(run.result), "pixels": str(pixels)}
    write_json(run.result, result)
    print_result(result)
    print(f"report: {page}")
    return result


def make_data(config: Config, bar: Bar, seconds: dict[str, float], cached: list[str]) -> tuple[Path, Path]:
    """Pixels, features and shards of the demo, made where they are not there yet.

    Args:
        config: its `demo` section is used.
        bar: makes a progress display for a named stage.
        seconds: filled with the time of each stage.
        cached: filled with the names of stages that were there already.

    Returns:
        Folders of the pixels and of the data set.
    """
    spec = SMOKE if config.demo.preset == "smoke" else SimulationSpec()
    return make_clips(spec, Path(config.demo.cache), config.demo.preset, bar, seconds, cached)


def make_clips(
    spec: SimulationSpec, root: Path, name: str, bar: Bar, seconds: dict[str, float], cached: list[str]
) -> tuple[Path, Path]:
    """Pixels, features and shards of simulated clips, made where they are not there yet.

    Args:
        spec: what to simulate.
        root: folder of all cached results.
        name: of the link beside them that names the data set, whatever its content.
        bar: makes a progress display for a named stage.
        seconds: filled with the time of each stage.
        cached: filled with the names of stages that were there already.

    Returns:
        Folders of the pixels and of the data set.
    """

    def stage(name: str, key: str, build: Callable[[Path], object]) -> Path:
        with _timed(seconds, name):
            folder, found = cached_folder(root, name, key, build)
        if found:
            cached.append(name)
        return folder

    pixels = stage(
        "simulate", content_key("pixels", SIMULATOR_VERSION, spec), lambda out: simulate(spec, out, bar("simulate"))
    )
    features = stage(
        "encode",
        content_key(*features_key_parts(_digest(pixels / PIXELS_FILE))),
        lambda out: encode(pixels, out, progress=bar("encode")),
    )
    shards = stage(
        "shard",
        content_key(*shards_key_parts(_digest(features / FEATURES_FILE))),
        lambda out: shard(features, out, progress=bar("shard")),
    )
    return pixels, _name_link(root / name, shards)


def _name_link(link: Path, folder: Path) -> Path:
    """Give a cached folder a name that stays when its content changes; `experiment=demo` trains on that name."""
    part = link.with_name(f".{link.name}-{os.getpid()}")
    part.symlink_to(folder.name)
    part.rename(link)
    return link


def _digest(document: Path) -> str:
    return json.loads(document.read_text())["digest"]


def _settings(overrides: Sequence[str]) -> list[str]:
    given = {text.partition("=")[0] for text in overrides}
    for name in ("experiment", "data.path", "run.dir"):
        if name in given:
            raise ConfigError(
                Problem(name, "given", "the demo sets this itself", "leave it out, or use `hopescale train`")
            )
    smoke = "demo.preset=smoke" in overrides and "train.steps" not in given
    return ["experiment=demo", *overrides, *([f"train.steps={SMOKE_STEPS}"] if smoke else [])]


def train_ranks(path: Path, ranks: int, settings: Sequence[str]) -> None:
    """Train on ranks of this machine, and wait for them.

    Args:
        path: run folder that the settings name.
        ranks: processes to start.
        settings: `group=file` and `section.field=value`.

    Raises:
        TrainingFailed: the run did not finish.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "hopescale.train", *settings]
    ended = subprocess.run(command, check=False)
    status = RunFolder(path).read_status()
    if status.get("state") != "finished":
        # A run that could not say how it ended has crashed.
        raise TrainingFailed(path, status.get("code") or ended.returncode or 1)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - began, 2)
