"""DeepSpeed as its users start it, and on machines where it could build nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hopescale.errors import ConfigError, MissingExtra
from hopescale.parallel.deepspeed import import_deepspeed
from hopescale.parallel.schema import ParallelConfig

pytestmark = [pytest.mark.distributed, pytest.mark.requires("2ranks", "deepspeed")]


def started(data: Path, run: Path, port: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The launcher of DeepSpeed, on two ranks of this machine."""
    launcher = str(Path(sys.executable).parent / "deepspeed")
    command = [launcher, "--num_gpus", "2", "--master_port", str(port), *arguments]
    settings = ["train.steps=2", "train.global_batch=3", "metrics.port=0", "metrics.tensorboard=false"]
    where = [f"data.path={data}", f"run.dir={run}"]
    command += ["experiment=demo", "parallel=deepspeed_zero2", *settings, *where]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


def test_its_own_launcher_starts_a_run(demo_shaped_data: Path, tmp_path: Path, free_port: int) -> None:
    arguments = ("--no_local_rank", "--module", "hopescale.train")
    ended = started(demo_shaped_data, tmp_path / "run", free_port, *arguments)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "finished at step 2 of 2" in ended.stderr
    assert "untested optimizer" not in ended.stdout + ended.stderr
    assert "is deprecated" not in ended.stdout + ended.stderr


def test_the_flag_it_adds_is_named(demo_shaped_data: Path, tmp_path: Path, free_port: int) -> None:
    ended = started(demo_shaped_data, tmp_path / "run", free_port, "--module", "hopescale.train")
    assert ended.returncode != 0
    assert "error: --local_rank=0" in ended.stdout + ended.stderr
    assert "Fix: start with `deepspeed --no_local_rank" in ended.stdout + ended.stderr


@pytest.mark.parametrize("where", ["no cached extensions", "no compiler", "a home that cannot be written"])
def test_it_starts_where_it_can_build_nothing(train, tmp_path: Path, where: str) -> None:
    extensions, false = tmp_path / "extensions", "/bin/false"
    environments: Mapping[str, dict[str, str]] = {
        "no cached extensions": {"TORCH_EXTENSIONS_DIR": str(extensions)},
        "no compiler": {"CC": false, "CXX": false, "TORCH_EXTENSIONS_DIR": str(extensions)},
        # Not even root can make files there.
        "a home that cannot be written": {"HOME": "/proc/self"},
    }
    batch = ("train.global_batch=2", "train.steps=1", "checkpoint.every=0")
    run = train(1, "run", "parallel=deepspeed_zero2", *batch, env=environments[where])
    assert run.code == 0, run.output
    assert not extensions.exists()


def test_one_process_needs_no_launcher(demo_shaped_data: Path, tmp_path: Path) -> None:
    settings = ["experiment=demo", "parallel=deepspeed_zero3", "train.steps=1", "train.global_batch=2"]
    settings += ["metrics.port=0", "metrics.tensorboard=false", f"data.path={demo_shaped_data}"]
    command = [sys.executable, "-m", "hopescale.train", *settings, f"run.dir={tmp_path / 'run'}"]
    without = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=without)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_an_unknown_release_is_refused_and_a_missing_one_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ParallelConfig(device="cpu")
    deepspeed: Any = import_deepspeed(config)
    with monkeypatch.context() as patch:
        patch.setattr(deepspeed, "__version__", "0.99.0")
        with pytest.raises(ConfigError, match=r"DeepSpeed 0\.99\.0 is installed, and 0\.19\.8 is known here"):
            import_deepspeed(config)
    with monkeypatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cuda")
        with pytest.raises(ConfigError, match="DS_ACCELERATOR=cuda: DeepSpeed would use cuda"):
            import_deepspeed(config)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "deepspeed", None)
        with pytest.raises(MissingExtra, match=r"pip install 'hopescale\[deepspeed\]'"):
            import_deepspeed(config)
