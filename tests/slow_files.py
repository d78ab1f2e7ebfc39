"""A server of files that sends as slowly as it is told to, as a data set's server does on a bad day."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TICK = 0.1
"""Seconds between two parts of a file."""


class SlowFiles(ThreadingHTTPServer):
    """Serves the files of a folder; a context manager.

    Args:
        folder: whose files it serves, by their path in it.
        slow: folder in it to whose files `bytes_per_second` applies.

    Attributes:
        bytes_per_second: of each request, at least one byte each `TICK`; None sends all at once. May be changed.
        url: of the folder.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path, slow: str, bytes_per_second: float | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.slow = folder, slow
        self.bytes_per_second = bytes_per_second
        self.ending = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, name="slow files", daemon=True).start()

    def server_close(self) -> None:
        """End what is still being sent, and close the port."""
        self.ending.set()
        self.shutdown()
        super().server_close()


class _Handler(BaseHTTPRequestHandler):
    server: SlowFiles  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        path = self.server.folder / name
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        try:
            while content and name.startswith(f"{self.server.slow}/") and self.server.bytes_per_second is not None:
                part = max(1, int(self.server.bytes_per_second * TICK))
                self.wfile.write(content[:part])
                content = content[part:]
                if self.server.ending.wait(TICK):
                    return
            self.wfile.write(content)
        except ConnectionError:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        return
