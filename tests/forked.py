"""Starts Python programs as forks of a process that has imported what they need, and torchrun's ranks likewise.

Importing torch and the trainer takes a rank longer than most tests have it train for. `ForkServer` forks a launch from
a process that has imported them and nothing else; torchrun runs in it unchanged, but for the starting of its ranks,
which are forks as well. What a fresh process has of its own, they have: environment, process group, signals, exit code.
They share one PYTHONHASHSEED: tests of ranks that could each do things in an order of their own start fresh ones.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

TORCHRUN = ("-m", "torch.distributed.run")
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD)


class Nursery:
    """The other end of a process that forks on demand."""

    def __init__(self, channel: socket.socket) -> None:
        self.lines = channel.makefile("rw")

    def ask(self, **request: Any) -> Any:
        """Its answer."""
        self.lines.write(json.dumps(request) + "\n")
        self.lines.flush()
        return json.loads(self.lines.readline())


class ForkServer(Nursery):
    """A process that has imported torch and the trainer."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "tests.forked", str(theirs.fileno())]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=Path(__file__).parents[1])
        super().__init__(ours)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


class Forked:
    """As much of a `subprocess.Popen` as torchrun and a test ask for."""

    def __init__(
        self,
        nursery: Nursery,
        args: Sequence[str],
        env: Mapping[str, str],
        stdout: str | None = None,
        stderr: str | None = None,
        start_new_session: bool = True,
    ) -> None:
        assert start_new_session, "a fork always leads a group of its own"
        self.nursery, self.args, self.returncode = nursery, args, None
        command = [word for word in args[1:] if word != "-u"]
        self.pid = nursery.ask(args=command, env=dict(env), stdout=stdout, stderr=stderr)

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it lives."""
        if self.returncode is None:
            self.returncode = self.nursery.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its exit code."""
        until = time.monotonic() + (1e9 if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(list(self.args), timeout or 0)
            time.sleep(0.02)
        return code


def serve(channel: socket.socket) -> None:
    """Fork, and tell what became of forks, until nobody asks any more."""
    with channel.makefile("rw") as lines:
        for line in iter(lines.readline, ""):
            request = json.loads(line)
            if "poll" in request:
                ended, status = os.waitpid(request["poll"], os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if ended else None
            else:
                answer = os.fork()
                if answer == 0:
                    become(channel, **request)
                # By both, so that it leads its group before anybody is told of it.
                os.setpgid(answer, answer)
            lines.write(json.dumps(answer) + "\n")
            lines.flush()


def become(
    channel: socket.socket, args: list[str], env: dict[str, str], stdout: str | None, stderr: str | None
) -> NoReturn:
    """Be what `python ARGS` is in this environment, and end as that ends."""
    from hopescale.parallel.process_group import end_process

    os.close(channel.fileno())
    os.setpgid(0, 0)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for path, descriptor in ((os.devnull, 0), (stdout, 1), (stderr, 2)):
        if path is not None:
            flags = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
            os.dup2(os.open(path, flags), descriptor)
    os.environ.clear()
    os.environ.update(env)
    random.seed()
    code = 0
    try:
        run(args)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    end_process(code)


def run(args: list[str]) -> None:
    """Run `python ARGS` in this process."""
    if tuple(args[:2]) == TORCHRUN:
        return launch(args[2:])
    if args[0] == "-m":
        sys.argv = args[1:]
        sys.modules.pop(args[1], None)
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = args
        runpy.run_path(args[0], run_name="__main__")


def launch(args: list[str]) -> None:
    """Run torchrun, which forks its ranks from a process that has no threads or sockets of its own yet."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        serve(theirs)
        os._exit(0)
    theirs.close()
    subprocess_handler.Popen = partial(Forked, Nursery(ours))
    torchrun.main(args)


if __name__ == "__main__":
    import torch
    import torch.distributed.run

    import hopescale.train  # noqa: F401

    torch.set_num_threads(1)
    serve(socket.socket(fileno=int(sys.argv[1])))
