"""The trainer's side of Prometheus: checks the settings, writes the rank's file, starts the node's sidecar process.

One endpoint per node, started by local rank 0; every rank writes one `RankFile` into the node's folder.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import select
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hopescale
from data_pipeline.cache import write_bytes
from data_pipeline.errors import MissingExtra, Problem, UserError
from data_pipeline.stats import SharderStats
from hopescale.addresses import source_address
from hopescale.metrics.catalog import by_key
from hopescale.metrics.data_metrics import SHARDER_STATS
from hopescale.metrics.sinks.discovery import READABLE, file_stem
from hopescale.metrics.sinks.prometheus_sidecar import require_client
from hopescale.metrics.sinks.rank_file import RankFile, read_rank_file

if TYPE_CHECKING:
    from hopescale.metrics.schema import MetricsConfig

__all__ = [
    "PortInUse",
    "PrometheusEndpoint",
    "RankFile",
    "TextfileSidecar",
    "check_endpoint",
    "check_port",
    "endpoint_path",
    "node_address",
    "rank_folder",
    "read_rank_file",
    "write_textfile",
]

logger = logging.getLogger(__name__)

_PORT_FIX = "set metrics.port to another port, to 0 for a free one, or metrics.listen=off"
_SIDECAR = "hopescale.metrics.sinks.prometheus_sidecar"


class PortInUse(UserError):
    """Another process listens on `metrics.port`."""

    def __init__(self, host: str, port: int) -> None:
        rule = f"another process on this node already listens on {host}:{port}"
        super().__init__(Problem("metrics.port", port, rule, _PORT_FIX))


def rank_folder(run_dir: Path, node: str, incarnation: int) -> Path:
    """Where the ranks of one node keep their files; a restarted job gets a new folder and shows no dead ranks."""
    return run_dir / "live" / node / f"{incarnation:06d}"


def endpoint_path(run_dir: Path, node_rank: int = 0) -> Path:
    """The file that names a node's endpoint: `metrics-endpoint.json`, with the node's number on further nodes."""
    return run_dir / ("metrics-endpoint.json" if node_rank == 0 else f"metrics-endpoint-{node_rank}.json")


def write_textfile(path: Path, stats: SharderStats) -> None:
    """Write the sharder's figures where node_exporter's textfile collector looks, all of them or the old ones.

    Args:
        path: ends in `.prom`, or the collector passes over it.
        stats: of this run so far.
    """
    lines = []
    for field, key in SHARDER_STATS.items():
        metric = by_key(key)
        lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
        lines.append(f"{metric.name} {getattr(stats, field)}")
    write_bytes(path, ("\n".join(lines) + "\n").encode(), mode=READABLE)


def node_address() -> str:
    """The address other machines reach this node at.

    Raises:
        UserError: the host name resolves to nothing but loopback and no network interface is up.
    """
    name = socket.gethostname()
    try:
        addresses = [str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    except OSError:
        addresses = []
    outside = [address for address in addresses if not address.startswith("127.") and address != "::1"]
    if outside:
        return outside[0]
    # Many machines resolve their own name to 127.0.1.1.
    try:
        return source_address("192.0.2.1", 9)
    except OSError as error:
        problem = Problem(
            "metrics.listen",
            "node",
            f"the host name {name} must resolve to an address other machines can reach",
            "repair the node's name resolution, or set metrics.listen=loopback",
        )
        raise UserError(problem) from error


def check_port(host: str, port: int) -> None:
    """Checks that the endpoint could listen, by listening for a moment. Needs no process group.

    Args:
        host: address to bind.
        port: port to bind; 0 is always free.

    Raises:
        PortInUse: another process has the port.
        UserError: this process may not use the port or the address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As the server does: connections of an earlier run in TIME_WAIT do not count as "in use".
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            raise _bind_error(host, port, error.errno, str(error)) from error


