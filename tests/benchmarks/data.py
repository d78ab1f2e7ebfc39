"""Speed of the data pipeline, as ratios to copies of the same bytes and to other libraries, which take turns with it.

`python tests/benchmarks/data.py [--rounds 5] [--json FILE] [--quick]` prints a table, with `--json` also a file with a
list of {name, ratio, range, must, stretch, met, note}. The first time it writes 256 clips of 4 MiB in each format, 7 GB
in all, to `--folder`. The rivals run in the environment that `bash tests/benchmarks/rivals.sh` makes; without it their
rows say so. About ten minutes on two cores that nobody else uses. Nothing asserts these numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.data_rows import LOADER_WORKERS, RIVALS, Table
from tests.benchmarks.data_worker import REPO_ROOT, JobFailed, Result, Worker

OUR_MODULE, RIVALS_MODULE = "tests.benchmarks.data_contenders", "tests.benchmarks.data_rivals"
SHARED_MEMORY = Path("/dev/shm")
STEP_LENGTHS = {"wait-1.1": 1.1, "wait-1.5": 1.5, "wait-3": 3.0}
POSITIONS = {"resume-start": (0, 0.0), "resume-middle": (0, 0.5), "resume-far": (10_000, 0.9)}
RINGS = {
    "-1": {"checksums": False, "threads": 1},
    "": {"checksums": False},
    "-crc-1": {"checksums": True, "threads": 1},
    "-crc": {"checksums": True},
}
SCALING_SHARDS = 8
SAME_TARS = ("speed-up-1", "speed-up")
SHARD_WRITER = ("core-writer", "default-writer")
NO_ENVIRONMENT = "not installed: make .venv-rivals with `bash tests/benchmarks/rivals.sh`"


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        clips: That are read, and written from files.
        written: Clips that are written from memory.
        rows: Of the index that is resumed.
        order: Clips of the two orders.
        judged: Whether figures are compared with targets; then a round comes first that does not count.
    """

    clips: int = 256
    written: int = 96
    rows: int = 1_000_000
    order: tuple[int, int] = (1_000_000, 10_000_000)
    judged: bool = True

    def texts(self) -> dict[str, str]:
        """Return what the names of rows say of them."""
        return {
            "resume_rows": f"{self.rows:,}",
            "order_1": f"{self.order[0]:,} samples",
            "order_10": f"{self.order[1]:,} samples",
        }


QUICK = Sizes(clips=24, written=8, rows=6_400, order=(10_000, 100_000), judged=False)


@dataclass
class Bench:
    """The processes that measure, and what they have found.

    What a process has allocated and which threads it has started decide how fast it is later, so each of ours does
    things of one kind and each reader and writer of others has one of its own.

    Attributes:
        sizes: How much is measured.
        folder: Of what is made once.
        scratch: For what is written again and again.
        table: Of the results.
        python: Interpreter of the rivals.
        absent: Why rivals cannot be measured, by name.
        names: Of folders, where they differ from what is in them.
    """

    sizes: Sizes
    folder: Path
    scratch: Path
    table: Table
    python: Path
    absent: dict[str, str]
    names: dict[str, str] = field(default_factory=dict)
    _failed: dict[tuple[str, ...], str] = field(default_factory=dict)
    _processes: dict[str, Worker] = field(default_factory=dict)

    def path(self, name: str) -> str:
        """Return the path of something that is made once."""
        return str(self.folder / self.names.get(name, name))

    def read(self, job: str, **arguments: Any) -> Result:
        """Let us do something with the shards."""
        return self.ours("reading", job, dataset=self.path("ours"), **arguments)

    def write(self, job: str, clips: int, **arguments: Any) -> Result:
        """Let us write so many clips of the .npy files."""
        sources = {"folder": self.path("npy"), "clips": clips}
        return self.ours("writing", job, scratch=str(self.scratch), **sources, **arguments)

    def ours(self, purpose: str, job: str, **arguments: Any) -> Result:
        """Let the process of ours that is there for a purpose do something; one does for figures that say nothing."""
        return self._process(purpose if self.sizes.judged else "everything", sys.executable, OUR_MODULE).ask(
            job, **arguments
        )

    def rival(self, rows: tuple[str, ...], library: str, job: str, **arguments: Any) -> Result | None:
        """Let a rival do something; None, and a note at its rows, if it is not there or fails."""
        reason = self.absent.get(library) or self._failed.get(rows)
        if reason is None:
            process = self._process(f"{library} {job} {arguments.get('workers')}", str(self.python), RIVALS_MODULE)
            try:
                return process.ask(job, library=library, **arguments)
            except JobFailed as failure:
                print(failure, file=sys.stderr)
                reason = self._failed[rows] = f"failed: {failure.reason}"
        self.table.excuse(rows, reason)
        return None

    def close(self) -> None:
        """End all processes."""
        while self._processes:
            self._processes.popitem()[1].close()

    def _process(self, name: str, python: str, module: str) -> Worker:
        if name not in self._processes:
            self._processes[name] = Worker(python, module)
        return self._processes[name]


