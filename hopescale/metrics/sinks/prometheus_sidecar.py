"""The process that answers Prometheus for one node: `python -m hopescale.metrics.sinks.prometheus_sidecar FOLDER`.

It reads the ranks' files at each scrape and shares nothing else with them, so a stopped or killed rank stays visible
with its last numbers and a slow or hostile scraper cannot hold up a step. It prints one line of JSON when it listens
(or why it cannot) and lives until its standard input closes or its parent is gone.

Imports the standard library, prometheus_client and the catalog only; importing torch would cost seconds.
"""

from __future__ import annotations

import argparse
import hmac
import json
import math
import os
import select
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from data_pipeline.cache import write_bytes
from hopescale.metrics.catalog import CATALOG
from hopescale.metrics.metric import Metric
from hopescale.metrics.sinks.discovery import READABLE
from hopescale.metrics.sinks.rank_file import read_rank_file

if TYPE_CHECKING:
    from prometheus_client.registry import CollectorRegistry

MAX_CONNECTIONS = 8
SOCKET_TIMEOUT_SECONDS = 5.0
CONNECTION_SECONDS = 10.0
PARENT_CHECK_SECONDS = 1.0
TEXTFILE_SECONDS = 5.0

Series = dict[tuple[str, ...], float]
"""Label values, in the order of the metric's labels -> number."""


def require_client() -> None:
    """Checks that prometheus_client can be imported.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import prometheus_client  # noqa: F401
    except ImportError as error:
        from data_pipeline.errors import missing_extra

        raise missing_extra("prometheus_client", "prometheus", "metrics.listen=loopback") from error


def read_series(folder: Path) -> list[tuple[Metric, Series]]:
    """The ranks' latest numbers, by metric, in catalog order; metrics without a number are left out.

    Args:
        folder: the node's folder of rank files.
    """
    found: dict[str, Series] = {metric.key: {} for metric in CATALOG}
    labels = {metric.key: metric.labels for metric in CATALOG}
    for path in sorted(folder.glob("rank-*.bin")):
        record = read_rank_file(path)
        for key, sample_labels, value in record["samples"] if record is not None else ():
            if key in found and set(sample_labels) == set(labels[key]):
                found[key][tuple(sample_labels[name] for name in labels[key])] = value
    return [(metric, found[metric.key]) for metric in CATALOG if found[metric.key]]


def build_registry(folder: Path, named: Mapping[str, str] = MappingProxyType({})) -> CollectorRegistry:
    """A prometheus_client registry that reads the rank files whenever it is scraped.

    Args:
        folder: the node's folder of rank files.
        named: labels that every series gets, where no service discovery adds them.
    """
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector, CollectorRegistry

    class RankFileCollector(Collector):
        def collect(self) -> Iterable[Any]:
            for metric, series in read_series(folder):
                family = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                exported = family(metric.name, metric.help, labels=[*named, *metric.labels])
                for label_values, value in series.items():
                    exported.add_metric([*named.values(), *label_values], value)
                yield exported

        def describe(self) -> Iterable[Any]:
            # Nothing to describe: registering must not read files that the ranks have yet to write.
            return ()

    registry = CollectorRegistry(auto_describe=False)
    registry.register(RankFileCollector())
    return registry


class _Server(ThreadingHTTPServer):
    """At most `MAX_CONNECTIONS` at once, each cut off after `CONNECTION_SECONDS`."""

    daemon_threads = True
    # The default of 5 makes a scraper wait a second for its turn when others connect in a burst.
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], registry: CollectorRegistry, token: bytes | None) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.registry = registry
        self.token = token
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # HTTPServer.server_bind looks its own address up in DNS, which can take seconds on a node without one.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        # The socket timeout restarts with each byte; only a deadline stops a client that sends one byte a second.
        deadline = threading.Timer(CONNECTION_SECONDS, _cut_off, [request])
        deadline.daemon = True
        deadline.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            deadline.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        # A scraper that goes away is no event; anything else belongs in the log.
        if not isinstance(error, (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """GET /metrics and /healthz, nothing else."""

    timeout = SOCKET_TIMEOUT_SECONDS
    server: _Server
    server_version = "hopescale"
    sys_version = ""

    def do_GET(self) -> None:
        if not self._authorized():
            self._answer(401, b"bearer token missing or wrong\n", headers={"WWW-Authenticate": "Bearer"})
        elif self.path.partition("?")[0] == "/metrics":
            from prometheus_client.exposition import choose_encoder

            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
            self._answer(200, encode(self.server.registry), headers={"Content-Type": content_type})
        elif self.path == "/healthz":
            self._answer(200, b"ok\n")
        else:
            self._answer(404, b"try /metrics or /healthz\n")

    def _authorized(self) -> bool:
        if self.server.token is None:
            return True
        scheme, _, sent = self.headers.get("Authorization", "").partition(" ")
        # In constant time: the duration of a plain comparison tells an attacker how many bytes are right.
        # http.server decodes headers as latin-1, so this gives back the bytes that were sent.
        return scheme.lower() == "bearer" and hmac.compare_digest(sent.strip().encode("latin-1"), self.server.token)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "text/plain; charset=utf-8"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps scrapes out of the log: one line every few seconds for the life of the job says nothing."""


