"""A site as `ops/` describes it, in small: the committed configuration and rules, seconds in place of hours."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from tests.live_alertmanager import LiveAlertmanager, Message, WebhookReceiver
from tests.live_prometheus import LivePrometheus
from tests.user_process import REPO_ROOT

OPS = REPO_ROOT / "ops"
RUNBOOKS = "https://runbooks.example.org/here"

SECONDS = {
    "runbooks": RUNBOOKS,
    "evaluate": "1s",
    "memory": "5m",
    "stall_least": "8s",
    "stall_most": "30s",
    "stall_for": "1s",
    "start_for": "15s",
    "exporter_for": "3s",
    "rank_for": "5s",
    "loss_recent": "3s",
    "loss_usual": "1m",
    "loss_for": "1s",
    "nonfinite_within": "8s",
    "data_wait_ratio": 0.5,
    "data_wait_over": "10s",
    "data_wait_for": "2s",
    "goodput_ratio": 0.5,
    "goodput_over": "16s",
    "goodput_least": "6s",
    "goodput_for": "1s",
    "checkpoint_factor": 2,
    "checkpoint_usual": "5m",
    "checkpoint_least": "8s",
    "checkpoint_most": "30s",
    "checkpoint_for": "1s",
    "checkpoint_failed_within": "8s",
    "disk_least_bytes": 16 << 20,
    "disk_full_in": "1s",
    "disk_trend": "30s",
    "disk_trend_from": "1m",
    "disk_for": "1s",
}
"""What differs from `ops/prometheus/settings.yml`. Starts, stalls and checkpoints leave room for a busy machine."""


class Site:
    """Prometheus, Alertmanager and a webhook receiver; a context manager.

    Attributes:
        discovery: folder of entries; see `ops/prometheus/prometheus.yml`.
        token_file: what exporters are to ask for.
        webhook: what was sent.
    """

    def __init__(self, folder: Path) -> None:
        self.discovery, self.token_file = folder / "discovery", folder / "hopescale.token"
        self.discovery.mkdir()
        self.token_file.write_text("a secret of this site\n")
        self.token_file.chmod(0o600)
        settings = yaml.safe_load((OPS / "prometheus" / "settings.yml").read_text())
        assert settings.keys() >= SECONDS.keys()
        (folder / "settings.yml").write_text(yaml.safe_dump(settings | SECONDS))
        write_rules = [sys.executable, str(OPS / "prometheus" / "rules.py"), "--settings", str(folder / "settings.yml")]
        subprocess.run([*write_rules, "--output", str(folder / "rules")], check=True)
        with ExitStack() as started:
            self.webhook = started.enter_context(WebhookReceiver())
            self.alertmanager = LiveAlertmanager(folder / "alertmanager", self._alertmanager_config())
            started.enter_context(self.alertmanager)
            self.prometheus = LivePrometheus(folder / "prometheus", self._prometheus_config(folder))
            started.enter_context(self.prometheus)
            self._started = started.pop_all()

    def _alertmanager_config(self) -> dict[str, Any]:
        config = yaml.safe_load((OPS / "alerts" / "alertmanager.yml").read_text())
        for receiver in config["receivers"]:
            for webhook in receiver["webhook_configs"]:
                webhook["url"] = self.webhook.url
        for route in (config["route"], *config["route"]["routes"]):
            route |= {"group_wait": "0s", "group_interval": "1s"}
        return config

    def _prometheus_config(self, folder: Path) -> dict[str, Any]:
        config = yaml.safe_load((OPS / "prometheus" / "prometheus.yml").read_text())
        config["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(folder / "rules" / "*.yml")]
        config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [self.alertmanager.address]
        (job,) = config["scrape_configs"]
        job["file_sd_configs"][0]["files"] = [str(self.discovery / "*.json")]
        job["authorization"]["credentials_file"] = str(self.token_file)
        return config

    def settings(self, cluster: str) -> list[str]:
        """Of a run that is to be watched, under this name of its cluster."""
        return [
            f"cluster.name={cluster}",
            f"metrics.discovery={self.discovery}",
            f"metrics.token_file={self.token_file}",
        ]

    def entries(self, cluster: str) -> list[Path]:
        """What service discovery holds of a cluster."""
        return sorted(self.discovery.glob(f"{cluster}-*.json"))

    def value(self, query: str) -> float | None:
        """What Prometheus says to a query with one answer; None where it has none."""
        found = self.prometheus.query(query)
        assert len(found) <= 1, f"{query} has {len(found)} answers"
        return found[0].values[0] if found else None

    def wait_for(self, query: str, *, within: float = 60) -> float:
        """The value of a query, as soon as there is one: an expression with a comparison has none until it holds."""
        found = self.prometheus.until(
            lambda: self.prometheus.query(query), within=within, what=f"{query}; {self.state()}"
        )
        return found[0].values[0]

    def wait_for_evaluations(self, count: int) -> None:
        """Until all rules have been evaluated so many more times, which they are each second."""
        end = time.time() + count
        self.prometheus.until(lambda: self._evaluated() >= end, what=f"{count} more evaluations")

    def _evaluated(self) -> float:
        """Unix seconds of the last evaluation of the group of rules that is last."""
        groups = self.prometheus.get("rules")["groups"]
        assert len(groups) == 3
        return min(datetime.fromisoformat(group["lastEvaluation"]).timestamp() for group in groups)

    def wait_until_sent(self, cluster: str, status: str, *names: str, within: float = 60) -> list[Message]:
        """The last messages about alerts of the run in a cluster, once all of them say `status`.

        Raises:
            AssertionError: not in time; says what was sent and what Prometheus knows.
        """
        deadline = time.monotonic() + within
        while True:
            latest = {name: self.webhook.latest(name, cluster=cluster) for name in names}
            sent = [message for message in latest.values() if message is not None and message.status == status]
            if len(sent) == len(names):
                return sent
            if time.monotonic() > deadline:
                words = {name: message and message.status for name, message in latest.items()}
                raise AssertionError(f"{cluster}: not {status} within {within} s: {words}; {self.state()}")
            time.sleep(0.1)

    def alerts_of(self, cluster: str) -> set[str]:
        """Names of all alerts of the run in a cluster that were ever sent."""
        return {message.name for message in self.webhook.messages if message.labels.get("cluster") == cluster}

    def held_back(self, cluster: str) -> set[str]:
        """Names of the alerts of the run in a cluster that others explain, so that they are not sent."""
        known = [alert for alert in self.alertmanager.alerts() if alert["labels"].get("cluster") == cluster]
        return {alert["labels"]["alertname"] for alert in known if alert["status"]["inhibitedBy"]}

    def state(self) -> str:
        """What Prometheus knows of alerts and thresholds, for messages of failures."""
        alerts = [
            (a["labels"]["alertname"], a["labels"]["cluster"], a["state"], a["value"])
            for a in self.prometheus.get("alerts")["alerts"]
        ]
        recorded = [
            (series.labels["__name__"], series.labels["cluster"], series.values[0])
            for series in self.prometheus.query('{__name__=~"run:.*|up"}')
        ]
        return f"alerts {alerts}, recorded {recorded}"

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *exc: object) -> None:
        self._started.close()
