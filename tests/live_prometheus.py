"""A real Prometheus for tests: on a free port of this machine, with a folder of its own, gone when the test is."""

from __future__ import annotations

import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from hopescale.dashboards.prometheus_api import PrometheusApi, PrometheusError

Found = TypeVar("Found")

_LISTENING = re.compile(r'msg="Listening on" address=(\S+)')


class LivePrometheus(PrometheusApi):
    """A running server; a context manager. Requires the capability `prometheus-server`.

    Beside `query`, `query_range`, `label_values` and `get` of the API it offers `until`, which polls, and `reload`.
    Paths in the configuration (rules, file_sd) are relative to `folder`, where it lies as prometheus.yml.

    Args:
        folder: for its configuration, data and log; made if it is not there.
        config: content of prometheus.yml; see `scraping` for a short one.
        flags: further ones of its command line.
        ready_seconds: how long it may take to answer.

    Raises:
        RuntimeError: it ended, or was not ready in time; the message holds its log.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], *, flags: Sequence[str] = (), ready_seconds: float = 60
    ) -> None:
        self.folder, self.log = folder, folder / "prometheus.log"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prometheus.yml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
        command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        # Port 0: it takes a free one and writes into its log which.
        command += ["--web.listen-address=127.0.0.1:0", "--web.enable-lifecycle", "--log.level=info", *flags]
        # A test that is killed takes it along.
        command = ["setpriv", "--pdeathsig", "KILL", *command]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            super().__init__(f"http://{self.until(self._address, within=ready_seconds, what='it listens')}")
            self.until(self._is_ready, within=ready_seconds, what="it is ready")
        except BaseException:
            self.stop()
            raise

    def until(self, ask: Callable[[], Found | None], *, within: float = 60, what: str = "that") -> Found:
        """What `ask` gives as soon as it gives something true.

        Args:
            ask: called again and again.
            within: seconds.
            what: is waited for, for the message.

        Raises:
            RuntimeError: nothing in time, or the server ended; the message holds the end of its log.
        """
        deadline = time.monotonic() + within
        while True:
            ended = self._process.poll()
            found = None if ended is not None else ask()
            if found:
                return found
            if ended is not None or time.monotonic() > deadline:
                state = f"Prometheus ended with code {ended}" if ended is not None else f"not within {within} s"
                raise RuntimeError(f"waiting until {what}: {state}\n{self.log.read_text()[-3000:]}")
            time.sleep(0.1)

    def configure(self, config: Mapping[str, Any]) -> None:
        """Replace its configuration.

        Raises:
            RuntimeError: it refuses that; the message says why.
        """
        (self.folder / "prometheus.yml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
        self.reload()

    def reload(self) -> None:
        """Make it read its configuration and rules again.

        Raises:
            RuntimeError: there is a mistake in them; the message says which.
        """
        try:
            urllib.request.urlopen(urllib.request.Request(f"{self.url}/-/reload", method="POST"), timeout=30).close()
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from error

    def stop(self) -> None:
        """End it; its folder stays. May be called twice."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> LivePrometheus:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _address(self) -> str | None:
        found = _LISTENING.search(self.log.read_text())
        return found.group(1) if found else None

    def _is_ready(self) -> bool:
        try:
            # Refused while it still reads its files.
            self.query("vector(1)")
        except PrometheusError:
            return False
        return True


def scraping(targets: Mapping[str, Mapping[str, str]], interval: str = "1s") -> dict[str, Any]:
    """A configuration that scrapes addresses as the job `hopescale`, each with the labels of its target.

    Args:
        targets: by `host:port`, the labels that service discovery would give.
        interval: between scrapes and between evaluations of rules.
    """
    static = [{"targets": [address], "labels": dict(labels)} for address, labels in targets.items()]
    return {
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
        "scrape_configs": [{"job_name": "hopescale", "static_configs": static}],
    }
