"""One shard from its clips: read, check, convert, write, summarise, and say so in the journal."""

from __future__ import annotations

import errno
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_pipeline.dataset.manifest import SHARD_FOLDER
from data_pipeline.dtypes import STORED_TYPES
from data_pipeline.errors import DataError, Problem
from data_pipeline.schema import ROW_FIELDS
from data_pipeline.shard.convert import (
    LARGEST,
    Converted,
    Deviation,
    all_below,
    all_finite,
    as_float32,
    converted,
    first_not_finite,
    rounded,
)
from data_pipeline.shard.journal import Rounding, ShardRecord, WrittenClip, WrittenFile, write_record
from data_pipeline.shard.plan import SKIP_OR_REPAIR, OnError, Plan, PlannedClip
from data_pipeline.shard.statistics import Statistics, frame_blocks, sampled, token_groups
from data_pipeline.shard.tar import Payload, ShardWriter
from data_pipeline.shard.zarr_output import ZarrShardWriter
from data_pipeline.sources.base import SkippedClip, Source, SourceClip

CONVERSION = "conversion"
_DISK_ERRORS = {
    errno.EIO,
    errno.ENXIO,
    errno.ENODEV,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EREMOTEIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
}


@dataclass(frozen=True)
class Job:
    """What all shards of a run are written by.

    Attributes:
        source: Where clips are read from.
        out: Folder of the data set.
        plan: Of the data set; its list of clips is not needed here.
        on_error: fail ends the run at a clip that cannot be used, skip leaves it out.
        max_error: Largest relative error that a conversion of the features may make in a clip, over the tokens that the
            plan's statistics take.
        max_bad_fraction: For the record; who writes many shards judges it over all.
    """

    source: Source
    out: Path
    plan: Plan
    on_error: OnError
    max_error: float
    max_bad_fraction: float = 1.0


@dataclass(frozen=True)
class _Prepared:
    arrays: dict[str, np.ndarray]
    rounded: dict[str, Rounding]
    deviation: Deviation | None


def write_shard(job: Job, number: int, clips: Sequence[PlannedClip], clip_done: Callable[[], None]) -> ShardRecord:
    """Write one shard and its record.

    Args:
        job: How.
        number: Of the shard in the plan.
        clips: Of the shard.
        clip_done: Called after each clip.

    Raises:
        DataError: A clip cannot be used, and none may be left out; or the target cannot be written.
    """
    name = job.plan.shards[number].name
    with writing(job.out):
        writer = _TarShard(job, name) if job.plan.settings.format == "tar" else _ZarrShard(job, number)
    statistics, deviation, worst = _statistics(job.plan), Deviation(), 0.0
    groups = token_groups(job.plan.fields["features"].shape[0], job.plan.sample_every)
    written: list[WrittenClip] = []
    skipped: list[SkippedClip] = []
    rounding: dict[str, Rounding] = {}
    reordered: Counter[str] = Counter()
    try:
        for place, planned in enumerate(clips):
            try:
                ready = _prepared(job, planned, groups, deviation)
            except DataError as error:
                if job.on_error == "fail" or _is_of_the_disk(error):
                    raise
                reason = "; ".join(problem.rule for problem in error.problems)
                skipped.append(SkippedClip(planned.clip.key, planned.clip.where, reason))
                clip_done()
                continue
            with writing(job.out):
                payloads = writer.add(planned.clip, ready.arrays, place)
            written.append(_written(planned, ready.arrays, payloads))
            reordered.update(name for name, spec in planned.clip.arrays.items() if spec.fortran)
            if planned.clip.split == "train":
                statistics.add(ready.arrays, planned.partition, planned.phase)
            for field, one in ready.rounded.items():
                rounding[field] = rounding.get(field, Rounding()).plus(one)
            if ready.deviation is not None:
                deviation.merge(ready.deviation)
                worst = max(worst, error_of(ready.deviation))
            clip_done()
        with writing(job.out):
            files = writer.finish() if written else {}
            if not written:
                writer.discard()
    except BaseException:
        # A folder that cannot be written cannot be cleaned either; the first error is the one to show.
        with suppress(OSError):
            writer.discard()
        raise
    record = ShardRecord(
        plan=job.plan.digest,
        name=name,
        files=files,
        clips=tuple(written),
        skipped=tuple(skipped),
        rounded=rounding,
        max_error=job.max_error,
        worst_error=worst,
        reordered=dict(reordered),
        max_bad_fraction=job.max_bad_fraction,
    )
    parts = statistics.arrays() | {CONVERSION: np.append(deviation.sums, deviation.min_cosine)}
    with writing(job.out):
        write_record(job.out, record, parts)
    return record