def check_endpoint(config: MetricsConfig, *, host: str | None = None) -> None:
    """Checks everything that start-up needs, all problems at once; the trainer calls it before any process group.

    Args:
        config: the `metrics` section.
        host: the node's address for `metrics.listen=node`; found out when None.

    Raises:
        PortInUse: the port is the only problem and another process has it.
        MissingExtra: prometheus_client is the only problem.
        UserError: token file missing or empty, address not usable, or several of these.
    """
    if config.listen == "off":
        return
    found: list[UserError] = []
    problem = token_problem(config)
    if problem is not None:
        found.append(UserError(problem))
    try:
        require_client()
    except MissingExtra as error:
        found.append(error)
    try:
        check_port(_listen_host(config, host), config.port)
    except UserError as error:
        found.append(error)
    if len(found) == 1:
        raise found[0]
    if found:
        raise UserError([problem for error in found for problem in error.problems])


class PrometheusEndpoint:
    """The running sidecar of this node; a context manager.

    Attributes:
        host: address it listens on.
        port: port it listens on, also when the setting was 0.
        target: both, as service discovery names them.
        url: of the metrics page.
        pid: process id of the sidecar.
    """

    def __init__(self, process: subprocess.Popen[bytes], host: str, port: int, endpoint_file: Path | None) -> None:
        self._process = process
        self._endpoint_file = endpoint_file
        self.host = host
        self.port = port
        self.target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.url = f"http://{self.target}/metrics"
        self.pid = process.pid

    @classmethod
    def start(
        cls,
        config: MetricsConfig,
        folder: Path,
        *,
        log_file: Path,
        endpoint_file: Path | None = None,
        host: str | None = None,
        timeout_seconds: float = 30.0,
    ) -> PrometheusEndpoint | None:
        """Starts the sidecar and waits until it listens. Folders of earlier incarnations are removed.

        Args:
            config: the `metrics` section.
            folder: the node's folder of rank files (`rank_folder`); created when missing.
            log_file: receives the sidecar's error output.
            endpoint_file: receives `{"host", "port", "node", "url", "pid"}` for service discovery; removed by `close`.
            host: the node's address for `metrics.listen=node`; found out when None.
            timeout_seconds: how long the sidecar may take to listen.

        Returns:
            The endpoint, or None when `metrics.listen=off`.

        Raises:
            PortInUse: another process has the port.
            UserError: see `check_endpoint`.
            RuntimeError: the sidecar did not start in time.
        """
        if config.listen == "off":
            return None
        check_endpoint(config, host=host)
        folder.mkdir(parents=True, exist_ok=True)
        _remove_earlier(folder)
        address = _listen_host(config, host)
        process = _launch(folder, address, config, log_file)
        try:
            report = _first_line(process, timeout_seconds, log_file)
            if "error" in report:
                raise _bind_error(address, config.port, report.get("errno"), report["error"])
        except BaseException:
            _stop(process)
            raise
        endpoint = cls(process, report["host"], report["port"], endpoint_file)
        endpoint._announce()
        return endpoint

    def _announce(self) -> None:
        logger.info("metrics: %s", self.url)
        if self._endpoint_file is None:
            return
        write_bytes(self._endpoint_file, self._announcement())

    def _announcement(self) -> bytes:
        told = {"host": self.host, "port": self.port, "node": socket.gethostname(), "url": self.url, "pid": self.pid}
        return (json.dumps(told) + "\n").encode()

    def close(self) -> None:
        """Ends the sidecar and withdraws the endpoint file, if it is not a later start's; may be called twice."""
        file = self._endpoint_file
        if file is not None and file.is_file() and file.read_bytes() == self._announcement():
            file.unlink(missing_ok=True)
        _stop(self._process)

    def __enter__(self) -> PrometheusEndpoint:
        """Returns the endpoint itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Closes the endpoint."""
        self.close()


