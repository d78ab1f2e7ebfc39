"""Clips of any source to a data set: planned, written by workers in shards that appear whole, and merged last."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from data_pipeline.dataset.manifest import MANIFEST_FILE, SHARD_FOLDER, load_manifest
from data_pipeline.errors import DataError, Problem, nearest
from data_pipeline.schema import MANIFEST_FORMAT, Manifest
from data_pipeline.shard.convert import FeatureType
from data_pipeline.shard.journal import (
    JOURNAL_FOLDER,
    PLAN_FILE,
    ShardRecord,
    is_complete,
    read_plan,
    read_record,
    remove_leftovers,
    remove_statistics,
    rewrite_record,
    write_plan,
)
from data_pipeline.shard.lock import PLAN_LOCK, PartLock, is_lock, waiting_lock
from data_pipeline.shard.merge import check_bad, merge_plan
from data_pipeline.shard.plan import (
    SHARD_VERSION,
    Container,
    OnError,
    Plan,
    PlannedClip,
    ShardSettings,
    SourceRecord,
    StatisticsMode,
    Work,
    clip_digest,
    differences,
    make_plan,
    part_of,
)
from data_pipeline.shard.pool import Finished, write_shards
from data_pipeline.shard.worker import Job, write_shard, writing
from data_pipeline.shard.zarr_output import require_zarr
from data_pipeline.sources.base import SkippedClip, Source
from data_pipeline.sources.stored import printable
from data_pipeline.stats import SharderStats

WHOLE = "0/1"
DEFAULT_MAX_ERROR = 0.05
DEFAULT_MAX_BAD_FRACTION = 0.01

_SOURCE_SETTINGS = {"options", "provenance", "partitions", "split"}

Progress = Callable[[int, int], None]
Report = Callable[[SharderStats], None]
Option = str | int | bool


@dataclass(frozen=True)
class RunSettings:
    """How a data set is written; what decides its bytes is in `ShardSettings`.

    Attributes:
        workers: Processes, each writing a shard of its own.
        on_error: fail ends the run at a clip that cannot be used; skip leaves it out and lists it in report.json. A
            disk that gives out ends the run in any case.
        max_error: Largest relative error that a conversion may make in a clip's features, judged by the tokens that the
            statistics are made of: all, or one of eight.
        max_bad_fraction: Largest share of the clips of a run that skip may leave out; one clip always may.
        paranoid: Compare finished shards by sha256 before they are kept, not only by size.
    """

    workers: int = 1
    on_error: OnError = "fail"
    max_error: float = DEFAULT_MAX_ERROR
    max_bad_fraction: float = DEFAULT_MAX_BAD_FRACTION
    paranoid: bool = False

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            DataError: Names all that are wrong.
        """
        problems = []
        if self.workers < 1:
            problems.append(Problem("workers", self.workers, "must be at least 1", "use the number of cores"))
        if self.on_error not in get_args(OnError):
            problems.append(Problem("on_error", self.on_error, "unknown", nearest(self.on_error, get_args(OnError))))
        if not 0 <= self.max_error < 1:
            problems.append(Problem("max_error", self.max_error, "must be at least 0 and below 1", "use 0.05"))
        if not 0 <= self.max_bad_fraction <= 1:
            problems.append(Problem("max_bad_fraction", self.max_bad_fraction, "must be 0 to 1", "use 0.01"))
        elif self.on_error == "fail" and self.max_bad_fraction != DEFAULT_MAX_BAD_FRACTION:
            rule = "has no effect with on_error=fail"
            problems.append(
                Problem("max_bad_fraction", self.max_bad_fraction, rule, "leave it out, or set on_error=skip")
            )
        if problems:
            raise DataError(problems)


@dataclass(frozen=True)
class OpenedClips:
    """A source, and how to open it again.

    Attributes:
        source: The source.
        record: For plan.json.
    """

    source: Source
    record: SourceRecord