def error_of(deviation: Deviation) -> float:
    """Return the error that `max_error` limits: before or after LayerNorm, whichever is larger; infinite if unknown."""
    error = np.max([deviation.relative_rmse, deviation.relative_rmse_normalised])
    return float(error) if np.isfinite(error) else math.inf


def _is_of_the_disk(error: BaseException | None) -> bool:
    """Return whether an error comes from a disk or a network that gives out, and says nothing about the clip."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            return True
        error = error.__cause__
    return False


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn what a file system says into an error that tells how to go on.

    Raises:
        DataError: Instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        path = error.filename or out
        again = "then run the same command again: finished shards are kept"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            fix = f"make room, {again}"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            fix = f"make the folder writable or name another one, {again}"
        else:
            fix = f"look after the file system, {again}"
        raise DataError(Problem("out", path, f"cannot be written ({error.strerror or error})", fix)) from error


class _TarShard:
    def __init__(self, job: Job, name: str) -> None:
        self._plan = job.plan
        self._writer = ShardWriter(job.out / SHARD_FOLDER / f"{name}.tar", job.plan.checksum)

    def add(self, clip: SourceClip, arrays: Mapping[str, np.ndarray], place: int) -> dict[str, Payload]:
        return self._writer.add(clip.key, arrays, clip_meta(self._plan, clip))

    def finish(self) -> dict[str, WrittenFile]:
        sha256 = self._writer.finish()
        return {self._writer.path.name: WrittenFile(self._writer.num_bytes, sha256)}

    def discard(self) -> None:
        self._writer.discard()


class _ZarrShard:
    def __init__(self, job: Job, number: int) -> None:
        self._writer = ZarrShardWriter(job.out, job.plan, number)

    def add(self, clip: SourceClip, arrays: Mapping[str, np.ndarray], place: int) -> dict[str, Payload]:
        return self._writer.add(arrays, place)

    def finish(self) -> dict[str, WrittenFile]:
        return self._writer.finish()

    def discard(self) -> None:
        self._writer.discard()


def clip_meta(plan: Plan, clip: SourceClip) -> bytes:
    """Return the content of KEY.meta.json."""
    content = {
        "action_alignment": plan.action_alignment,
        "dtypes": {name: planned.stored for name, planned in plan.fields.items()},
        "encode_mode": plan.provenance.encode_mode,
        "encoder": plan.provenance.encoder,
        "key": clip.key,
        "length": clip.length,
        "partition": clip.partition,
        "split": clip.split,
    }
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _statistics(plan: Plan) -> Statistics:
    features = plan.fields["features"]
    widths = {name: plan.fields[name].shape[0] for name in ROW_FIELDS if name in plan.fields}
    frame = (features.shape[0], features.shape[1])
    return Statistics(frame, widths, len(plan.partitions), plan.sample_every, feature_type=features.stored)


def _written(planned: PlannedClip, arrays: Mapping[str, np.ndarray], payloads: Mapping[str, Payload]) -> WrittenClip:
    return WrittenClip(
        key=planned.clip.key,
        partition=planned.partition,
        split=planned.clip.split or "train",
        length=planned.clip.length,
        rows=len(arrays["actions"]),
        phase=planned.phase,
        fields={name: (place.offset, place.nbytes, place.checksum) for name, place in payloads.items()},
        frames=payloads["features"].frame_checksums,
    )


def _prepared(job: Job, planned: PlannedClip, groups: list[np.ndarray], total: Deviation) -> _Prepared:
    clip, fields = planned.clip, job.plan.fields
    read = job.source.read(clip)
    for name, spec in clip.arrays.items():
        if name not in read or read[name].shape != spec.shape or read[name].dtype != _numpy_type(spec.dtype):
            found = f"{read[name].dtype} {list(read[name].shape)}" if name in read else "nothing"
            raise _unusable(clip, f"{name} was listed as {spec.dtype} {list(spec.shape)} and read as {found}")
        normalised = name.startswith("features")
        if all_below(read[name], spec.dtype) if normalised else all_finite(read[name], spec.dtype):
            continue
        if all_finite(read[name], spec.dtype):
            rule = f"{name} holds numbers beyond {LARGEST:g}, whose squares float32 cannot add up"
            raise _unusable(clip, f"{rule}: neither LayerNorm nor the statistics would be finite")
        place, value = first_not_finite(read[name], spec.dtype)
        raise _unusable(clip, f"{name} holds {value} at {list(place)}: all values must be finite")
    arrays: dict[str, np.ndarray] = {}
    rounding: dict[str, Rounding] = {}
    for name, planned_field in fields.items():
        if name == "features" or name not in read:
            continue
        arrays[name], changed, largest = rounded(read[name], planned_field.source)
        if not all_finite(arrays[name], "float32"):
            raise _unusable(clip, f"{name} holds a number that float32 cannot hold")
        if planned_field.source not in STORED_TYPES:
            rounding[name] = Rounding(arrays[name].size, changed, largest)
    features = fields["features"]
    if features.source == features.stored:
        return _Prepared(arrays | {"features": read["features"]}, rounding, None)
    scale = read.get("features_scale")
    result = converted(read["features"], scale, features.source, features.stored)
    if result.overflows:
        # What was left out for it counts too: it says why.
        total.sums[-1] += result.overflows
        raise _unusable(clip, _overflow(read["features"], scale, features.source, features.stored, result.overflows))
    deviation = _deviation(read["features"], scale, features.source, features.stored, result, groups, planned.phase)
    if (error := error_of(deviation)) > job.max_error:
        rule = (
            f"storing its features as {features.stored} changes them by {error:.3g} of their size, more than max_error"
        )
        over = "" if len(groups) == 1 else f" (over one of {len(groups)} tokens)"
        raise _unusable(clip, f"{rule}={job.max_error:g}{over}", "set another dtype, or raise max_error")
    arrays |= {"features": result.values} | ({} if result.scale is None else {"features_scale": result.scale})
    return _Prepared(arrays, rounding, deviation)


def _deviation(
    values: np.ndarray,
    scale: np.ndarray | None,
    source: str,
    stored: str,
    result: Converted,
    groups: list[np.ndarray],
    phase: int,
) -> Deviation:
    deviation, wide = Deviation(), source not in STORED_TYPES
    for first, end in frame_blocks(values.shape, len(groups)):
        before = sampled(values[first:end], source, scale, groups, phase + first, wide=wide)
        after = sampled(result.values[first:end], stored, result.scale, groups, phase + first, wide=wide)
        if len(before):
            deviation.add(before, after)
    return deviation


def _overflow(values: np.ndarray, scale: np.ndarray | None, source: str, stored: str, count: int) -> str:
    limit = torch.finfo(torch.float32 if stored == "int8" else STORED_TYPES[stored].torch).max
    numbers = as_float32(values, source, scale)
    place = int(numbers.abs().argmax())
    # float64 numbers may be infinite as float32.
    largest = float(numbers.flatten()[place]) if source in STORED_TYPES else float(values.flat[place])
    return f"features hold {count} numbers that {stored} cannot hold, e.g. {largest:g}; its largest is {limit:g}"


def _numpy_type(name: str) -> np.dtype:
    stored = STORED_TYPES.get(name)
    return np.dtype(name) if stored is None else stored.numpy


def _unusable(clip: SourceClip, rule: str, fix: str = SKIP_OR_REPAIR) -> DataError:
    return DataError(Problem("source", f"{clip.where}, clip {clip.key}", f"{rule}", fix))
