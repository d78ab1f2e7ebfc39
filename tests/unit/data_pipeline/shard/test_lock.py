from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.shard.lock import PartLock, is_lock, waiting_lock


def _held_by_another_process(folder: Path, part: str) -> int:
    """Start a process that holds a part until it is killed, and return its pid."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        PartLock(folder, part)
        os.write(write, b"x")
        signal.pause()
        os._exit(0)
    assert os.read(read, 1) == b"x"
    os.close(read)
    os.close(write)
    return pid


@pytest.mark.parametrize(
    ("held", "wanted"), [("0/1", "0/1"), ("1/4", "1/4"), ("0/1", "2/3"), ("1/2", "0/1"), ("1/2", "2/3")]
)
def test_parts_that_share_shards_exclude_each_other(tmp_path: Path, held: str, wanted: str) -> None:
    with PartLock(tmp_path, held), pytest.raises(DataError) as caught:
        PartLock(tmp_path, wanted)
    text = str(caught.value)
    assert f"process {os.getpid()} on {socket.gethostname()} is writing there (part {held})" in text
    assert not list(tmp_path.iterdir())


def test_parts_without_common_shards_work_side_by_side(tmp_path: Path) -> None:
    with PartLock(tmp_path, "0/3"), PartLock(tmp_path, "1/3"), PartLock(tmp_path, "2/3"):
        assert len(list(tmp_path.iterdir())) == 3
        assert all(is_lock(path.name) for path in tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    pid = _held_by_another_process(tmp_path, "0/2")
    try:
        for part in ("0/2", "0/1"):
            with pytest.raises(DataError, match=f"process {pid} on {socket.gethostname()} is writing"):
                PartLock(tmp_path, part)
        PartLock(tmp_path, "1/2").release()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    (left,) = tmp_path.iterdir()
    assert json.loads(left.read_text())["pid"] == pid
    with PartLock(tmp_path, "0/1"):
        assert [path.name for path in tmp_path.iterdir()] == [".sharder-0-of-1.lock"]


def test_a_worker_that_outlives_its_sharder_is_waited_for(tmp_path: Path) -> None:
    lock = PartLock(tmp_path, "0/1")
    held = os.dup(lock.fileno())
    # As after kill -9: the holder is gone, a worker has inherited the lock and needs a moment to notice.
    pid = _finished_process()
    lock.path.write_text(json.dumps({"host": socket.gethostname(), "pid": pid, "part": "0/1"}))
    os.close(lock.fileno())
    released = os.fork()
    if released == 0:
        time.sleep(0.3)
        os._exit(0)
    os.close(held)
    with PartLock(tmp_path, "0/1"):
        pass
    os.waitpid(released, 0)


def test_a_waiting_lock_is_taken_in_turn(tmp_path: Path) -> None:
    path = tmp_path / ".sharder-plan.lock"
    with waiting_lock(path):
        pid = os.fork()
        if pid == 0:
            (tmp_path / "started").touch()
            with waiting_lock(path):
                (tmp_path / "second").touch()
            os._exit(0)
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        # Longer than it takes to ask twice.
        time.sleep(0.15)
        assert not (tmp_path / "second").exists()
    os.waitpid(pid, 0)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["second", "started"]


def test_parts_that_start_at_once_beside_a_stale_lock_do_not_refuse_each_other(tmp_path: Path) -> None:
    for _ in range(10):
        (tmp_path / ".sharder-0-of-1.lock").write_text(json.dumps({"host": "gone", "pid": 1, "part": "0/1"}))
        pids = []
        for number in range(6):
            pid = os.fork()
            if pid == 0:
                try:
                    with PartLock(tmp_path, f"{number}/6"):
                        time.sleep(0.02)
                except BaseException:
                    os._exit(9)
                os._exit(0)
            pids.append(pid)
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 6
        assert [path.name for path in tmp_path.iterdir()] == [".sharder-0-of-1.lock"]


def test_looking_at_a_lock_does_not_keep_its_owner_out(tmp_path: Path) -> None:
    path = tmp_path / ".sharder-0-of-2.lock"
    path.touch()
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        released = os.fork()
        if released == 0:
            time.sleep(0.2)
            os._exit(0)
    # The other process has inherited the shared lock, and looks for a moment longer.
    with PartLock(tmp_path, "0/2"):
        pass
    os.waitpid(released, 0)


def _finished_process() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid
