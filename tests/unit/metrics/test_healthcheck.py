from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from hopescale.metrics.healthcheck import CLOCK_SLACK_SECONDS, announced, container_start, main
from hopescale.metrics.schema import MetricsConfig
from hopescale.metrics.sinks.prometheus import PrometheusEndpoint, endpoint_path
from tests.user_process import REPO_ROOT

HERE = socket.gethostname()


@contextmanager
def serving(run: Path, node_rank: int = 0, **settings) -> Iterator[PrometheusEndpoint]:
    """An endpoint as a trainer starts it; `main` looks at announcements of this container's life only, as these are."""
    run.mkdir(parents=True, exist_ok=True)
    file = endpoint_path(run, node_rank)
    config = MetricsConfig(port=0, **settings)
    endpoint = PrometheusEndpoint.start(
        config, run / "live", log_file=run / "sidecar.log", endpoint_file=file, host="127.0.0.1"
    )
    assert endpoint is not None
    with endpoint:
        yield endpoint


def announce(run: Path, port: int, node: str = HERE) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    file = endpoint_path(run)
    file.write_text(json.dumps({"host": "127.0.0.1", "port": port, "node": node, "url": ""}))
    return file


@pytest.fixture
def another_server() -> Iterator[int]:
    """Port of a server that is not ours and says yes to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args) -> None:
            del format, args

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_a_folder_without_announcements_is_healthy(tmp_path: Path, capsys) -> None:
    (tmp_path / "data" / "demo").mkdir(parents=True)
    assert main([str(tmp_path)]) == 0
    assert main([str(tmp_path / "absent")]) == 0
    assert capsys.readouterr().out == 2 * "healthy: nothing here has announced metrics\n"


@pytest.mark.requires("prometheus")
@pytest.mark.parametrize("place", [".", "mine", "runs/mine"])
def test_a_trainer_is_healthy_while_its_endpoint_answers(tmp_path: Path, capsys, place: str) -> None:
    with serving(tmp_path / place, node_rank=3) as endpoint:
        assert main([str(tmp_path)]) == 0
        assert f"healthy: http://127.0.0.1:{endpoint.port}/healthz of {tmp_path / place}\n" in capsys.readouterr().out
        os.kill(endpoint.pid, signal.SIGKILL)
        os.waitid(os.P_PID, endpoint.pid, os.WEXITED | os.WNOWAIT)
        assert main([str(tmp_path)]) == 1
        assert "does not answer (ConnectionRefusedError" in capsys.readouterr().out
    assert main([str(tmp_path)]) == 0


@pytest.mark.requires("prometheus")
def test_an_endpoint_that_asks_for_a_token_is_alive(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    with serving(tmp_path / "mine", listen="node", token_file=str(tmp_path / "token")):
        assert main([str(tmp_path)]) == 0


@pytest.mark.requires("prometheus")
def test_one_silent_endpoint_among_several_is_enough(tmp_path: Path, capsys, free_port: int) -> None:
    announce(tmp_path / "silent", free_port)
    with serving(tmp_path / "well"):
        assert main([str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert f"unhealthy: http://127.0.0.1:{free_port}/healthz of {tmp_path / 'silent'} does not answer" in said
    assert f"healthz of {tmp_path / 'well'}\n" in said


def test_another_server_on_the_port_is_told_apart(tmp_path: Path, capsys, another_server: int) -> None:
    announce(tmp_path / "mine", another_server)
    assert main([str(tmp_path)]) == 1
    assert "is answered by another server (BaseHTTP" in capsys.readouterr().out


def test_announcements_of_other_containers_and_of_an_earlier_life_do_not_count(tmp_path: Path) -> None:
    announce(tmp_path / "theirs", 1, node=f"not-{HERE}")
    mine = announce(tmp_path / "mine", 1)
    assert [endpoint.file for endpoint in announced(tmp_path, HERE, since=mine.stat().st_mtime)] == [mine]
    start = container_start()
    before = start - CLOCK_SLACK_SECONDS - 1
    os.utime(mine, (before, before))
    assert list(announced(tmp_path, HERE, since=start)) == []


def test_a_file_that_is_no_announcement_is_named(tmp_path: Path, capsys) -> None:
    file = announce(tmp_path / "mine", 1)
    for text in ("", "[]", "{}", json.dumps({"node": HERE, "host": "127.0.0.1", "port": "x"})):
        file.write_text(text)
        assert main([str(tmp_path)]) == 1
        assert f"{file} is no announcement of an endpoint" in capsys.readouterr().out


def test_the_container_starts_with_process_1() -> None:
    assert abs(container_start() - psutil.Process(1).create_time()) <= CLOCK_SLACK_SECONDS


def test_it_imports_nothing_but_the_standard_library() -> None:
    # -S: without site-packages, so that an import of anything else fails.
    code = f"import sys; sys.path.append({str(REPO_ROOT)!r}); import hopescale.metrics.healthcheck"
    ended = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
