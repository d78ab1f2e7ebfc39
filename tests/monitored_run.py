"""A run of two ranks to be watched, with a small disk of its own, and what may happen to it."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil

from tests.user_process import DIES_WITH_US, ENVIRONMENT

DISK_BYTES = 48 << 20
IN_ITS_OWN_WORLD = ("unshare", "--mount", "--pid", "--mount-proc", "--propagation", "private", "--kill-child=KILL")
"""A mount that nobody else sees, and processes that all end with the first of them: a killed test leaves nothing."""

Values = Callable[[tuple[int, ...]], np.ndarray]


class MonitoredRun:
    """A run in the mount and process namespaces of its own, its folder a file system of `DISK_BYTES`; needs root.

    Args:
        run_dir: mounted on, and empty from the outside.
        settings: of the run, `run.dir` excepted.
        ranks: how many.
    """

    def __init__(self, run_dir: Path, settings: Sequence[str], *, ranks: int = 2) -> None:
        run_dir.mkdir(parents=True)
        self._inside, self._output = run_dir, run_dir.with_suffix(".output")
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(ranks),
            "--max-restarts",
            "0",
        ]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "hopescale.train"]
        mounted = f'mount -t tmpfs -o size={DISK_BYTES} run "$0" && exec "$@"'
        command = [*IN_ITS_OWN_WORLD, "bash", "-c", mounted, str(run_dir), *launcher, *settings, f"run.dir={run_dir}"]
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [*DIES_WITH_US, *command],
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def folder(self) -> Path:
        """The run folder, as it is seen from here."""
        (first,) = psutil.Process(self.process.pid).children()
        return Path(f"/proc/{first.pid}/root") / self._inside.relative_to("/")

    def until(self, ask: Callable[[], object], *, what: str, within: float = 120) -> None:
        """Poll until something is true.

        Raises:
            AssertionError: not in time, or the run ended; the message holds its output.
        """
        deadline = time.monotonic() + within
        while not ask():
            ended = self.process.poll()
            if ended is not None or time.monotonic() > deadline:
                raise AssertionError(f"waiting until {what}, run ended: {ended}\n{self._output.read_text()[-3000:]}")
            time.sleep(0.1)

    def endpoint(self) -> str:
        """`host:port` of the exporter, once it listens."""
        announced = Path("metrics-endpoint.json")
        self.until(lambda: self.process_tree() and (self.folder / announced).is_file(), what="the exporter listens")
        told = json.loads((self.folder / announced).read_text())
        return f"{told['host']}:{told['port']}"

    # ------------------------------------------------------------------------------------------------- its processes
    def process_tree(self) -> list[psutil.Process]:
        """All processes of the run but the first."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def ranks(self) -> list[psutil.Process]:
        """Processes that train."""
        found = [(process, process.cmdline()) for process in self.process_tree()]
        return [p for p, words in found if "hopescale.train" in words and "torch.distributed.run" not in words]

    def exporter(self) -> psutil.Process:
        """The process that answers scrapes."""
        (found,) = [p for p in self.process_tree() if any("prometheus_sidecar" in word for word in p.cmdline())]
        return found

    @contextmanager
    def stopped(self, processes: Sequence[psutil.Process]) -> Iterator[None]:
        """Stops processes for the time of a block."""
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for process in processes:
                process.send_signal(signal.SIGCONT)

    @contextmanager
    def exporter_by_hand(self, address: str, token_file: Path) -> Iterator[None]:
        """Serves the ranks' files for the time of a block, in place of a dead exporter, as the runbook says."""
        host, port = address.rsplit(":", 1)
        command = [sys.executable, "-m", "hopescale.metrics.sinks.prometheus_sidecar", str(self.rank_file(0).parent)]
        command += ["--host", host, "--port", port, "--token-file", str(token_file)]
        with subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as exporter:
            try:
                yield
            finally:
                # The end of its standard input is its own.
                exporter.communicate(timeout=30)

    # ------------------------------------------------------------------------------------------------------ its files
    def rank_file(self, rank: int) -> Path:
        """Through which a rank hands its numbers to the exporter."""
        return self.folder / "live" / socket.gethostname() / "000000" / f"rank-{rank:05d}.bin"

    @contextmanager
    def lost_numbers(self, rank: int) -> Iterator[None]:
        """A rank's file is gone for the time of a block; the rank writes into it all the same."""
        own = self.rank_file(rank)
        aside = own.rename(own.with_suffix(".aside"))
        try:
            yield
        finally:
            aside.replace(own)

    @contextmanager
    def frozen_numbers(self, rank: int) -> Iterator[None]:
        """In place of a rank's file lies a copy that stays as it is, for the time of a block."""
        with self.lost_numbers(rank):
            own = self.rank_file(rank)
            shutil.copy(own.with_suffix(".aside"), own)
            yield

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """Nothing is free on the run folder's file system for the time of a block, whatever the run removes."""
        filler, end = self.folder / "filler", threading.Event()

        def fill() -> None:
            with filler.open("wb", buffering=0) as file:
                while not end.wait(0.05):
                    try:
                        while True:
                            file.write(bytes(1 << 20))
                    except OSError as error:
                        if error.errno != errno.ENOSPC:
                            raise

        with ThreadPoolExecutor(1) as pool:
            filling = pool.submit(fill)
            try:
                yield
            finally:
                end.set()
                filling.result()
                filler.unlink()

    # -------------------------------------------------------------------------------------------------------- its end
    def end(self) -> str:
        """Ask the run to stop after its step, and return its output."""
        (self.folder / "stop").touch()
        self.process.wait(120)
        return self._output.read_text()

    def __enter__(self) -> MonitoredRun:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class Clips:
    """The features of training clips, where they lie in the shards of a data set.

    A reader that is told not to check them (`data.reader.checksums=false`) hands on whatever lies there.
    """

    dataset: Path
    places: tuple[tuple[Path, int, tuple[int, ...]], ...]
    """File, offset and shape of each."""

    @classmethod
    def of(cls, dataset: Path) -> Clips:
        """Find them."""
        places = []
        for path in sorted((dataset / "shards").glob("train-*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name.endswith(".features.npy"):
                        header = BytesIO(tar.extractfile(member).read())  # type: ignore[union-attr]
                        np.lib.format.read_magic(header)
                        shape, _, dtype = np.lib.format.read_array_header_1_0(header)
                        assert dtype == np.float16
                        places.append((path, member.offset_data + header.tell(), shape))
        return cls(dataset, tuple(places))

    def overwrite(self, values: Values, count: int | None = None) -> None:
        """Put other values in place of the features of the first `count` clips, or of all."""
        for path, offset, shape in self.places[:count]:
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(values(shape).astype(np.float16).tobytes())