def _cut_off(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        # The other side closed first, which is what was wanted.
        return


def _ignore_job_signals() -> None:
    # A scheduler signals every process of a job. The sidecar serves until its rank has written its last
    # checkpoint, so only the closed pipe (or SIGKILL) ends it.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)


def _wait_for_parent(parent: int, seconds: float = math.inf) -> bool:
    """Whether the time passes before standard input closes, or the parent is gone but a fork of it holds the pipe."""
    until = time.monotonic() + seconds
    while os.getppid() == parent:
        left = until - time.monotonic()
        ready, _, _ = select.select([0], [], [], max(0.0, min(left, PARENT_CHECK_SECONDS)))
        if ready and not os.read(0, 4096):
            return False
        if left <= 0:
            return True
    return False


def _keep_textfile(path: Path, registry: CollectorRegistry, parent: int) -> int:
    """Writes the file anew every few seconds while the parent lives, and takes it away at the end."""
    from prometheus_client.exposition import generate_latest

    try:
        write_bytes(path, generate_latest(registry), mode=READABLE)
        _report(textfile=str(path))
        while _wait_for_parent(parent, TEXTFILE_SECONDS):
            try:
                write_bytes(path, generate_latest(registry), mode=READABLE)
            except OSError as error:
                # The collector reports the age of the file, and there may be room again.
                print(f"{path}: {error}", file=sys.stderr, flush=True)
    except OSError as error:
        _report(error=str(error), errno=error.errno)
        return 2
    finally:
        path.unlink(missing_ok=True)
    return 0


def _report(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Serves until the parent is done.

    Returns:
        0 after a normal life, 2 when the endpoint could not start; the reason is then on standard output.
    """
    parser = argparse.ArgumentParser(prog="prometheus_sidecar", description="Serves one node's metrics.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--textfile", type=Path, help="Keep this file instead of listening.")
    parser.add_argument("--label", action="append", default=[], help="NAME=VALUE for every series of the file.")
    parser.add_argument("--token-file", type=Path)
    options = parser.parse_args(arguments)
    parent = os.getppid()
    _ignore_job_signals()
    if options.textfile is not None:
        named = dict(text.split("=", 1) for text in options.label)
        return _keep_textfile(options.textfile, build_registry(options.folder, named), parent)
    try:
        token = options.token_file.read_bytes().strip() if options.token_file is not None else None
        server = _Server((options.host, options.port), build_registry(options.folder), token)
    except OSError as error:
        _report(error=str(error), errno=error.errno)
        return 2
    host, port = server.server_address[:2]
    threading.Thread(target=server.serve_forever, name="scrapes", daemon=True).start()
    _report(host=host, port=port)
    _wait_for_parent(parent)
    server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
