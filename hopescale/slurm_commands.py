"""`hopescale slurm …` and `hopescale runs ls`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hopescale.cli_settings import Json, Overrides, WithSettings, finish

slurm_app = typer.Typer(no_args_is_help=True, help="Train as a job of Slurm.")
runs_app = typer.Typer(no_args_is_help=True, help="Look at runs.")
Run = Annotated[Path, typer.Argument(help="Run folder.")]


@slurm_app.command(cls=WithSettings)
def submit(
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script and submit nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Submit a run; cluster.nodes, cluster.partition, cluster.time and so on say what to ask for.

    Mistakes are told before anything is made. The job goes back into the queue by itself until the run is finished.
    """
    from hopescale.config.compose import load_config
    from hopescale.slurm.submit import submit as submit_run

    if dry_run:
        render(overrides)
        return
    result = submit_run(load_config(overrides or []), overrides or [])
    if not as_json:
        print(f"job {result['job']}: {result['run']}")
        print(f"look at it with `hopescale slurm status {result['run']}`")
    finish(result, as_json)


@slurm_app.command(cls=WithSettings)
def render(overrides: Overrides = None) -> None:
    """Print the batch script of a run; nothing is made."""
    from hopescale.config.compose import load_config
    from hopescale.slurm.render import render as render_script

    config = load_config(overrides or [])
    folder = config.run.dir if config.run.dir is not None else f"{config.run.root}/{config.run.name}"
    print(render_script(config, Path(folder).absolute()), end="")


@slurm_app.command()
def status(run: Run, as_json: Json = False) -> None:
    """Say how a run is doing, from its folder, and what Slurm says of its job."""
    from hopescale.slurm.status import status as status_of

    found = status_of(run)
    if not as_json:
        for name, value in _readable(found).items():
            print(f"{name:<14} {value}")
    finish(found, as_json)


@slurm_app.command()
def requeue(run: Run, as_json: Json = False) -> None:
    """Put the job of a run back into the queue."""
    from hopescale.slurm.job import requeue as requeue_run

    finish(requeue_run(run), as_json)


@slurm_app.command()
def cancel(
    run: Run,
    now: Annotated[bool, typer.Option("--now", help="Kill it; what came after its last checkpoint is lost.")] = False,
    as_json: Json = False,
) -> None:
    """End the job of a run for good, with a checkpoint."""
    from hopescale.slurm.job import cancel as cancel_run

    result = cancel_run(run, now=now)
    if not as_json:
        print(f"job {result['job']} " + ("saves and ends" if result["saves"] else "was cancelled"))
    finish(result, as_json)


@runs_app.command("ls")
def list_runs(
    root: Annotated[Path, typer.Argument(help="Folder that holds run folders.")] = Path("runs"), as_json: Json = False
) -> None:
    """List the runs below a folder, the newest first."""
    from hopescale.slurm.status import runs

    found = runs(root)
    if not as_json:
        _print_table([_row(each) for each in found])
    finish({"runs": found}, as_json)


def _readable(found: dict[str, Any]) -> dict[str, str]:
    of = "" if found["steps"] is None else f" of {found['steps']}"
    age = found["checkpoint_age_seconds"]
    shown = {
        "run": found["run"],
        "state": found["state"] + (f" (code {found['code']})" if found["code"] else ""),
        "step": f"{found['step']}{of}",
        "loss": _number(found["loss"]),
        "time to go": _duration(found["eta_seconds"]),
        "goodput": _share(found["goodput"]),
        "restarts": f"{found['restarts']}, of which {found['preemptions']} told to stop",
        "checkpoint": "none yet" if age is None else f"{found['checkpoint']}, {_duration(age)} ago",
    }
    return shown if found["job"] is None else shown | {"job": f"{found['job']}: {found['job_state']}"}


def _row(found: dict[str, Any]) -> dict[str, str]:
    return {
        "run": Path(found["run"]).name,
        "state": found["state"],
        "step": f"{found['step']}/{'?' if found['steps'] is None else found['steps']}",
        "loss": _number(found["loss"]),
        "to go": _duration(found["eta_seconds"]) if found["state"] == "running" else "",
        "goodput": _share(found["goodput"]),
        "restarts": str(found["restarts"]),
        "checkpoint": found["checkpoint"] or "",
    }


def _print_table(rows: list[dict[str, str]]) -> None:
    if not rows:
        print("no runs")
        return
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    for row in ({name: name for name in widths}, *rows):
        print("  ".join(f"{row[name]:<{width}}" for name, width in widths.items()).rstrip())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, hours = int(seconds // 60) % 60, int(seconds // 3600)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {int(seconds) % 60:02d} s"