class TextfileSidecar:
    """The process of a node where nothing may listen: it keeps a file that node_exporter reads; a context manager.

    Args:
        folder: the node's folder of rank files.
        textfile: folder of node_exporter's textfile collector, on this node.
        named: labels that tell this run and node from others.
        node_rank: number of the node in its run.
        run: folder of the run.
        log_file: receives the process' error output.

    Raises:
        UserError: the folder cannot be written.
        RuntimeError: the process did not start.
    """

    def __init__(
        self, folder: Path, textfile: Path, named: Mapping[str, str], node_rank: int, *, run: Path, log_file: Path
    ) -> None:
        require_client()
        _remove_earlier(folder)
        # One run has one file on a node, also after it was started again.
        self.path = textfile.absolute() / f"hopescale-{file_stem(named, run)}-{node_rank}.prom"
        command = [sys.executable, "-m", _SIDECAR, str(folder.absolute()), "--textfile", str(self.path)]
        for name, value in named.items():
            command += ["--label", f"{name}={value}"]
        self._process = _spawn(command, log_file)
        try:
            report = _first_line(self._process, 30.0, log_file)
            if "error" in report:
                fix = (
                    "name the folder that node_exporter's --collector.textfile.directory is, and let this user write it"
                )
                raise UserError(Problem("metrics.textfile", textfile, f"cannot be written ({report['error']})", fix))
        except BaseException:
            _stop(self._process)
            raise
        logger.info("metrics: %s", self.path)

    def __enter__(self) -> TextfileSidecar:
        """Returns the process' owner itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Ends the process, which takes its file away."""
        _stop(self._process)


def _listen_host(config: MetricsConfig, host: str | None) -> str:
    return "127.0.0.1" if config.listen == "loopback" else host or node_address()


def token_problem(config: MetricsConfig) -> Problem | None:
    """Why the token file will not do, or None; on loopback no token is needed but a given one is used."""
    if config.token_file is None:
        if config.listen == "loopback":
            return None
        rule = "metrics.listen=node serves the network and needs a file with a bearer token"
        return Problem("metrics.token_file", None, rule, "set metrics.token_file, or metrics.listen=loopback")
    try:
        with open(config.token_file, "rb") as file:
            token, mode = file.read().strip(), os.fstat(file.fileno()).st_mode
    except OSError as error:
        rule = f"must be a readable file ({error.strerror})"
        return Problem("metrics.token_file", config.token_file, rule, "write a random token into it, chmod 600")
    if not token:
        fix = "write a random token into it, chmod 600"
        return Problem("metrics.token_file", config.token_file, "must not be empty", fix)
    if mode & stat.S_IROTH:
        logger.warning("metrics.token_file=%s can be read by every user of this machine; chmod 600", config.token_file)
    return None


def _bind_error(host: str, port: int, number: int | None, text: str) -> UserError:
    """The error for a failed bind, by its errno."""
    if number == errno.EADDRINUSE:
        return PortInUse(host, port)
    if number == errno.EACCES:
        return UserError(Problem("metrics.port", port, "this user may not open the port", _PORT_FIX))
    rule = f"cannot listen on {host}:{port} ({text})"
    return UserError(Problem("metrics.listen", host, rule, "set metrics.listen=loopback or metrics.listen=off"))


def _launch(folder: Path, host: str, config: MetricsConfig, log_file: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", _SIDECAR, str(folder.absolute()), "--host", host, "--port", str(config.port)]
    if config.token_file is not None:
        # The path, not the token: command lines are public on a shared machine.
        command += ["--token-file", str(Path(config.token_file).absolute())]
    return _spawn(command, log_file)


def _spawn(command: list[str], log_file: Path) -> subprocess.Popen[bytes]:
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            # Makes the package importable from a source tree that is not installed, whatever folder the job is in.
            cwd=Path(str(hopescale.__file__)).parents[1],
            # Ctrl-C reaches the trainer, which closes the sidecar after its last record.
            start_new_session=True,
        )


def _first_line(process: subprocess.Popen[bytes], timeout_seconds: float, log_file: Path) -> dict[str, Any]:
    """The sidecar's report.

    Raises:
        RuntimeError: no whole line within the time, or the process ended.
    """
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    deadline = time.monotonic() + timeout_seconds
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        part = os.read(pipe, 4096) if ready else b""
        if not part:
            reason = "ended" if ready else f"said nothing for {timeout_seconds:g} s"
            raise RuntimeError(f"the metrics sidecar on {socket.gethostname()} {reason}; see {log_file}")
        line += part
    return json.loads(line)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Closes the pipe that keeps the sidecar alive; kills it when that does not help."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    try:
        process.wait(timeout=5.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _remove_earlier(folder: Path) -> None:
    """Deletes the folders of earlier incarnations on this node, never those of later ones."""
    if not folder.name.isdecimal():
        return
    for other in folder.parent.iterdir():
        if other.name.isdecimal() and int(other.name) < int(folder.name):
            shutil.rmtree(other, ignore_errors=True)
