from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from data_pipeline.shard import shard
from hopescale import doctor
from hopescale.cli import app
from hopescale.config.compose import load_config
from tests.clip_sources import memory_source


def found(*overrides: str) -> dict[str, doctor.Finding]:
    return {finding.what: finding for finding in doctor.examine(load_config(list(overrides)))}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "MASTER_")) or name.endswith("SOCKET_IFNAME"):
            monkeypatch.delenv(name)


def test_a_healthy_machine_has_no_failing_line_and_is_left_as_it_was(tmp_path: Path) -> None:
    shard(memory_source(6), tmp_path / "data", clips_per_shard=3)
    (tmp_path / "runs").mkdir()
    lines = found(f"data.path={tmp_path / 'data'}", f"run.root={tmp_path / 'runs'}")
    assert [line for line in lines.values() if line.state == "FAIL"] == []
    whats = {"python", "torch", "collectives", "gpus", "deepspeed", "interfaces", "store", "atomic rename", "fsync"}
    assert whats | {"locks", "time", "free space", "data", "slurm"} <= lines.keys()
    assert lines["data"].found.startswith("6 clips in")
    assert list((tmp_path / "runs").iterdir()) == []


def test_every_failing_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard(memory_source(6), tmp_path / "data", clips_per_shard=3)
    next((tmp_path / "data" / "shards").iterdir()).unlink()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "http")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "nothing0")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    lines = found(f"data.path={tmp_path / 'data'}", "run.root=/proc/runs", "parallel.device=cuda")
    failing = {what: line for what, line in lines.items() if line.state == "FAIL"}
    assert failing.keys() == {"torch", "gpus", "NCCL_SOCKET_IFNAME", "rendezvous", "runs", "data"}
    assert all(line.fix for line in failing.values())
    assert failing["data"].found.endswith(".tar: the shard is missing")


def test_a_place_that_nobody_listens_at_yet_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    line = found(f"run.root={tmp_path}")["rendezvous"]
    assert (line.state, line.found) == ("note", "127.0.0.1 can be reached, port 1 refuses")


@pytest.mark.parametrize(
    ("variable", "value", "state"),
    [
        ("NCCL_SOCKET_IFNAME", "l", "ok"),
        ("NCCL_SOCKET_IFNAME", "ib,lo", "ok"),
        ("NCCL_SOCKET_IFNAME", "=l", "FAIL"),
        ("NCCL_SOCKET_IFNAME", "^docker", "ok"),
        ("GLOO_SOCKET_IFNAME", "lo", "ok"),
        ("GLOO_SOCKET_IFNAME", "l", "FAIL"),
        ("GLOO_SOCKET_IFNAME", "lo,ib0", "FAIL"),
    ],
)
def test_interfaces_are_meant_as_nccl_and_gloo_take_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, state: str
) -> None:
    monkeypatch.setattr(doctor.socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    monkeypatch.setenv(variable, value)
    assert found(f"run.root={tmp_path}")[variable].state == state


def test_a_job_of_other_machines_than_planned_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert "cluster.nodes" not in found(f"run.root={tmp_path}", "cluster.nodes=2")
    line = found(f"run.root={tmp_path}", "cluster.nodes=4")["cluster.nodes"]
    assert (line.state, line.found) == ("FAIL", "4, and the job has 2")


def test_deepspeed_is_wanted_only_where_the_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = f"run.root={tmp_path}"

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert found(root)["deepspeed"].state == "note"
    missing = found(root, "parallel=deepspeed_zero2")["deepspeed"]
    assert (missing.state, missing.fix) == ("FAIL", "pip install 'hopescale[deepspeed]'")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.0")
    assert found(root, "parallel=deepspeed_zero2")["deepspeed"].fix == "pip install deepspeed==0.19.8"


def test_a_file_system_that_does_not_keep_its_promises_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = f"run.root={tmp_path}"
    monkeypatch.setattr(doctor.fcntl, "flock", lambda *_: None)
    assert found(root)["locks"].found == "two holders at once"
    now = time.time
    monkeypatch.setattr(doctor.time, "time", lambda: now() + 60)
    skewed = found(root)["time"]
    assert (skewed.state, skewed.found[:20]) == ("FAIL", "this node is +60.00 ")
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    assert found(root)["free space"].fix.startswith("make room")


def test_a_job_of_slurm_with_several_tasks_a_node_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"JOB_ID": "7", "JOB_NUM_NODES": "2", "NTASKS": "16"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    line = found(f"run.root={tmp_path}")["slurm"]
    assert (line.state, line.found) == ("note", "JOB_ID=7, JOB_NUM_NODES=2, NTASKS=16")
    assert "--ntasks-per-node=1" in line.fix


def test_the_command_prints_a_table_or_json_and_its_exit_code_tells(tmp_path: Path) -> None:
    arguments = ["doctor", f"run.root={tmp_path}"]
    table = CliRunner().invoke(app, arguments)
    assert table.exit_code == 0
    assert "atomic rename" in table.output
    failing = CliRunner().invoke(app, [*arguments, f"data.path={tmp_path}", "--json"])
    assert failing.exit_code == 1
    last = json.loads(failing.output.splitlines()[-1])
    assert last["failed"] == 1
    assert [line["what"] for line in last["findings"] if line["state"] == "FAIL"] == ["data"]
