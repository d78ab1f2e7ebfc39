"""A Slurm cluster of a few nodes on this machine, as tests use it; `integration/slurm_cluster.sh` makes it."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.user_process import DIES_WITH_US

SCRIPT = Path(__file__).resolve().parent / "integration" / "slurm_cluster.sh"
FINAL_STATES = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "TIMEOUT"}
"""How a job can end for good."""
REQUEUED_STATES = {"NODE_FAIL", "PREEMPTED"}
"""How a job can end that Slurm then starts again, unless it was submitted with `--no-requeue`."""
POLL_SECONDS = 0.2

Fields = dict[str, str]
"""What `scontrol show job` says of a job: `JobState`, `NodeList`, `Restarts` ..."""


class SlurmError(RuntimeError):
    """A command of Slurm failed or did not return, or a job did not do what a test waited for."""


def parse_fields(line: str) -> Fields:
    """Split a line of `scontrol --oneliner`; values may hold spaces."""
    words = re.split(r"(?:^|\s)([A-Z][\w/:]*)=", line.strip())
    return dict(zip(words[1::2], words[2::2], strict=True))


def is_over(fields: Fields) -> bool:
    """Whether a job has ended and will not be started again."""
    state = fields["JobState"]
    return state in FINAL_STATES or (state in REQUEUED_STATES and fields["Requeue"] == "0")


def _environment() -> dict[str, str]:
    """This process' own, without what a Slurm that it may run under has put there."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))}


def _run(
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str = "",
    timeout: float,
) -> subprocess.CompletedProcess[str]:
    environment = {**_environment(), **(env or {})}
    try:
        return subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{' '.join(command)} did not return within {timeout} s") from error


