"""A real Alertmanager for tests, and a receiver that keeps what it sends; both on free ports of this machine."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from tests.live_server import LiveServer


@dataclass(frozen=True)
class Message:
    """One alert of a webhook call.

    Attributes:
        receiver: name of Alertmanager's receiver.
        status: `firing` or `resolved`.
        labels: of the alert, `alertname` included.
        annotations: of the alert.
    """

    receiver: str
    status: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]

    @property
    def name(self) -> str:
        """Of the alert."""
        return self.labels["alertname"]


class WebhookReceiver:
    """Keeps every alert that is sent to `url`; a context manager."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                call = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                receiver.messages += [
                    Message(call["receiver"], alert["status"], alert["labels"], alert["annotations"])
                    for alert in call["alerts"]
                ]
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, name="webhook", daemon=True).start()

    def latest(self, name: str, **labels: str) -> Message | None:
        """The last word on an alert with these labels, None where there was none."""
        fitting = (m for m in reversed(self.messages) if m.name == name and labels.items() <= m.labels.items())
        return next(fitting, None)

    def stop(self) -> None:
        """Close the port; what was received stays."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> WebhookReceiver:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


class LiveAlertmanager(LiveServer):
    """A running server; a context manager. Requires the capability `alertmanager`.

    Args:
        folder: for its configuration, data and log; made if it is not there.
        config: content of alertmanager.yml.

    Raises:
        RuntimeError: it ended, or was not ready in time; the message holds its log.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "alertmanager.yml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
        command = ["prometheus-alertmanager", f"--config.file={folder / 'alertmanager.yml'}"]
        # No other Alertmanagers are looked for.
        command += [f"--storage.path={folder / 'data'}", "--web.listen-address=127.0.0.1:0"]
        super().__init__("Alertmanager", [*command, "--cluster.listen-address="], folder)

    def alerts(self) -> list[dict[str, Any]]:
        """All alerts it knows, as its API has them: `labels`, `annotations`, `status` with `inhibitedBy`."""
        with urllib.request.urlopen(f"http://{self.address}/api/v2/alerts", timeout=10) as answer:
            return json.loads(answer.read())
