"""The `hopescale` command: one sub-command for each thing a user does."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hopescale import __version__
from hopescale.cli_settings import Json, Overrides, Settings, WithSettings, finish
from hopescale.errors import UserError, describe
from hopescale.slurm_commands import runs_app, slurm_app

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Train HOPE predictors on clips."
)
data_app = typer.Typer(no_args_is_help=True, help="Make data sets: pixels, features, shards.")
app.add_typer(data_app, name="data")
app.add_typer(slurm_app, name="slurm")
app.add_typer(runs_app, name="runs")


@app.command()
def demo(overrides: Overrides = None, as_json: Json = False) -> None:
    """Simulate, encode, shard, train on two ranks, evaluate and report: the whole path, on this machine."""
    from hopescale.demo import run_demo

    finish(run_demo(overrides or [], progress), as_json)


@app.command()
def train(overrides: Overrides = None) -> None:
    """Train in this process (one rank). For more: torchrun … -m hopescale.train KEY=VALUE…."""
    from hopescale.parallel.process_group import end_process
    from hopescale.train import main as train_main

    end_process(train_main(overrides or []))


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    overrides: Overrides = None,
    pixels: Annotated[Path | None, typer.Option(help="Folder of the clips' pixels, for filmstrips.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a run's newest checkpoint on all held-out clips, with baselines and ablations."""
    from hopescale.evaluate_run import evaluate_run
    from hopescale.report.tables import print_result

    result = evaluate_run(run, overrides or [], pixels)
    if not as_json:
        print_result(result)
        print(f"written to {run / 'result.json'}; `hopescale report {run}` draws it")
    finish(result, as_json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    dashboard: Annotated[
        str | None,
        typer.Option(metavar="URL|FILE", help="Instead, draw a dashboard of what this Prometheus has of the run."),
    ] = None,
    board: Annotated[
        str, typer.Option(help="Which one: overview, optimizer, data, reliability or nodes.")
    ] = "overview",
    run_label: Annotated[
        str | None, typer.Option(help="Value of the label run, if it is not the folder's name.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw a run's figures and write one self-contained HTML page, or draw a dashboard into RUN/report/dashboard.png.

    What Prometheus answered is kept beside the picture: --dashboard RUN/report/dashboard.json draws it again.
    """
    if dashboard is not None:
        from hopescale.report.dashboard import write_dashboard

        picture, answers = write_dashboard(run, dashboard, board=board, run_label=run_label)
        print(picture)
        return finish({"dashboard": str(picture), "answers": str(answers)}, as_json)
    from hopescale.report.page import write_report

    page = write_report(run)
    print(page)
    finish({"report": str(page)}, as_json)


@app.command("import-checkpoint")
def import_checkpoint(
    source: Annotated[Path, typer.Argument(help="Lightning .ckpt or state dict of the earlier AC-HOPE-ViT.")],
    out: Annotated[Path, typer.Argument(help="Run folder to make.")],
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(min=0, help="Optimizer steps the checkpoint counts as.")] = 0,
    as_json: Json = False,
) -> None:
    """Make a run of an earlier predictor's checkpoint, to evaluate it or to train it on.

    model=ac_hope computes exactly what the earlier predictor did at phase 5 (its file in configs/model names the other
    phases' settings); model.compat=none takes the weights into this model instead. Tensors alone are read; all that are
    missing, left over or of another shape are named at once.
    """
    from hopescale.import_checkpoint import import_checkpoint as import_run
    from hopescale.parallel.process_group import end_process

    result = import_run(source, out, overrides or [], step)
    if not as_json:
        print(f"{result['checkpoint']}: {result['parameters']:,} parameters; {result['note']}")
        if result["unused"]:
            print(f"left out, for nothing ever used them: {', '.join(result['unused'])}")
    finish(result, as_json)
    end_process(0)


@app.command(cls=WithSettings)
def plan(
    overrides: Overrides = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="A table over ranks and recompute modes instead.")] = False,
    plot: Annotated[Path | None, typer.Option(help="PNG of the sweep.")] = None,
    as_json: Json = False,
) -> None:
    """Memory, traffic and time of a job on machines you do not have, from closed formulas; nothing is built or read.

    nodes=8 gpus_per_node=8 hardware=h100 are short for cluster.nodes and so on; the engine is that of parallel=...
    """
    from hopescale.plan.command import plan_command

    result, text = plan_command(overrides or [], sweep=sweep or plot is not None, plot=plot)
    if not as_json:
        print(text)
    finish(result, as_json)


@app.command()
def doctor(overrides: Overrides = None, as_json: Json = False) -> None:
    """Look at what a run needs of this machine: versions, devices, network, files, data, Slurm.

    Settings of a run say what it needs: run.root, data.path, parallel. Exit code 1 if a line fails.
    """
    from dataclasses import asdict

    from hopescale.config.compose import load_config
    from hopescale.doctor import examine

    findings = examine(load_config(overrides or []))
    if not as_json:
        width = max(len(finding.what) for finding in findings)
        for finding in findings:
            print(f"{finding.state:<5} {finding.what:<{width}}  {finding.found}")
            if finding.fix:
                print(f"{'':<{width + 6}}  -> {finding.fix}")
    failed = sum(finding.state == "FAIL" for finding in findings)
    finish({"failed": failed, "findings": [asdict(finding) for finding in findings]}, as_json)
    raise typer.Exit(1 if failed else 0)


@data_app.command(cls=WithSettings)
def simulate(
    out: Annotated[Path, typer.Argument(help="Folder for the pixels.")],
    overrides: Settings = None,
    as_json: Json = False,
) -> None:
    """Simulate clips of a pushed block.

    Settings: num_train and num_heldout (clips of each partition), frames, size (pixels), seed, partitions=[base,...].
    The partition hidden, a probe for memories, is made only when named.
    """
    from hopescale.data_commands import simulate_pixels

    _finish_data(simulate_pixels(out, overrides or [], progress), as_json)


@data_app.command(cls=WithSettings)
def encode(
    pixels: Annotated[Path, typer.Argument(help="Folder of pixels, or of videos: KEY.mp4 and KEY.actions.npy.")],
    out: Annotated[Path, typer.Argument(help="Folder for the features.")],
    overrides: Settings = None,
    encoder: Annotated[str | None, typer.Option(help="The same as encoder=…")] = None,
    weights: Annotated[str | None, typer.Option(help="The same as weights=…")] = None,
    as_json: Json = False,
) -> None:
    """Turn pixels or videos into features. The same command again goes on where it was interrupted.

    Settings: encoder (efficientnet-lite0, vjepa2 or module:function), weights (a folder or a hub id), mode (per-frame,
    prefix or clip), dtype (float16, float32 or bfloat16), device (cpu or cuda), batch_frames, size (pixels), alignment
    (of actions), on_error (fail or skip), part (i/n, i from 0); of videos also frames, fps and heldout. Under torchrun
    every rank encodes a part, with device=cuda on a GPU of its own.
    """
    from hopescale.data_commands import encode_pixels
    from hopescale.parallel.process_group import read_launch

    options = {"encoder": encoder, "weights": weights}
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    result = encode_pixels(pixels, out, [*given, *(overrides or [])], progress)
    if read_launch().is_first:
        _finish_data(result, as_json)
        if result["digest"] is None and not as_json:
            index, count = result["part"]
            print(f"part {index} of {count} is done; the last one to finish completes the folder")


@data_app.command(cls=WithSettings)
def shard(
    source: Annotated[str, typer.Argument(help="Folder or file of clips, e.g. what `data encode` wrote.")],
    out: Annotated[Path, typer.Argument(help="Folder for the data set.")],
    overrides: Settings = None,
    part: Annotated[str | None, typer.Option(help="The same as part=…")] = None,
    container: Annotated[str | None, typer.Option("--format", help="The same as format=…")] = None,
    as_json: Json = False,
) -> None:
    """Pack clips into WebDataset tars with an index. The same command again goes on where it was interrupted.

    Settings: clips_per_shard (0 fills half a GiB), seed, dtype (keep, float32, float16, bfloat16 or int8), statistics
    (auto, all or sample), format (tar, or zarr for analysis), max_error, on_error (fail or skip), max_bad_fraction,
    workers, part (i/n, i from 0; `data merge` completes the data set), paranoid (hash finished shards again), dry_run.
    Of the source: kind, partitions=[NAME=FIRST..END,...], split (heldout=0.1 or heldout_last=0.1), source.OPTION,
    provenance.ENTRY.
    """
    from hopescale.shard_commands import shard_clips

    options = {"part": part, "format": container}
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    _finish_data(shard_clips(source, out, [*given, *(overrides or [])], progress), as_json)


@data_app.command("merge")
def merge(
    out: Annotated[Path, typer.Argument(help="Folder that all parts were written to.")], as_json: Json = False
) -> None:
    """Complete a data set whose parts were written by `data shard part=i/n`; a complete one is left as it is."""
    from hopescale.shard_commands import merge_shards

    _finish_data(merge_shards(out), as_json)


@data_app.command("verify", cls=WithSettings)
def verify_data(
    dataset: Annotated[Path, typer.Argument(help="Folder of a data set.")],
    overrides: Settings = None,
    repair: Annotated[bool, typer.Option("--repair", help="Make damage good; shards from source=PATH.")] = False,
    quarantine: Annotated[Path | None, typer.Option(help="File for the damaged clips' keys: data.skip_list.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read shards.")] = 1,
    as_json: Json = False,
) -> None:
    """Check a data set. Exit code 0: sound; 1: damaged, and what; 2: not usable as a data set.

    Settings: level=quick (index and sizes), crc (every field of every clip), or full (every byte, and the tars);
    source=PATH, for --repair.
    """
    from hopescale.dataset_commands import verify_dataset

    result, code = verify_dataset(
        dataset, overrides or [], workers=workers, repair=repair, quarantine=quarantine, bar=progress
    )
    finish(result, as_json)
    raise typer.Exit(code)


@data_app.command("inspect", cls=WithSettings)
def inspect_data(
    dataset: Annotated[Path, typer.Argument(help="Folder of a data set.")],
    overrides: Settings = None,
    png: Annotated[Path | None, typer.Option(help="Picture of the features: colours, a tile a frame.")] = None,
    as_json: Json = False,
) -> None:
    """Show what is in a data set. Settings: key=KEY shows one clip."""
    from hopescale.dataset_commands import inspect_dataset

    finish(inspect_dataset(dataset, overrides or [], png, quiet=as_json), as_json)


@data_app.command("index", cls=WithSettings)
def index_data(
    folder: Annotated[Path, typer.Argument(help="Folder of .tar files: KEY.features.npy, KEY.actions.npy, ….")],
    overrides: Settings = None,
    as_json: Json = False,
) -> None:
    """Make a data set of tars where they lie, by an index beside them; the tars are not touched.

    Settings: fields=features:NAME,actions:NAME (members without their key), tokens (of a frame, for features
    [F * N, E]), features_dtype (of unsigned integers), encode_mode, encoder, action_alignment,
    partitions=[NAME=FIRST..END,...], split (heldout=0.1 or heldout_last=0.1), statistics (auto, all or sample),
    workers, replace (index anew).
    """
    from hopescale.dataset_commands import index_folder

    _finish_data(index_folder(folder, overrides or [], progress), as_json)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def progress(label: str) -> Callable[[int, int], None]:
    """A bar on a terminal, a line every tenth of the way elsewhere; called with (done, total)."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return _plain_progress(label)
    bar = Progress(
        TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=False
    )
    task = bar.add_task(label, total=None)
    bar.start()
    # An error on the way must not leave the terminal without its cursor.
    atexit.register(bar.stop)

    def update(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if done >= total:
            bar.stop()

    return update


def _plain_progress(label: str) -> Callable[[int, int], None]:
    printed = -1

    def update(done: int, total: int) -> None:
        nonlocal printed
        tenth = 10 * done // max(total, 1)
        if tenth > printed:
            printed = tenth
            print(f"{label}: {done}/{total}", file=sys.stderr, flush=True)

    return update


def _finish_data(result: dict[str, Any], as_json: bool) -> None:
    if not as_json:
        print(f"{result['out']}: {result['clips']} clips")
    finish(result, as_json)


def main() -> None:
    """Entry point: mistakes of the user end in one paragraph each and their exit code, without a traceback."""
    try:
        app()
    except UserError as error:
        print(describe(error), file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
