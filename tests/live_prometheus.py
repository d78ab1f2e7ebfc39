"""A real Prometheus for tests: on a free port of this machine, with a folder of its own, gone when the test is."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hopescale.dashboards.prometheus_api import PrometheusApi, PrometheusError
from tests.live_server import LiveServer


class LivePrometheus(LiveServer, PrometheusApi):
    """A running server; a context manager. Requires the capability `prometheus-server`.

    Beside `query`, `query_range`, `label_values` and `get` of the API it offers `until`, which polls, and `reload`.
    Paths in the configuration (rules, file_sd) are relative to `folder`, where it lies as prometheus.yml.

    Args:
        folder: for its configuration, data and log; made if it is not there.
        config: content of prometheus.yml; see `scraping` for a short one.
        flags: further ones of its command line.

    Raises:
        RuntimeError: it ended, or was not ready in time; the message holds its log.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], *, flags: Sequence[str] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prometheus.yml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
        command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        command += ["--web.listen-address=127.0.0.1:0", "--web.enable-lifecycle", "--log.level=info", *flags]
        LiveServer.__init__(self, "Prometheus", command, folder)
        try:
            PrometheusApi.__init__(self, f"http://{self.address}")
            self.until(self._is_ready, what="it is ready")
        except BaseException:
            self.stop()
            raise

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
