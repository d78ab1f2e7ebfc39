from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from hopescale.resilience import preemption
from hopescale.resilience.preemption import Stop, StopRequests


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_asks_to_stop_and_ends_nothing(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequests(tmp_path) as requests:
        assert requests.stop is Stop.NO
        os.kill(os.getpid(), number)
        assert requests.stop is Stop.SIGNAL
        requests.granted(stop=True)
        assert requests.stop is Stop.SIGNAL
    assert signal.getsignal(number) is before


def test_a_second_interrupt_ends_the_process() -> None:
    with StopRequests(None) as requests:
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.stop is Stop.SIGNAL
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_file_asks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "POLL_SECONDS", 0.0)
    requests = StopRequests(tmp_path)
    assert (requests.stop, requests.save) == (Stop.NO, False)
    (tmp_path / "stop").touch()
    (tmp_path / "save").touch()
    assert (requests.stop, requests.save) == (Stop.FILE, True)
    requests.granted(save=True)
    assert (requests.stop, requests.save) == (Stop.FILE, False)
    requests.granted(stop=True)
    assert requests.stop is Stop.NO
    assert not list(tmp_path.iterdir())


def test_files_are_looked_for_at_most_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: clock[0])
    requests = StopRequests(tmp_path)
    assert requests.stop is Stop.NO
    (tmp_path / "stop").touch()
    assert requests.stop is Stop.NO
    clock[0] += 1.0
    assert requests.stop is Stop.FILE


def test_ranks_without_a_folder_see_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stop").touch()
    assert StopRequests(None).stop is Stop.NO


def test_the_time_left_is_that_of_the_job() -> None:
    assert StopRequests(None).seconds_left == float("inf")
    assert 0 < StopRequests(None, time.time() + 100).seconds_left <= 100