def make_everything(bench: Bench) -> None:
    """Write what is read, unless an earlier run has."""
    sizes = bench.sizes
    bench.ours("making", "make_shards", folder=bench.path("ours"), clips=sizes.clips)
    bench.ours("making", "make_npy", folder=bench.path("npy"), clips=sizes.clips)
    bench.ours("making", "make_index", folder=bench.path("index"), rows=sizes.rows)
    for rival in RIVALS:
        rows = tuple(f"{rival}-{workers}" for workers in LOADER_WORKERS)
        bench.rival(rows, rival, "make", folder=bench.path(rival), clips=sizes.clips)
    if sizes.judged:
        bench.close()


def reading(bench: Bench) -> None:
    """Our reader beside copies of the same bytes."""
    add, rates = bench.table.add, bench.read("limit")
    print(f"limit: {rates['preadv_rate']:.1f} GB/s by preadv, {rates['memcpy_rate']:.1f} by memcpy", file=sys.stderr)
    for suffix, settings in RINGS.items():
        limit, ring = bench.read("limit"), bench.read("ring", **settings)
        add(f"ring{suffix}", limit["seconds"] / ring["seconds"])
        add(f"cpu{suffix}", ring["cpu"] / limit["cpu"])
    in_order, random = (bench.read("ring", checksums=False, in_order=order) for order in (True, False))
    add("random", in_order["seconds"] / random["seconds"])
    add("view", bench.read("views")["microseconds"])
    add("verify", bench.read("limit")["seconds"] / bench.read("check")["seconds"])
    shares = bench.read("waits", factors=list(STEP_LENGTHS.values()))["shares"]
    for row, share in zip(STEP_LENGTHS, shares, strict=True):
        add(row, share)


def rivals_reading(bench: Bench) -> None:
    """webdataset on our tars, and each rival on its own format."""
    clips = bench.sizes.clips
    one = bench.read("ring", **RINGS["-crc-1"])
    theirs = bench.rival(SAME_TARS, "webdataset", "read", folder=bench.path("ours"), clips=clips, workers=0)
    if theirs is not None:
        bench.table.add("speed-up-1", theirs["seconds"] / one["seconds"])
        bench.table.add("speed-up", theirs["seconds"] / bench.read("ring", **RINGS["-crc"])["seconds"])
    for rival in RIVALS:
        for workers in LOADER_WORKERS:
            row = f"{rival}-{workers}"
            limit = bench.read("limit")
            measured = bench.rival((row,), rival, "read", folder=bench.path(rival), clips=clips, workers=workers)
            if measured is not None:
                bench.table.add(row, limit["seconds"] / measured["seconds"])


def writing(bench: Bench) -> None:
    """The sharder beside plain writes, copies and webdataset's writer."""
    add, written, clips = bench.table.add, bench.sizes.written, bench.sizes.clips
    plain, core, sharder = (bench.write(job, written)["seconds"] for job in ("plain_write", "core", "sharder"))
    add("core", plain / core)
    add("default", plain / sharder)
    sources = {"scratch": str(bench.scratch), "folder": bench.path("npy"), "clips": written}
    writer = bench.rival(SHARD_WRITER, "webdataset", "write", **sources)
    if writer is not None:
        add("core-writer", writer["seconds"] / core)
        add("default-writer", writer["seconds"] / sharder)
    copied = bench.write("copy", clips)["seconds"]
    add("npy", copied / bench.write("from_npy", clips)["seconds"])
    scaling(bench, clips)


def scaling(bench: Bench, clips: int) -> None:
    """One process and two, on as many cores; a process alone uses two, for it hashes beside writing."""
    try:
        pinned = bench.write("from_npy", clips, shards=SCALING_SHARDS, cores=1)["seconds"]
    except JobFailed as failure:
        bench.table.excuse(("scaling", "scaling-free"), f"not measured: {failure.reason}")
        return
    two = bench.write("from_npy", clips, shards=SCALING_SHARDS, workers=2)["seconds"]
    bench.table.add("scaling", pinned / two)
    bench.table.add("scaling-free", bench.write("from_npy", clips, shards=SCALING_SHARDS)["seconds"] / two)


def resuming(bench: Bench, number: int) -> None:
    """The order of an epoch, and the way from a state to the first batch."""
    add = bench.table.add
    for row, rows in zip(("order-1", "order-10"), bench.sizes.order, strict=True):
        add(row, bench.ours("resuming", "order", rows=rows, epoch=number)["seconds"])
    found = {}
    for row, (epoch, share) in POSITIONS.items():
        found[row] = bench.ours("resuming", "resume", folder=bench.path("index"), epoch=epoch, share=share)
        add(row, found[row]["seconds"])
    add("resume-open", found["resume-middle"]["with_opening"])
    seconds = [measured["seconds"] for measured in found.values()]
    add("resume-spread", max(seconds) / min(seconds))


def once(bench: Bench) -> None:
    """What does not depend on the round."""
    bench.table.add("tar", bench.read("overhead")["overhead"])
    used = bench.ours("remembering", "memory", dataset=bench.path("ours"))
    for row, name in {"memory": "used", "memory-growth": "growth", "ring-growth": "ring"}.items():
        bench.table.add(row, used[name])


def run(bench: Bench, rounds: int) -> Table:
    """Measure everything, in rounds."""
    make_everything(bench)
    table = bench.table
    for number in range(0 if bench.sizes.judged else 1, rounds + 1):
        print(f"round {number} of {rounds}{'' if number else ', which does not count'}", file=sys.stderr, flush=True)
        bench.table = table if number else Table(False, table.sizes)
        reading(bench)
        rivals_reading(bench)
        writing(bench)
        resuming(bench, number)
    once(bench)
    return table


def opened(sizes: Sizes, root: Path, python: Path) -> Bench:
    """Find out what there is to measure."""
    folder = root / f"{sizes.clips}-clips"
    folder.mkdir(parents=True, exist_ok=True)
    scratch = SHARED_MEMORY if SHARED_MEMORY.is_dir() else folder
    installed, absent = rivals_of(python)
    bench = Bench(sizes, folder, scratch, Table(sizes.judged, sizes.texts()), python, absent)
    release = bench.ours("making", "versions")
    # What an older format left there is not read.
    bench.names.update({name: f"{name}-{text}" for name, text in {**installed, "ours": release["format"]}.items()})
    texts = [f"torch {release['torch']} on {release['cores']} cores"]
    texts += [f"{name} {text}" for name, text in installed.items()] or ["no rivals"]
    print(", ".join(texts), file=sys.stderr)
    return bench


def rivals_of(python: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return the versions of the rivals that an interpreter can import, and why it cannot import the others."""
    if not python.is_file():
        return {}, dict.fromkeys(RIVALS, NO_ENVIRONMENT)
    with closing(Worker(str(python), RIVALS_MODULE)) as worker:
        found = worker.ask("versions")
    return found["installed"], {name: f"not installed: {reason}" for name, reason in found["absent"].items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="24 clips and one round, whose figures say nothing")
    folder = Path(tempfile.gettempdir()) / "hopescale-data-benchmark"
    parser.add_argument("--folder", type=Path, default=folder, help="of what is made once (default: %(default)s)")
    python = REPO_ROOT / ".venv-rivals" / "bin" / "python"
    parser.add_argument("--rivals", type=Path, default=python, help="interpreter of the rivals (default: %(default)s)")
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else Sizes()
    with closing(opened(sizes, arguments.folder.resolve(), arguments.rivals)) as bench:
        table = run(bench, 1 if arguments.quick else arguments.rounds)
    print(table.text())
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(table.lines(), indent=1) + "\n")


if __name__ == "__main__":
    main()
