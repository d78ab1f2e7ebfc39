"""A server program for the time of a test: on a free port of this machine, with a folder of its own."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self, TypeVar

from tests.user_process import DIES_WITH_US

Found = TypeVar("Found")

_LISTENING = re.compile(r'msg="Listening on" address=(\S+)')


class LiveServer:
    """A running server of the Prometheus family, told to listen on port 0; a context manager.

    Args:
        name: of the program, for messages and its log.
        command: its command line.
        folder: where it runs and its log lies; exists.

    Attributes:
        address: `host:port` it listens on, as it writes into its log.
        log: file of its output.

    Raises:
        RuntimeError: it ended, or did not listen in time; the message holds its log.
    """

    def __init__(self, name: str, command: Sequence[str], folder: Path) -> None:
        self.name, self.folder, self.log = name, folder, folder / f"{name.lower()}.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [*DIES_WITH_US, *command],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self.address = self.until(self._listens, what="it listens")
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
                state = f"{self.name} ended with code {ended}" if ended is not None else f"not within {within} s"
                raise RuntimeError(f"waiting until {what}: {state}\n{self.log.read_text()[-3000:]}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End it; its folder stays. May be called twice."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _listens(self) -> str | None:
        found = _LISTENING.search(self.log.read_text())
        return found.group(1) if found else None
