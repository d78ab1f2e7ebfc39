"""`hopescale data verify`, `data inspect` and `data index`: what they check, and how they say it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from data_pipeline.dataset.findings import Finding, VerifyReport
from data_pipeline.dataset.index_tars import index_tars
from data_pipeline.dataset.inspect import InspectedDataset, describe, describe_clip
from data_pipeline.dataset.tar_listing import IndexSettings
from data_pipeline.dataset.verify import verify
from hopescale.data_commands import Bar, byte_text, parse_settings, readable_folder, with_rules
from hopescale.errors import ConfigError, DataError, Problem
from hopescale.errors import describe as described

EXIT_UNUSABLE = 2
_SHOWN = 20
_STRIP_CLIPS = 6
_VERIFY: dict[str, Any] = {"level": "crc", "source": str}
_INDEX: dict[str, Any] = {
    **{field.name: field.default for field in fields(IndexSettings)},
    "tokens": int,
    **dict.fromkeys(("features_dtype", "encode_mode", "encoder", "action_alignment", "split"), str),
    "workers": 1,
    "replace": False,
}


def verify_dataset(
    folder: Path, settings: Sequence[str], *, workers: int, repair: bool, quarantine: Path | None, bar: Bar
) -> tuple[dict[str, Any], int]:
    """Check a data set and print what was found.

    Returns:
        The report as JSON values, and the exit code: 0 sound, 1 damaged, 2 not usable as a data set.

    Raises:
        ConfigError: Unknown settings.
    """
    values = parse_settings(settings, _VERIFY)
    if quarantine is not None and (quarantine.is_dir() or not quarantine.parent.is_dir()):
        rule = "is a folder" if quarantine.is_dir() else "lies in a folder that does not exist"
        raise ConfigError(Problem("--quarantine", quarantine, rule, "name a file in a folder that exists"))
    try:
        report = verify(
            readable_folder(folder, "dataset"),
            workers=workers,
            repair=repair,
            quarantine=quarantine,
            progress=_from_first_call(bar, "verify"),
            **values,
        )
    except DataError as error:
        print(described(error))
        problems = [{name: str(value) for name, value in asdict(problem).items()} for problem in error.problems]
        return {"state": "unusable", "dataset": str(folder), "problems": problems}, EXIT_UNUSABLE
    _print_report(report, None if report.not_checked else quarantine)
    if quarantine is not None and report.not_checked:
        print(f"{quarantine}: not written, for the clips were not checked")
    return report.as_dict(), report.exit_code


def index_folder(folder: Path, settings: Sequence[str], bar: Bar) -> dict[str, Any]:
    """Index the tars in a folder where they lie.

    Raises:
        UserError: Unknown settings, or what `index_tars` refuses.
    """
    values = parse_settings(with_rules(settings), _INDEX)
    own = {name: values.pop(name) for name in ("workers", "replace") if name in values}
    manifest = index_tars(
        readable_folder(folder, "tars"), IndexSettings(**values), progress=_from_first_call(bar, "index"), **own
    )
    shards = [asdict(entry) for entry in manifest.shards]
    result = {"out": str(folder), "clips": manifest.num_clips, "shards": shards, "fingerprint": manifest.fingerprint}
    return result | {"partitions": manifest.partitions, "encode_mode": manifest.provenance.encode_mode}


def inspect_dataset(folder: Path, settings: Sequence[str], png: Path | None, *, quiet: bool) -> dict[str, Any]:
    """Describe a data set, or one clip of it, and draw its features.

    Args:
        folder: Of the data set.
        settings: `key=KEY` chooses a clip.
        png: File of the picture, or None.
        quiet: Print no tables.

    Raises:
        UserError: Unknown settings, no such clip, an unusable data set, or no matplotlib for the picture.
    """
    values = parse_settings(settings, {"key": str})
    dataset = InspectedDataset(readable_folder(folder, "dataset"))
    row = dataset.row(values["key"]) if "key" in values else None
    result = describe(dataset) if row is None else describe_clip(dataset, row)
    if not quiet:
        _print_dataset(result) if row is None else _print_clip(result)
    if png is not None:
        from hopescale.report.clip_strip import clip_strip

        rows = dataset.first_rows(_STRIP_CLIPS) if row is None else [row]
        names = [each.key for each in rows]
        figure = clip_strip([dataset.normalised(each) for each in rows], names, dataset.manifest.provenance.grid)
        try:
            figure.savefig(png, format="png")
        except OSError as error:
            rule = f"cannot be written ({error.strerror})"
            raise ConfigError(Problem("--png", png, rule, "name a file in a folder that exists")) from error
        result["png"] = str(png)
        if not quiet:
            print(png)
    return result


def _from_first_call(bar: Bar, label: str) -> Callable[[int, int], None]:
    """A bar that starts when there is something to show, and anew when the work starts anew."""
    update, last = None, 0

    def progress(done: int, total: int) -> None:
        nonlocal update, last
        if update is None or done < last:
            update = bar(label)
        last = done
        update(done, total)

    return progress


def _print_report(report: VerifyReport, quarantine: Path | None) -> None:
    state = "sound" if report.sound else f"damaged: {report.num_findings} findings"
    read = f", {byte_text(report.bytes_read)} read" if report.bytes_read else ""
    print(f"{report.dataset}: {state} (level {report.level}; {report.clips} clips in {report.shards} shards{read})")
    if report.findings:
        _print_table(["where", "what"], [_cells(finding) for finding in report.findings[:_SHOWN]])
    if report.num_findings > _SHOWN:
        print(f"and {report.num_findings - _SHOWN} more findings; --json lists up to {len(report.findings)}")
    if report.not_checked:
        print(report.not_checked)
    for name in report.repaired:
        print(f"{name}: made again, with the sha256 it had")
    for name, why in report.not_repaired.items():
        print(f"{name}: not made again: {why}")
    if quarantine is not None:
        print(f"{quarantine}: {len(report.damaged_clips)} damaged clips; data.skip_list={quarantine} leaves them out")


def _cells(finding: Finding) -> list[str]:
    at = None if finding.offset is None else f"at byte {finding.offset}"
    where = " ".join(str(part) for part in (finding.shard, finding.clip, finding.field, at) if part is not None)
    values = {"expected": finding.expected, "found": finding.actual}
    figures = ", ".join(f"{_short(str(value))} {name}" for name, value in values.items() if value is not None)
    return [where, f"{finding.text}: {figures}" if figures else finding.text]


def _short(text: str) -> str:
    """A digest by its first digits; anything else as it is."""
    return f"{text[:12]}…" if len(text) == 64 and text.isalnum() else text


def _print_dataset(result: Mapping[str, Any]) -> None:
    frames, provenance, size = result["frames"], result["provenance"], byte_text(result["bytes"]["shards"])
    lines = {
        "clips": f"{result['clips']} in {result['shards']} {result['container']} shards, {size}",
        "frames": f"{frames['all']}; a clip has {frames['least']} to {frames['most']}",
        "features": f"{result['tokens']} tokens x {result['channels']} channels, grid {list(provenance['grid'])}",
        "actions": f"{result['widths']['actions']} numbers, {result['action_alignment']}",
        "encode_mode": provenance["encode_mode"],
        "encoder": provenance["encoder"],
        "weights": provenance["weights_sha256"] or "not recorded",
        "preprocessing": provenance["preprocessing"],
        "source": provenance["source"],
        "conversion": _conversion(result["conversion"]),
        "fingerprint": result["fingerprint"],
        "checksums": result["checksum"],
    }
    _print_table(["", result["dataset"]], [[name, _short(str(value))] for name, value in lines.items()])
    fields = [[name, kind, byte_text(result["bytes"][name])] for name, kind in result["dtypes"].items()]
    _print_table(["field", "type", "values"], fields)
    parts = result["partitions"].items()
    rows = [[name, *(str(counts[part]) for part in ("train", "heldout", "frames"))] for name, counts in parts]
    _print_table(["partition", "train", "heldout", "frames"], rows)
    _print_statistics(result["statistics"], result["statistics_share"])


def _print_statistics(statistics: Mapping[str, Any], share: float) -> None:
    channels = statistics.get("features")
    if channels is not None:
        largest = ", ".join(f"{channel}: {value:.3g}" for channel, value in channels["largest_channels"].items())
        print(
            f"features of {share:.3g} of the training tokens: mean {channels['mean']:.3g}, std {channels['std']:.3g}, "
            f"largest {channels['absmax']:.3g} (median channel {channels['absmax_median_channel']:.3g}; {largest})"
        )
    fields = {name: each.get("partitions", {}) if name == "features" else each for name, each in statistics.items()}
    rows = [
        [name, partition, str(figures["rows"]), *(_numbers(figures[part]) for part in ("mean", "std", "min", "max"))]
        for name, partitions in fields.items()
        for partition, figures in partitions.items()
    ]
    if rows:
        _print_table(["field", "partition", "rows", "mean", "std", "min", "max"], rows)


def _print_clip(result: Mapping[str, Any]) -> None:
    place = (result["split"], result["partition"], f"{result['frames']} frames", result["shard"])
    print(f"{result['key']}: {', '.join(place)}")
    rows = [
        [name, each["dtype"], str(each["shape"]), str(each["offset"]), byte_text(each["bytes"])]
        + [f"{each[part]:.4g}" for part in ("mean", "std", "min", "max")]
        for name, each in result["fields"].items()
    ]
    _print_table(["field", "type", "shape", "offset", "bytes", "mean", "std", "min", "max"], rows)


def _conversion(conversion: Mapping[str, Any] | None) -> str:
    if conversion is None:
        return "none"
    return (
        f"{conversion['from_dtype']} to {conversion['to_dtype']}: relative error {conversion['relative_rmse']:.2g}, "
        f"{conversion['relative_rmse_normalised']:.2g} after LayerNorm, least cosine {conversion['min_cosine']:.5f}"
    )


def _numbers(values: Sequence[float]) -> str:
    shown = " ".join(f"{value:.3g}" for value in values[:4])
    return f"{shown} …" if len(values) > 4 else shown


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for title in header:
        table.add_column(Text(title), overflow="fold")
    for row in rows:
        # Text, not str: a clip called "[red]" is a name, not markup.
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
