"""What a check of a data set found, clip by clip."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

MAX_LISTED = 1000
"""Findings that are kept with all their details; those beyond are counted, and their clips remembered."""

Kind = Literal["file", "index", "shard", "tar", "checksum", "values", "meta", "unreadable"]


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it was written.

    Attributes:
        kind: file: beside the shards; index: a row; shard: its size or sha256; tar: a member's name, place or header;
            checksum: bytes of a field; values: not finite; meta: a clip's own description; unreadable: by the disk.
        text: What is wrong, as a sentence without a full stop.
        shard: File name of the shard, or of the file beside them.
        clip: Key.
        field: Field of the clip.
        offset: In the shard, in bytes.
        expected: What was written.
        actual: What is there.
    """

    kind: Kind
    text: str
    shard: str | None = None
    clip: str | None = None
    field: str | None = None
    offset: int | None = None
    expected: str | int | None = None
    actual: str | int | None = None


@dataclass
class Findings:
    """A growing list of findings, bounded in memory.

    Attributes:
        listed: The first of them.
        count: Of all.
        rows: Rows of the index whose clips are damaged.
        files: Names of the shards, and of the files beside them, that something is wrong with.
    """

    listed: list[Finding] = field(default_factory=list)
    count: int = 0
    rows: set[int] = field(default_factory=set)
    files: set[str] = field(default_factory=set)

    def add(self, finding: Finding, rows: Iterable[int] = ()) -> None:
        """Take one finding and the rows of the clips it damages."""
        self.count += 1
        self.rows.update(rows)
        self.files.update(filter(None, (finding.shard,)))
        if len(self.listed) < MAX_LISTED:
            self.listed.append(finding)

    def merge(self, other: Findings) -> None:
        """Take all findings of another list."""
        self.listed += other.listed[: max(MAX_LISTED - len(self.listed), 0)]
        self.count += other.count
        self.rows |= other.rows
        self.files |= other.files


@dataclass(frozen=True)
class VerifyReport:
    """The outcome of `verify`.

    Attributes:
        dataset: Folder.
        level: quick, crc or full.
        clips: In the data set.
        shards: In the data set.
        bytes_read: Of shards.
        findings: At most `MAX_LISTED` of them.
        num_findings: All of them.
        damaged_files: Names of shards, and of files beside them, sorted.
        damaged_clips: Keys, sorted.
        not_checked: What was left out because of what was found, as a sentence, or empty.
        repaired: Names of shards and files that were made again.
        not_repaired: Why others were not, by name.
    """

    dataset: str
    level: str
    clips: int
    shards: int
    bytes_read: int
    findings: tuple[Finding, ...]
    num_findings: int
    damaged_files: tuple[str, ...]
    damaged_clips: tuple[str, ...]
    not_checked: str = ""
    repaired: tuple[str, ...] = ()
    not_repaired: dict[str, str] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return self.num_findings == 0

    @property
    def exit_code(self) -> int:
        """0 sound, 1 damaged."""
        return 0 if self.sound else 1

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {"state": "sound" if self.sound else "damaged", **asdict(self)}