class SlurmNodes:
    """A cluster that is up between `__enter__` and `__exit__`, or until this process dies, however that happens.

    Args:
        folder: For the cluster's files; `folder/log` holds the logs of its daemons, `folder/jobs` is where jobs run.
        nodes: How many, called `n1`, `n2` ...
        spank_plugin: A shared library that srun, sbatch and the nodes load.

    Waiting methods poll and raise SlurmError past `timeout` seconds.
    """

    def __init__(self, folder: Path, nodes: int = 3, spank_plugin: Path | None = None) -> None:
        self.folder = folder
        self.names = [f"n{index}" for index in range(1, nodes + 1)]
        self.jobs = folder / "jobs"
        self._settings = {"SPANK_PLUGIN": str(spank_plugin)} if spank_plugin else {}
        self._holder: subprocess.Popen[str] | None = None
        self._off: set[int] = set()
        self._unplugged: set[int] = set()

    def __enter__(self) -> SlurmNodes:
        self.jobs.mkdir(parents=True, exist_ok=True)
        complaints = self.folder / "hold.err"
        # The kernel kills the script, and the script's death the cluster, when this process dies without a word.
        command = ["bash", str(SCRIPT), "hold", str(self.folder), str(len(self.names))]
        with complaints.open("w") as stderr:
            self._holder = subprocess.Popen(
                [*DIES_WITH_US, *command],
                env={**_environment(), **self._settings},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "up\n":
            self._holder.wait()
            raise SlurmError(f"no Slurm cluster:\n{complaints.read_text()}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._holder is not None
        assert self._holder.stdout is not None
        self._script("down")
        self._holder.wait(timeout=30)
        self._holder.stdout.close()

    def _script(self, command: str, *arguments: str) -> None:
        ended = _run(["bash", str(SCRIPT), command, str(self.folder), *arguments], timeout=60)
        if ended.returncode:
            raise SlurmError(f"slurm_cluster.sh {command} {' '.join(arguments)}: {ended.stderr}")

    def on_login_node(self, *command: str | Path) -> list[str]:
        """The command that runs another one inside, where this machine's files are, and the nodes' names and ports."""
        return ["bash", str(SCRIPT), "run", str(self.folder), *map(str, command)]

    def run(
        self,
        *command: str | Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: str = "",
        timeout: float = 20,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node to its end, in `jobs` unless `cwd` is given, and return its code and output.

        `env` is added to this process' own. Past `timeout` seconds the command is killed.

        Raises:
            SlurmError: it did not end in time.
        """
        return _run(self.on_login_node(*command), cwd=cwd or self.jobs, env=env, stdin=stdin, timeout=timeout)

    def _output_of(self, *command: str | Path, stdin: str = "", env: Mapping[str, str] | None = None) -> str:
        ended = self.run(*command, stdin=stdin, env=env)
        if ended.returncode:
            raise SlurmError(f"{' '.join(map(str, command))}: exit code {ended.returncode}\n{ended.stderr}")
        return ended.stdout

    def submit(self, *arguments: str | Path, script: str | None = None, env: Mapping[str, str] | None = None) -> int:
        """Run `sbatch ARGUMENTS`, where the text of a script may take the place of its path; the job's id.

        Raises:
            SlurmError: sbatch refused; the message holds what it said.
        """
        printed = self._output_of("sbatch", "--parsable", *arguments, stdin=script or "", env=env)
        return int(printed.split(";")[0])

    def job(self, job_id: int | str) -> Fields:
        """What `scontrol show job` says, as text; a task of an array is named like `"5_1"`."""
        lines = self._output_of("scontrol", "--oneliner", "show", "job", str(job_id)).splitlines()
        if len(lines) != 1:
            raise SlurmError(f"job {job_id} has {len(lines)} tasks: name one, like {job_id}_0")
        return parse_fields(lines[0])

    def output(self, job_id: int | str) -> str:
        """What the job has printed so far, of all its starts if its output is opened with `--open-mode=append`."""
        path = Path(self.job(job_id)["StdOut"])
        return path.read_text() if path.exists() else ""

    def wait(self, job_id: int | str, until: str | Callable[[Fields], bool], timeout: float = 60) -> Fields:
        """Wait until a job is in a state, or its fields are as wanted; the fields then.

        RUNNING comes before the script's first line: a signal that is to meet a trap waits for output of the script.

        Raises:
            SlurmError: it took longer than `timeout` seconds, or the job is over; the message holds its output.
        """

        def is_reached(fields: Fields) -> bool:
            return fields["JobState"] == until if isinstance(until, str) else until(fields)

        deadline = time.monotonic() + timeout
        while not is_reached(fields := self.job(job_id)):
            if (over := is_over(fields)) or time.monotonic() > deadline:
                wanted = until if isinstance(until, str) else "what was waited for"
                how = "ended without" if over else f"within {timeout} s did not reach"
                told = ("JobState", "Reason", "ExitCode", "Restarts", "NodeList")
                raise SlurmError(
                    f"job {job_id} {how} {wanted}: {' '.join(f'{name}={fields.get(name)}' for name in told)}; "
                    f"nodes {self.sinfo()}\n--- its output ---\n{self.output(job_id)}"
                )
            time.sleep(POLL_SECONDS)
        return fields

    def wait_for_output(self, job_id: int | str, pattern: str, timeout: float = 60) -> str:
        """Wait until a regular expression, of which ^ and $ match at lines, is found in a job's output; the output.

        Raises like `wait`.
        """
        self.wait(job_id, lambda _: bool(re.search(pattern, self.output(job_id), re.MULTILINE)), timeout)
        return self.output(job_id)

    def signal(self, job_id: int | str, name: str) -> None:
        """Send a signal to the shell of the batch script alone, as `#SBATCH --signal=B:USR1@60` does before the end."""
        self._output_of("scancel", "--batch", f"--signal={name}", str(job_id))

    def cancel(self, job_id: int | str) -> None:
        """End a job: SIGTERM, and SIGKILL 5 s later."""
        self._output_of("scancel", str(job_id))

    def sinfo(self) -> dict[str, str]:
        """The state of each node: `idle`, `mixed`, `down*` ...; the star says that it does not answer."""
        lines = self._output_of("sinfo", "--Node", "--noheader", "--partition=ci", "--format=%N %T").splitlines()
        return {name: state for name, state in map(str.split, lines)}

    def wait_for_nodes(self, *indices: int, state: str, timeout: float = 60) -> None:
        """Wait until nodes, all if none is named, are in a state as `sinfo` tells it, star aside."""
        names = [f"n{index}" for index in indices] or self.names
        deadline = time.monotonic() + timeout
        while {(states := self.sinfo())[name].rstrip("*") for name in names} != {state}:
            if time.monotonic() > deadline:
                raise SlurmError(f"{', '.join(names)} not {state} within {timeout} s: {states}")
            time.sleep(POLL_SECONDS)

    def crash(self, index: int) -> None:
        """Switch a node off: its processes die at once and those they talked to hear nothing."""
        self._script("crash", str(index))
        self._off.add(index)

    def start(self, index: int) -> None:
        """Switch it on again, and wait until Slurm takes it for alive."""
        self._script("start", str(index))
        self._off.discard(index)
        self._unplugged.discard(index)

    def cut(self, index: int) -> None:
        """Unplug a node from the network: its processes go on."""
        self._script("cut", str(index))
        self._unplugged.add(index)

    def mend(self, index: int) -> None:
        """Plug it in again. One that Slurm has given up by then is taken back after about half a minute."""
        self._script("mend", str(index))
        self._unplugged.discard(index)

    def restore(self) -> None:
        """As after `__enter__`: no jobs, all nodes idle."""
        # A restart plugs in as well, and is noticed sooner.
        for index in self._unplugged - self._off:
            self.crash(index)
        for index in sorted(self._off):
            self.start(index)
        self._output_of("scancel", "--user=root")
        self.wait_for_nodes(state="idle")
