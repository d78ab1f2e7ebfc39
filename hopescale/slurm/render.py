"""From a configuration to a batch script: a header of checked values before the body that is the same for every job."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import hopescale
from hopescale.config.schema import Config
from hopescale.errors import ConfigError, Problem

from .schema import NAME, PATH

BODY_BEGINS = "set -euo pipefail\n"
HEADER_VALUE = re.compile(r"[A-Za-z0-9_.,:@+/*=%\[\]-]+")
SET_HERE = frozenset(
    [
        "account",
        "array",
        "chdir",
        "clusters",
        "cpus-per-task",
        "export",
        "gpus",
        "gpus-per-node",
        "gpus-per-task",
        "hold",
        "job-name",
        "mem",
        "nodes",
        "ntasks",
        "ntasks-per-node",
        "open-mode",
        "output",
        "parsable",
        "partition",
        "qos",
        "requeue",
        "signal",
        "test-only",
        "time",
        "wait",
        "wrap",
    ]
)
"""Options that the fields of the configuration set, or that would break the script."""


def body_file() -> Path:
    """`launch/slurm/train.sbatch` of the source tree, or the wheel's copy of it."""
    package = Path(hopescale.__path__[0])
    candidates = (package.parent / "launch" / "slurm" / "train.sbatch", package / "_launch" / "train.sbatch")
    return next(path for path in candidates if path.is_file())


def header(config: Config, run: Path) -> list[tuple[str, str]]:
    """Options of sbatch and their values, in the order in which they are written.

    Args:
        config: of the run.
        run: its folder, absolute.

    Raises:
        ConfigError: a value that a header cannot hold, or an option that a field is there for.
    """
    cluster, problems = config.cluster, []
    gpus = cluster.gpus_per_node if config.parallel.device != "cpu" else None
    wanted: list[tuple[str, object]] = [
        ("job-name", config.run.name),
        ("partition", cluster.partition),
        ("account", cluster.account),
        ("qos", cluster.qos),
        ("nodes", cluster.nodes or 1),
        ("ntasks-per-node", 1),
        ("gpus-per-node", gpus),
        ("cpus-per-task", cluster.cpus_per_node),
        ("mem", cluster.memory),
        ("time", cluster.time),
        ("signal", f"B:{cluster.stop_signal}@{cluster.grace_seconds}"),
        ("requeue" if cluster.requeue else "no-requeue", ""),
        ("open-mode", "append"),
        ("output", f"{run}/logs/slurm-%j.out"),
    ]
    options = [(name, "" if value == "" else str(value)) for name, value in wanted if value is not None]
    for text in cluster.options:
        name, _, value = text.removeprefix("--").partition("=")
        if name in SET_HERE or name.startswith("no-"):
            rule = "is set by the fields of cluster and run, or would break the job script"
            problems.append(Problem("cluster.options", text, rule, "set the field, or leave it out"))
        options.append((name, value))
    # The schema has held every value to its pattern; a header must not depend on that alone.
    problems += [
        Problem(f"sbatch --{name}", value, "holds characters that the header of a script cannot", "leave them out")
        for name, value in options
        if value and not HEADER_VALUE.fullmatch(value)
    ]
    if problems:
        raise ConfigError(problems)
    return options


def environment(config: Config) -> dict[str, str]:
    """Variables of the body, for what is configured."""
    cluster = config.cluster
    python = cluster.python or ("python3" if cluster.container is not None else sys.executable)
    # Quoted in the script, where no shell would do it.
    python = str(Path(python).expanduser()) if python.startswith("~") else python
    values: dict[str, str | None] = {
        "HOPESCALE_PYTHON": python,
        "HOPESCALE_RANKS": None if cluster.gpus_per_node is None else str(cluster.gpus_per_node),
        "HOPESCALE_ENV_FILE": None if cluster.env_file is None else str(Path(cluster.env_file).expanduser().absolute()),
        "HOPESCALE_CONTAINER": cluster.container,
        "HOPESCALE_RUNTIME": cluster.container_runtime,
        "HOPESCALE_MOUNTS": ",".join(cluster.mounts) or None,
        "HOPESCALE_RESTARTS": str(cluster.restarts),
        "HOPESCALE_CRASHES": str(cluster.crashes),
        "HOPESCALE_REQUEUE": str(int(cluster.requeue)),
        "HOPESCALE_DISCOVERY": None
        if config.metrics.discovery is None
        else str(Path(config.metrics.discovery).absolute()),
    }
    return {name: value for name, value in values.items() if value is not None}


def render(config: Config, run: Path) -> str:
    """The batch script of a run.

    Args:
        config: of the run.
        run: its folder, absolute; settings are read from `RUN/slurm/settings` there.

    Raises:
        ConfigError: a value that cannot be written safely.
    """
    if not re.fullmatch(PATH, str(run)) or "=" in str(run) or not run.is_absolute():
        rule = "must be an absolute path of letters, digits and _./@+- for a batch script to hold it"
        raise ConfigError(Problem("run.dir", run, rule, "name another folder"))
    if not re.fullmatch(NAME, config.run.name):
        rule = "must be a word of letters, digits and ._- to be the name of a job"
        raise ConfigError(Problem("run.name", config.run.name, rule, "choose another"))
    lines = [
        "#!/usr/bin/env bash",
        "# Made by `hopescale slurm`; what follows the variables is launch/slurm/train.sbatch.",
    ]
    lines += [f"#SBATCH --{name}" + (f"={value}" if value else "") for name, value in header(config, run)]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment(config).items()]
    lines += [f"set -- {shlex.quote(str(run))}"]
    body = body_file().read_text().partition(BODY_BEGINS)[2]
    return "\n".join(lines) + "\n" + BODY_BEGINS + body


def settings_file(overrides: Sequence[str]) -> str:
    """The overrides of a run, one a line.

    Raises:
        ConfigError: one of them has a line break in it.
    """
    rule, fix = "holds a line break, and a job reads its settings line by line", "write it on one line"
    # A line break at the end makes no further line of itself.
    broken = [text for text in overrides if len(f"{text}.".splitlines()) > 1]
    problems = [Problem("override", repr(text), rule, fix) for text in broken]
    if problems:
        raise ConfigError(problems)
    return "".join(f"{text}\n" for text in overrides)
