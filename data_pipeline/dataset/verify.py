"""Whether a data set is what its manifest says: at the price of its index, of every field, or of every byte."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.cache import write_bytes
from data_pipeline.dataset.findings import Finding, Findings, VerifyReport
from data_pipeline.dataset.fingerprint import index_fingerprint
from data_pipeline.dataset.group_files import GROUP, GROUP_FILES, group_digest, group_losses, read_group_files
from data_pipeline.dataset.index import Index
from data_pipeline.dataset.index_checks import check_index
from data_pipeline.dataset.manifest import file_problems, read_manifest
from data_pipeline.dataset.places import ClipPlaces
from data_pipeline.dataset.repair import repair as repair_files
from data_pipeline.dataset.shard_checks import LEVELS, Level, ShardCheck
from data_pipeline.dataset.spans import SpanReader
from data_pipeline.dataset.threads import Progress, check_workers, in_order, ticks
from data_pipeline.errors import DataError, Problem, nearest
from data_pipeline.schema import Manifest
from data_pipeline.sources.stored import printable


def verify(
    folder: Path,
    *,
    level: Level = "crc",
    workers: int = 1,
    repair: bool = False,
    source: Path | str | None = None,
    quarantine: Path | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check a data set.

    quick looks at the manifest, the files beside the shards, every row of the index, and the shards' sizes, of a zarr
    group those of its files. crc also reads every field of every clip, of a zarr group every byte for the sha256 of its
    files. full also reads every other byte for the shards' sha256, compares names, places,
    headers and descriptions in each tar with the index, and looks for values that are not finite.

    Args:
        folder: Of the data set.
        level: quick, crc or full.
        workers: Threads that read shards.
        repair: Make what is damaged again, see `repair.repair`, and report what is found then.
        source: What the data set was made of, for shards to be made again.
        quarantine: File that the keys of damaged clips are written to, one a line, for `data.skip_list`; left alone if
            not all clips could be checked.
        progress: Called with (clips done, clips in all).

    Raises:
        DataError: It is not a data set: no manifest, or one that cannot be used; or a setting is wrong, or the
            quarantine list cannot be written.
    """
    if level not in LEVELS:
        raise DataError(Problem("level", level, "no such level", nearest(str(level), LEVELS)))
    check_workers(workers)
    manifest = read_manifest(folder, "dataset")
    if source is not None and not repair:
        raise DataError(Problem("source", source, "has no effect without --repair", "leave it out, or add --repair"))
    report = _Check(folder, manifest, level, workers, progress).run()
    if repair and not report.sound:
        done = repair_files(folder, manifest, report.damaged_files, source)
        again = _Check(folder, manifest, level, workers, progress).run() if done.names else report
        report = replace(again, repaired=tuple(done.names), not_repaired=done.failed)
    if quarantine is not None:
        _write_quarantine(quarantine, report)
    return report


def _write_quarantine(path: Path, report: VerifyReport) -> None:
    if report.not_checked:
        # A list of what little was checked would pass for a list of all that is damaged.
        return
    try:
        write_bytes(path, "".join(f"{key}\n" for key in report.damaged_clips).encode("ascii"))
    except OSError as error:
        rule = f"cannot be written ({error.strerror})"
        raise DataError(Problem("--quarantine", path, rule, "name a file in a folder that exists")) from error


@dataclass
class _Check:
    folder: Path
    manifest: Manifest
    level: Level
    workers: int
    progress: Progress | None

    def run(self) -> VerifyReport:
        findings = Findings()
        for problem in file_problems(self.folder, self.manifest, "dataset"):
            findings.add(Finding("file", problem.rule, self._file_name(problem)))
        if findings.count:
            return self._report(findings, None, "clips and shards were not checked, for the index cannot be trusted")
        index = Index(self.folder, self.manifest)
        findings = check_index(index, self.manifest)
        if findings.count:
            return self._report(findings, index, "shards were not checked, for the index cannot be trusted")
        if self.level != "quick":
            self._check_fingerprint(index, findings)
        if self.manifest.container != "tar":
            read = self._check_group(findings)
            lost = "which clips are damaged was not looked for: zarr groups are not trained from"
            return self._report(findings, index, lost if findings.count else "", read)
        read = self._check_shards(ClipPlaces(self.folder, self.manifest, index), findings)
        return self._report(findings, index, "", read)

    def _file_name(self, problem: Problem) -> str:
        """Return the path, relative to the data set, of the file that a problem is about."""
        path = Path(str(problem.value))
        if path.is_relative_to(self.folder):
            return path.relative_to(self.folder).as_posix()
        return problem.field.removeprefix("dataset: ").removeprefix("files.")

    def _check_fingerprint(self, index: Index, findings: Findings) -> None:
        actual = index_fingerprint(index, self.manifest)
        if actual != self.manifest.fingerprint:
            text = "fingerprint, the digest of provenance and clips"
            wanted = self.manifest.fingerprint
            findings.add(Finding("index", text, "manifest.json", expected=wanted, actual=actual))

    def _check_group(self, findings: Findings) -> int:
        if GROUP_FILES not in self.manifest.files:
            findings.add(Finding("file", f"the manifest lists no {GROUP_FILES}", "manifest.json"))
            return 0
        try:
            files = read_group_files(self.folder)
        except (OSError, ValueError) as error:
            findings.add(Finding("file", f"cannot be used: {printable(str(error))}", GROUP_FILES))
            return 0
        total = 0
        for size, losses in group_losses(self.folder, files, every_byte=self.level != "quick"):
            total += size
            for loss in losses:
                text = f"{printable(loss.name)}: {loss.text}"
                findings.add(Finding("shard", text, GROUP, expected=loss.expected, actual=loss.actual))
        if group_digest(files) != self.manifest.shards[0].sha256:
            findings.add(Finding("file", "its files are not those of the manifest", GROUP_FILES))
        return total

    def _check_shards(self, places: ClipPlaces, findings: Findings) -> int:
        tick, total = ticks(self.progress, self.manifest.num_clips), 0

        def check(shard: int, reader: SpanReader) -> ShardCheck:
            return ShardCheck(places, shard, reader, tick).run(self.level)

        for done in in_order(check, range(len(self.manifest.shards)), self.workers):
            findings.merge(done.findings)
            total += done.bytes_read
        return total

    def _report(self, findings: Findings, index: Index | None, not_checked: str, read: int = 0) -> VerifyReport:
        keys = [] if index is None else sorted(index.key(row) for row in findings.rows)
        return VerifyReport(
            dataset=str(self.folder),
            level=self.level,
            clips=self.manifest.num_clips,
            shards=len(self.manifest.shards),
            bytes_read=read,
            findings=tuple(findings.listed),
            num_findings=findings.count,
            damaged_files=tuple(sorted(findings.files)),
            damaged_clips=tuple(keys),
            not_checked=not_checked,
        )