def shard(
    source: Source | Path | str,
    out: Path,
    *,
    clips_per_shard: int = 0,
    seed: int = 0,
    dtype: FeatureType = "keep",
    statistics: StatisticsMode = "auto",
    format: Container = "tar",
    max_error: float = DEFAULT_MAX_ERROR,
    on_error: OnError = "fail",
    max_bad_fraction: float = DEFAULT_MAX_BAD_FRACTION,
    workers: int = 1,
    paranoid: bool = False,
    kind: str | None = None,
    options: Mapping[str, Option] | None = None,
    provenance: Mapping[str, object] | None = None,
    partitions: Sequence[str] = (),
    split: str | None = None,
    progress: Progress | None = None,
    report: Report | None = None,
) -> Manifest:
    """Write the clips of a source as a data set.

    The same call goes on where a killed one was, and leaves a complete data set as it is.

    Args:
        source: A source, or the path of one.
        out: New or empty folder, or what the same call has begun.
        clips_per_shard: See `ShardSettings`, as for seed, dtype, statistics and format.
        seed: Of the shuffle.
        dtype: Of the features.
        statistics: Over all training tokens, or a sample.
        format: tar or zarr.
        max_error: See `RunSettings`, as for on_error, max_bad_fraction, workers and paranoid.
        on_error: fail or skip.
        max_bad_fraction: Of the clips.
        workers: Processes. More than one need a script that starts its work under `if __name__ == "__main__":`.
        paranoid: Hash finished shards again.
        kind: Of a source given by its path, as for the next four; see `sources.open.open_source`.
        options: Of that kind.
        provenance: What the source does not know of itself.
        partitions: Rules for partitions.
        split: Rule for the split.
        progress: Called with (clips done, clips in all) after each clip.
        report: Called with cumulative numbers after each shard.

    Returns:
        The manifest of the finished data set.

    Raises:
        DataError: Clips or settings that cannot be used, `out` holds something else or cannot be written, or somebody
            else writes to it. Finished shards are kept.
    """
    settings = ShardSettings(clips_per_shard, seed, dtype, statistics, format)
    how = RunSettings(workers, on_error, max_error, max_bad_fraction, paranoid)
    clips = open_clips(source, kind=kind, options=options, provenance=provenance, partitions=partitions, split=split)
    manifest = shard_part(clips, out, settings, how, progress=progress, report=report)
    assert manifest is not None
    return manifest


def open_clips(
    source: Source | Path | str,
    *,
    kind: str | None = None,
    options: Mapping[str, Option] | None = None,
    provenance: Mapping[str, object] | None = None,
    partitions: Sequence[str] = (),
    split: str | None = None,
) -> OpenedClips:
    """Open a source by its path, or take one that is open; see `sources.open.open_source`.

    Raises:
        DataError: It cannot be opened, or an open one is given settings.
    """
    given: dict[str, object] = {
        "options": dict(options or {}),
        "provenance": dict(provenance or {}),
        "partitions": list(partitions),
        "split": split,
    }
    if not isinstance(source, Path | str):
        for name, value in {"kind": kind, **given}.items():
            if value:
                raise DataError(Problem(name, value, "the source is already open", "open it with this setting"))
        return OpenedClips(source, SourceRecord(source.kind, None, {}))
    from data_pipeline.sources.open import open_source

    opened = open_source(source, kind=kind, options=options, provenance=provenance, partitions=partitions, split=split)
    # A function is named by its module, everything else by a path.
    path = os.path.abspath(os.path.expanduser(source)) if os.path.exists(os.path.expanduser(source)) else str(source)
    return OpenedClips(opened, SourceRecord(opened.kind, path, given))


def plan_shards(clips: OpenedClips, settings: ShardSettings, how: RunSettings) -> tuple[Plan, Work]:
    """Decide which clip goes where, from headers alone; nothing is written.

    Raises:
        DataError: As `make_plan`, zarr is wanted and not installed, a setting has no effect, or too many clips are bad.
    """
    if settings.dtype == "keep" and how.max_error != DEFAULT_MAX_ERROR:
        fix = "leave it out, or set dtype"
        raise DataError(Problem("max_error", how.max_error, "has no effect with dtype=keep: nothing is converted", fix))
    if settings.format == "zarr":
        require_zarr()
    listing = clips.source.listing()
    plan, work = make_plan(listing, clips.source.provenance, clips.record, settings, how.on_error)
    check_bad(plan.bad, plan.num_clips + len(plan.bad), how.max_bad_fraction)
    return plan, work


def shard_part(
    clips: OpenedClips,
    out: Path,
    settings: ShardSettings,
    how: RunSettings,
    part: str = WHOLE,
    *,
    planned: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
    report: Report | None = None,
) -> Manifest | None:
    """Write one part of the shards of a data set; when that part is the whole, merge them too.

    Args:
        clips: What is written.
        out: See `shard`.
        settings: What to make of it.
        how: How.
        part: `i/n` with i from 0: all n parts write to the same folder, and `merge` completes it.
        planned: Called with the plan before anything is written.
        progress: See `shard`; of this part.
        report: See `shard`.

    Returns:
        The manifest, if the data set is complete.

    Raises:
        DataError: See `shard`.
    """
    part_of(part, 0)
    _check_folder(out)
    plan, work = plan_shards(clips, settings, how)
    if planned is not None:
        planned(plan)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = PartLock(out, part)
    with lock:
        with writing(out):
            _begin(out, plan)
        numbers = part_of(part, len(plan.shards))
        names = [plan.shards[number].name for number in numbers]
        job = Job(clips.source, out, replace(plan, clips=(), bad=()), how.on_error, how.max_error, how.max_bad_fraction)
        run = _Run(job, how, [(number, work[number]) for number in numbers], plan, progress, report)
        try:
            with writing(out):
                remove_leftovers(out, names)
            run.write(lock)
        finally:
            with writing(out):
                remove_leftovers(out, names)
        if (out / MANIFEST_FILE).is_file():
            remove_statistics(out, names)
            return load_manifest(out, field="out")
        if len(numbers) < len(plan.shards) or part != WHOLE:
            return None
        return merge_plan(out, plan)


def rebuild_shard(out: Path, name: str, folder: Path, source: Path | str | None) -> ShardRecord:
    """Write one tar of a data set again.

    Where to read is for the user to say: plan.json comes with the data set, and may name any file of this machine, or
    any function of Python.

    Args:
        out: Folder of the data set.
        name: Of the shard, e.g. `train-000000`.
        folder: Where to write it, as `shards/NAME.tar` and `journal/NAME.json`; another one than `out`.
        source: Path of the source, which may have been moved.

    Returns:
        Its record; the sha256 in it says whether the shard is the same as before.

    Raises:
        DataError: No source was named, it is gone or has changed, or the shard cannot be written.
    """
    plan, old = read_plan(out), read_record(out, name)
    numbers = {each.name: number for number, each in enumerate(plan.shards)}
    if name not in numbers or old is None or old.plan != plan.digest:
        raise DataError(Problem("shard", name, f"{out} has no record of it", nearest(name, numbers)))
    clips = _opened_again(plan, name, source)
    known, wanted = dict(plan.clips), [clip.key for clip in old.clips]
    listed = {clip.key: replace(clip, split=clip.split or "train") for clip in clips.source.listing().clips}
    changed = [key for key in wanted if key not in listed or clip_digest(listed[key]) != known[key]]
    if changed:
        rule = f"{len(changed)} of its clips are gone or have changed in {source}, e.g. {changed[0]}"
        raise DataError(Problem("shard", name, rule, "put the source back as it was, or make the data set again"))
    with writing(folder):
        for each in (SHARD_FOLDER, JOURNAL_FOLDER):
            (folder / each).mkdir(parents=True, exist_ok=True)
    job = Job(clips.source, folder, replace(plan, clips=(), bad=()), "fail", old.max_error, old.max_bad_fraction)
    planned = [PlannedClip(listed[clip.key], clip.partition, clip.phase) for clip in old.clips]
    return write_shard(job, numbers[name], planned, lambda: None)


def _opened_again(plan: Plan, name: str, source: Path | str | None) -> OpenedClips:
    from data_pipeline.sources.callable import PythonClips

    again = "make the data set again"
    if plan.settings.format != "tar":
        raise DataError(Problem("shard", name, "only tars are written again", again))
    if plan.source.path is None:
        raise DataError(Problem("shard", name, "its source is not one on disk", again))
    kind, path = printable(plan.source.kind), printable(plan.source.path)
    if plan.source.kind == PythonClips.kind:
        rule = f"plan.json says that it is made by the function {path}, and none is run because a data set says so"
        raise DataError(Problem("shard", name, rule, f"{again}, if you trust that function"))
    if source is None:
        rule = f"plan.json says that it is made from {path} (kind {kind})"
        raise DataError(Problem("source", "", rule, "name the source yourself: source=PATH"))
    if unknown := sorted(set(plan.source.settings) - _SOURCE_SETTINGS):
        raise DataError(Problem("shard", name, f"plan.json has an unknown setting {printable(unknown[0])}", again))
    return open_clips(source, kind=plan.source.kind, **plan.source.settings)


def shards_key_parts(features_digest: str, clips_per_shard: int = 0, seed: int = 0) -> tuple:
    """Return everything the shards depend on, for `cache.content_key`."""
    return ("shards", SHARD_VERSION, MANIFEST_FORMAT, features_digest, clips_per_shard, seed)


class _Run:
    """Counts what is done, on behalf of whoever watches."""

    def __init__(
        self,
        job: Job,
        how: RunSettings,
        tasks: list[tuple[int, tuple[PlannedClip, ...]]],
        whole: Plan,
        progress: Progress | None,
        report: Report | None,
    ) -> None:
        self._job, self._how, self._tasks = job, how, tasks
        self._progress, self._report = progress, report
        self._whole = whole
        self._stats = SharderStats(bad=len(whole.bad))
        self._done, self._total = 0, sum(len(clips) for _, clips in tasks)
        self._started = time.monotonic()
        self._left_out: list[SkippedClip] = []
        self._complete = (job.out / MANIFEST_FILE).is_file()

    def write(self, lock: PartLock) -> None:
        left = []
        for number, clips in self._tasks:
            record = read_record(self._job.out, self._job.plan.shards[number].name)
            if record is None or not self._may_stay(record):
                left.append((number, clips))
                continue
            if record.max_error != self._how.max_error and not self._complete:
                # It is what this limit would have given too.
                with writing(self._job.out):
                    rewrite_record(self._job.out, replace(record, max_error=self._how.max_error))
            skipped, bad = self._stats.skipped + len(record.clips), self._stats.bad + len(record.skipped)
            self._stats = replace(self._stats, skipped=skipped, bad=bad)
            self._left_out += record.skipped
            self._done += len(clips)
        if self._complete and self._how.on_error == "skip":
            self._check_bad()
        if (self._job.out / MANIFEST_FILE).is_file() and left:
            raise self._damaged([self._job.plan.shards[number].name for number, _ in left])
        self._tell()
        self._started = time.monotonic()
        write_shards(self._job, left, self._how.workers, lock, self._clip_done, self._shard_done)

    def _may_stay(self, record: ShardRecord) -> bool:
        """Return whether a finished shard is what this run would write."""
        if not is_complete(self._job.out, self._job.plan, record, paranoid=self._how.paranoid):
            return False
        if self._complete:
            self._check_limits(record)
            return True
        # What could not be read may be there again.
        return record.worst_error <= self._how.max_error and not record.skipped

    def _check_limits(self, record: ShardRecord) -> None:
        """Refuse to take a complete data set that was made with other limits for the one that is asked for."""
        how, out = self._how, self._job.out
        fix = "write to another folder, or remove the data set and make it again"
        if record.worst_error > how.max_error or (record.skipped and record.max_error != how.max_error):
            rule = (
                f"the complete data set in {self._job.out} was made with other limits: max_error={record.max_error:g}"
            )
            raise DataError(Problem("max_error", how.max_error, rule, fix))
        if record.skipped and how.on_error == "fail":
            rule = f"the complete data set in {out} was made with on_error=skip, which left clips out"
            raise DataError(Problem("on_error", how.on_error, rule, fix))

    def _damaged(self, names: Sequence[str]) -> DataError:
        out = self._job.out
        rule = f"holds a complete data set of which {len(names)} shards are damaged: {', '.join(names[:3])}"
        fix = f"hopescale data verify {out} --repair source=PATH"
        if self._job.plan.settings.format != "tar":
            fix = "remove the data set and make it again"
        return DataError(Problem("out", out, rule, fix))

    def _clip_done(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _shard_done(self, finished: Finished) -> None:
        self._left_out += finished.skipped
        self._check_bad()
        self._stats = replace(
            self._stats,
            clips=self._stats.clips + finished.num_clips,
            bytes=self._stats.bytes + finished.num_bytes,
            shards=self._stats.shards + 1,
            bad=self._stats.bad + len(finished.skipped),
            seconds=time.monotonic() - self._started,
        )
        self._tell()

    def _check_bad(self) -> None:
        # Over all parts, as far as they are known here: one may have an unfair share of the bad clips.
        bad = [*self._whole.bad, *self._left_out]
        check_bad(bad, self._whole.num_clips + len(self._whole.bad), self._how.max_bad_fraction)

    def _tell(self) -> None:
        if self._report is not None:
            self._report(self._stats)


def _check_folder(out: Path) -> None:
    """Refuse a folder that holds what no run of the sharder has begun; shards of others look the same."""
    try:
        names = {path.name for path in out.iterdir()}
    except FileNotFoundError:
        return
    except OSError as error:
        fix = "name a new or empty folder"
        raise DataError(Problem("out", out, f"cannot be used ({error.strerror})", fix)) from error
    if PLAN_FILE in names:
        return
    if MANIFEST_FILE in names:
        raise DataError(Problem("out", out, "holds a complete data set", "name another folder or remove this one"))
    names = {name for name in names if name != f"{PLAN_FILE}.tmp" and name != PLAN_LOCK and not is_lock(name)}
    if names:
        raise DataError(Problem("out", out, f"holds {min(names)}", "name a new or empty folder"))


def _begin(out: Path, plan: Plan) -> None:
    """Write plan.json, or check that the one there says the same."""
    if not (out / PLAN_FILE).is_file():
        with waiting_lock(out / PLAN_LOCK):
            if not (out / PLAN_FILE).is_file():
                write_plan(out, plan)
    # It appears whole and is never changed: reading it, which may take seconds, keeps nobody waiting.
    old = read_plan(out)
    if old.digest != plan.digest:
        problems = differences(old, plan)
        if (out / MANIFEST_FILE).is_file():
            fix = "name another folder or remove this one"
            problems = [Problem("out", out, "holds a complete data set of another kind", fix), *problems]
        raise DataError(problems)
    for folder in (SHARD_FOLDER, JOURNAL_FOLDER):
        (out / folder).mkdir(exist_ok=True)
