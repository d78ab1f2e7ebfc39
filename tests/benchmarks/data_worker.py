"""Processes that measure one thing a request, so that interpreters that cannot share packages take turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

REPO_ROOT = Path(__file__).resolve().parents[2]

Result = dict[str, Any]


class JobFailed(Exception):
    """A request ended with an error; the text is the traceback of the process."""

    @property
    def reason(self) -> str:
        """The last line, which says what it was."""
        return str(self).strip().splitlines()[-1]


class Worker:
    """A process that waits for requests: whoever asks waits for the answer, so no two ever run at once."""

    def __init__(self, python: str, module: str) -> None:
        """Start it.

        Args:
            python: Interpreter.
            module: Calls `serve` when it is run.
        """
        self._process = subprocess.Popen(
            [python, "-m", module], cwd=REPO_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, job: str, **arguments: Any) -> Result:
        """Run a job and return what it measured.

        Raises:
            JobFailed: It raised, or the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"job": job, "arguments": arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise JobFailed(f"the process ended with exit code {self._process.wait()} during {job}")
        answer = json.loads(line)
        if "error" in answer:
            raise JobFailed(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """Let it end, and wait."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve(jobs: Mapping[str, Callable[..., Result]]) -> None:
    """Answer requests until there are no more; what a job prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": jobs[request["job"]](**request["arguments"])}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)
