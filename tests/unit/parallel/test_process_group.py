"""What a launcher says of ranks; ending a process in which a process group lived."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hopescale.errors import ConfigError
from hopescale.parallel.process_group import Launch, read_launch, read_place
from hopescale.train import exit_code

PROGRAM = """
import atexit, sys
from hopescale.parallel.process_group import end_process

class Witness:
    def __del__(self):
        sys.stderr.write("finalized")

witness = Witness()
atexit.register(print, "exit handler ran")
sys.stdout.write("buffered, ")
end_process(75)
"""


def test_a_process_ends_with_its_code_and_its_exit_handlers_but_is_never_finalized() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert ended.returncode == 75
    assert ended.stdout == "buffered, exit handler ran\n"
    assert ended.stderr == ""


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Rank 1 of 2 on one node."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("MASTER_ADDR", "node-1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    return monkeypatch


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "2"), ("LOCAL_RANK", "2"), ("WORLD_SIZE", ""), ("RANK", "-1"), ("LOCAL_RANK", "²")]
)
def test_variables_of_a_launcher_that_make_no_rank_are_named(
    launched: pytest.MonkeyPatch, name: str, value: str
) -> None:
    assert read_launch().rank == 1
    launched.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        read_launch()


def test_a_launcher_that_starts_crashed_ranks_anew_takes_an_end_in_order_for_none(launched: pytest.MonkeyPatch) -> None:
    assert [exit_code(code, read_launch()) for code in (0, 2, 75)] == [0, 2, 75]
    launched.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert exit_code(75, read_launch()) == 75
    launched.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    assert [exit_code(code, read_launch()) for code in (0, 2, 75)] == [0, 0, 0]


@pytest.mark.parametrize(("name", "launcher"), [("SLURM_STEP_NUM_TASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun")])
def test_processes_that_are_told_no_rank_do_not_each_train_alone(
    monkeypatch: pytest.MonkeyPatch, name: str, launcher: str
) -> None:
    monkeypatch.setenv(name, "1")
    assert read_launch() == Launch()
    monkeypatch.setenv(name, "16")
    with pytest.raises(ConfigError, match=f"{name}=16: {launcher} has started .* Fix: .*{launcher} torchrun"):
        read_launch()


def test_restarts_of_several_nodes_around_one_store_are_refused(launched: pytest.MonkeyPatch) -> None:
    launched.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    launched.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    launched.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    launched.setenv("GROUP_WORLD_SIZE", "1")
    assert read_place() == ("node-1", "29500", True, "1")
    launched.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"SHARE_RDZV_TCP_STORE=.*must be 1 .* 2 nodes .*max-restarts 3"):
        read_place()
    # Agents count restarts each for itself, and a store of one round knows of no other.
    launched.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert read_place() == ("node-1", "29500", False, "0")
