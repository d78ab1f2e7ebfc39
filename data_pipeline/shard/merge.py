"""From finished shards to a data set: index, keys, statistics, report, and the manifest last."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data_pipeline.cache import file_sha256, write_json
from data_pipeline.dataset.group_files import GROUP, GROUP_FILES, group_digest, write_group_files
from data_pipeline.dataset.index import IndexWriter, Row
from data_pipeline.dataset.manifest import MANIFEST_FILE, SHARD_FOLDER, load_manifest, write_manifest
from data_pipeline.dataset.new_manifest import new_manifest
from data_pipeline.errors import DataError, Problem
from data_pipeline.schema import Conversion, Manifest, ShardEntry
from data_pipeline.shard.convert import Deviation
from data_pipeline.shard.journal import (
    JOURNAL_FOLDER,
    REPORT_FILE,
    Rounding,
    ShardRecord,
    WrittenClip,
    is_complete,
    read_plan,
    read_record,
    read_statistics,
    remove_leftovers,
    remove_statistics,
)
from data_pipeline.shard.lock import PLAN_LOCK, PartLock, remove_unheld
from data_pipeline.shard.plan import Plan
from data_pipeline.shard.statistics import Summary, merged
from data_pipeline.shard.worker import CONVERSION, writing
from data_pipeline.shard.zarr_output import write_group
from data_pipeline.sources.base import SkippedClip

_AGAIN = (
    "run `hopescale data shard` for the missing parts, with the settings of the others; without part it writes "
    "whatever is missing"
)


def merge(out: Path) -> Manifest:
    """Complete a data set whose shards are all finished; one that is complete is left as it is.

    Args:
        out: Folder of the data set.

    Returns:
        The manifest.

    Raises:
        DataError: Shards are missing, somebody still writes some, or the folder cannot be written.
    """
    if (out / MANIFEST_FILE).is_file():
        return load_manifest(out, field="out")
    if not out.is_dir():
        raise DataError(Problem("out", out, "the folder does not exist", _AGAIN))
    plan = read_plan(out)
    with writing(out), PartLock(out, "0/1"):
        return merge_plan(out, plan)


def merge_plan(out: Path, plan: Plan) -> Manifest:
    """Do what `merge` does, for whoever holds the lock of the whole data set."""
    remove_unheld(out / PLAN_LOCK)
    remove_leftovers(out, [shard.name for shard in plan.shards])
    records = _records(out, plan)
    _check_limits(plan, records)
    if not any(record.clips for record in records):
        skipped = next(record.skipped[0] for record in records if record.skipped)
        rule = f"every clip was left out; {skipped.key}: {skipped.reason}"
        raise DataError(Problem("source", plan.source.path, rule, "correct the source or the settings"))
    with writing(out):
        rows = _rows(plan, records)
        shards = _entries(out, plan, records)
        index = IndexWriter(tuple(plan.fields))
        for row in rows:
            index.add(row)
        files = index.write(out)
        if plan.settings.format == "zarr":
            files[GROUP_FILES] = file_sha256(out / GROUP_FILES)
        summary, deviation = _statistics(out, records)
        files |= summary.write(out, plan.partitions)
        conversion = _conversion(plan, deviation)
        _write_report(out, plan, records, conversion)
        write_manifest(out, _manifest(plan, rows, shards, files, conversion))
    remove_statistics(out, [record.name for record in records])
    return load_manifest(out, field="out")


def check_bad(left_out: Sequence[SkippedClip], clips: int, max_bad_fraction: float) -> None:
    """Refuse to go on when so many clips cannot be used that something else must be wrong.

    Args:
        left_out: Of all parts.
        clips: Of all parts, these included.
        max_bad_fraction: Share of them that may be left out; one always may.

    Raises:
        DataError: More are.
    """
    if len(left_out) > max(1, math.floor(max_bad_fraction * clips + 1e-9)):
        rule = f"{len(left_out)} of {clips} clips cannot be used, e.g. {left_out[0].key}: {left_out[0].reason}"
        fix = f"look after the source, or allow it: max_bad_fraction={math.ceil(100 * len(left_out) / clips) / 100:g}"
        raise DataError(Problem("max_bad_fraction", max_bad_fraction, rule, fix))


def _records(out: Path, plan: Plan) -> list[ShardRecord]:
    found = {shard.name: read_record(out, shard.name) for shard in plan.shards}
    records = [record for record in found.values() if record is not None and is_complete(out, plan, record)]
    missing = sorted(set(found) - {record.name for record in records})
    if missing:
        some = f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        rule = f"{len(missing)} of {len(found)} shards are not finished: {some}"
        raise DataError(Problem("out", out, rule, _AGAIN))
    return records


def _check_limits(plan: Plan, records: Sequence[ShardRecord]) -> None:
    """Refuse parts made with different limits, unless the strictest of them would have given the same."""
    if allowed := [record.max_bad_fraction for record in records if record.skipped]:
        left_out = [*plan.bad, *(clip for record in records for clip in record.skipped)]
        check_bad(left_out, plan.num_clips + len(plan.bad), min(allowed))
    limits = {record.max_error: record.name for record in records}
    strictest = min(limits, default=0.0)
    if len(limits) > 1 and any(record.skipped or record.worst_error > strictest for record in records):
        rule = "the parts were made with different limits: " + ", ".join(
            f"{name} with max_error={limit:g}" for limit, name in sorted(limits.items())[:3]
        )
        raise DataError(Problem("max_error", strictest, rule, "run all parts again with the same max_error"))


def _rows(plan: Plan, records: Sequence[ShardRecord]) -> list[Row]:
    """Return the index. Shards without any clip have no number, and a zarr group is one shard."""
    rows: list[Row] = []
    number = 0
    for record in records:
        rows += [clip.row(0 if plan.settings.format == "zarr" else number) for clip in record.clips]
        number += bool(record.clips)
    return rows


def _entries(out: Path, plan: Plan, records: Sequence[ShardRecord]) -> tuple[ShardEntry, ...]:
    if plan.settings.format == "tar":
        return tuple(
            ShardEntry(name, file.bytes, len(record.clips), file.sha256)
            for record in records
            for name, file in record.files.items()
        )
    write_group(out, plan, dict(_by_array_row(plan, records)))
    written = {name: file for record in records for name, file in record.files.items()}
    content = write_group_files(out, {name: (file.bytes, file.sha256) for name, file in written.items()})
    size = sum(each.bytes for each in content)
    return (ShardEntry(GROUP, size, sum(len(record.clips) for record in records), group_digest(content)),)


def _by_array_row(plan: Plan, records: Sequence[ShardRecord]) -> Iterator[tuple[int, WrittenClip]]:
    places = {key: row for row, (key, _) in enumerate(plan.clips)}
    for record in records:
        for clip in record.clips:
            yield places[clip.key], clip


def _statistics(out: Path, records: Sequence[ShardRecord]) -> tuple[Summary, Deviation]:
    """Merge in the order of the plan: floating-point sums depend on it, and nothing else may decide it."""
    deviation = Deviation()

    def parts() -> Iterator[dict[str, np.ndarray]]:
        for record in records:
            try:
                stored = read_statistics(out, record.name)
            except (OSError, ValueError, KeyError) as error:
                path = out / JOURNAL_FOLDER / f"{record.name}.npz"
                fix = f"remove {path.with_suffix('.json')} and run `hopescale data shard` again"
                raise DataError(Problem("out", path, f"cannot be read ({error})", fix)) from error
            conversion = stored.pop(CONVERSION)
            deviation.merge(Deviation(conversion[:-1], float(conversion[-1])))
            yield stored

    return merged(parts()), deviation


def _conversion(plan: Plan, deviation: Deviation) -> Conversion | None:
    features = plan.fields["features"]
    if features.source == features.stored:
        return None
    return Conversion(
        from_dtype=features.source,
        to_dtype=features.stored,
        relative_rmse=deviation.relative_rmse,
        relative_rmse_normalised=deviation.relative_rmse_normalised,
        min_cosine=deviation.min_cosine,
        overflows=int(deviation.sums[-1]),
    )


def _write_report(out: Path, plan: Plan, records: Sequence[ShardRecord], conversion: Conversion | None) -> None:
    rounded: dict[str, Rounding] = {}
    for record in records:
        for name, one in record.rounded.items():
            rounded[name] = rounded.get(name, Rounding()).plus(one)
    reordered = Counter[str]()
    for record in records:
        reordered.update(record.reordered)
    skipped = [*plan.bad, *(clip for record in records for clip in record.skipped)]
    notes = [
        f"{name}: {count} clips have it in Fortran order; it was stored in C order"
        for name, count in sorted(reordered.items())
    ]
    for name, planned in sorted(plan.fields.items()):
        if name == "features" or planned.source in ("", planned.stored):
            continue
        one = rounded.get(name, Rounding())
        size = f", by {one.largest:.2g} of their size at most" if one.changed else ""
        count = f"{one.changed} of {one.values} values changed" if one.values else "no value changed"
        notes.append(f"{name}: {planned.source} was stored as {planned.stored}; {count}{size}")
    if conversion is not None:
        notes.append(
            f"features: {conversion.from_dtype} was stored as {conversion.to_dtype}; relative error "
            f"{conversion.relative_rmse:.2g}, {conversion.relative_rmse_normalised:.2g} after LayerNorm, over "
            f"{'all tokens' if plan.sample_every == 1 else f'one of {plan.sample_every} tokens'} of all clips"
        )
    write_json(out / REPORT_FILE, {"skipped": [asdict(clip) for clip in skipped], "notes": notes})


def _manifest(
    plan: Plan,
    rows: Sequence[Row],
    shards: tuple[ShardEntry, ...],
    files: dict[str, str],
    conversion: Conversion | None,
) -> Manifest:
    return new_manifest(
        rows,
        widths={name: planned.shape for name, planned in plan.fields.items()},
        dtypes={name: planned.stored for name, planned in plan.fields.items()},
        partitions=plan.partitions,
        provenance=plan.provenance,
        action_alignment=plan.action_alignment,
        checksum=plan.checksum,
        container=plan.settings.format,
        shard_folder=SHARD_FOLDER,
        seed=plan.settings.seed,
        sample_every=plan.sample_every,
        conversion=conversion,
        shards=shards,
        files=files,
    )
