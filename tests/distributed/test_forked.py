"""Programs that start as forks end, print and are told apart as fresh processes are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.forked import Forked, ForkServer

PROGRAM = """
import os, signal, sys, time
print("arguments", sys.argv[1:], __name__, flush=True)
print("NAME", os.environ.get("NAME"), "PATH" in os.environ, file=sys.stderr, flush=True)
print("leads", os.getpgrp() == os.getpid(), signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
end = sys.argv[1]
if end == "raise":
    raise ValueError("so")
if end == "sleep":
    time.sleep(100)
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if end == "rank":
    print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}\\n", end="", flush=True)
    sys.exit(0 if os.environ["RANK"] == "0" else time.sleep(1) or 5)
sys.exit({"text": "said so", "none": None}.get(end) if end in ("text", "none") else int(end))
"""


pytestmark = [pytest.mark.distributed, pytest.mark.requires("2ranks")]


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return str(path)


def start(server: ForkServer, folder: Path, *args: str) -> Forked:
    return Forked(server, [sys.executable, "-u", *args], {"NAME": "value"}, str(folder / "out"), str(folder / "err"))


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("0", 0, ""),
        ("7", 7, ""),
        ("none", 0, ""),
        ("text", 1, "said so"),
        ("raise", 1, "ValueError: so"),
        ("kill", -9, ""),
    ],
)
def test_a_fork_ends_as_a_fresh_process(
    fork_server: ForkServer, program: str, tmp_path: Path, end: str, code: int, said: str
) -> None:
    fresh = subprocess.run([sys.executable, program, end], capture_output=True, text=True, check=False)
    assert start(fork_server, tmp_path, program, end).wait(30) == fresh.returncode == code
    out, err = (tmp_path / "out").read_text(), (tmp_path / "err").read_text()
    assert out.startswith(f"arguments ['{end}'] __main__\n")
    assert err.startswith("NAME value False\n")
    assert said in err
    assert said in fresh.stderr
    assert "leads True True" in out or end == "kill"


def test_a_fork_that_lives_too_long_is_told_and_can_be_killed(
    fork_server: ForkServer, program: str, tmp_path: Path
) -> None:
    process = start(fork_server, tmp_path, program, "sleep")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM


def test_torchrun_starts_its_ranks_as_forks_and_ends_them_when_one_fails(
    fork_server: ForkServer, program: str, tmp_path: Path
) -> None:
    options = ["--nnodes=1", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    process = start(fork_server, tmp_path, "-m", "torch.distributed.run", *options, program, "rank")
    assert process.wait(60) == 1
    out, err = (tmp_path / "out").read_text(), (tmp_path / "err").read_text()
    assert {"rank 0 of 2", "rank 1 of 2"} <= set(out.splitlines())
    assert "exitcode  : 5" in err
    assert psutil.Process(fork_server.process.pid).children(recursive=True) == []
