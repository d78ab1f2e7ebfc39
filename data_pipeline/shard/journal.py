"""What a run of the sharder leaves on disk beside the shards, so that a killed one goes on where it was.

OUT/plan.json is written first; OUT/journal/SHARD.json says that a shard is complete under its final name, and has its
rows of the index; SHARD.npz beside it, written before, holds its statistics. All are plain JSON and arrays.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from data_pipeline.cache import file_sha256, write_bytes
from data_pipeline.dataset.index import Row
from data_pipeline.dataset.manifest import MANIFEST_FILE, SHARD_FOLDER
from data_pipeline.errors import DataError, Problem
from data_pipeline.schema import FIELDS
from data_pipeline.shard.plan import PLAN_FORMAT, SHARD_STEM, Plan, plan_digest
from data_pipeline.shard.statistics import npz_bytes
from data_pipeline.shard.tar import Payload
from data_pipeline.sources.base import SkippedClip

PLAN_FILE = "plan.json"
JOURNAL_FOLDER = "journal"
REPORT_FILE = "report.json"


@dataclass(frozen=True)
class WrittenFile:
    """A file of a shard: its size and its sha256 in hex."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Rounding:
    """What storing a small field as f32 changed.

    Attributes:
        values: Numbers stored.
        changed: Numbers that f32 does not hold exactly.
        largest: Greatest change, relative to the number.
    """

    values: int = 0
    changed: int = 0
    largest: float = 0.0

    def plus(self, other: Rounding) -> Rounding:
        """Return both together."""
        return Rounding(self.values + other.values, self.changed + other.changed, max(self.largest, other.largest))


@dataclass(frozen=True)
class WrittenClip:
    """A row of the index.

    Attributes:
        key: Of the clip.
        partition: Its number.
        split: train or heldout.
        length: Stored frames.
        rows: Recorded rows of actions.
        phase: See `PlannedClip`; the same clip is judged and summarised by the same tokens when it is written again.
        fields: Offset, bytes and checksum of each.
        frames: Checksum of each frame's features.
    """

    key: str
    partition: int
    split: str
    length: int
    rows: int
    phase: int
    fields: dict[str, tuple[int, int, int]]
    frames: tuple[int, ...]

    def row(self, shard: int) -> Row:
        """Return it as a row of the index of a data set where its shard has a number."""
        payloads = {
            name: Payload(*place, self.frames if name == "features" else ()) for name, place in self.fields.items()
        }
        return Row(self.key, shard, self.length, self.partition, self.split, self.rows, payloads)


@dataclass(frozen=True)
class ShardRecord:
    """The content of one record of the journal.

    Attributes:
        plan: Digest of the plan.
        name: Of the shard.
        files: By path below the folder of the shards; none if every clip was left out.
        clips: In the order of the shard.
        skipped: Clips that were left out.
        rounded: By field, where f32 did not hold the source's type exactly.
        max_error: Limit of the error of conversion that decided what was left out.
        worst_error: Largest error of a clip that was written.
        reordered: By field, clips whose source has it in Fortran order.
        max_bad_fraction: Share of all clips that whoever wrote it allowed to leave out.
    """

    plan: str
    name: str
    files: dict[str, WrittenFile]
    clips: tuple[WrittenClip, ...]
    skipped: tuple[SkippedClip, ...] = ()
    rounded: dict[str, Rounding] = field(default_factory=dict)
    max_error: float = 0.0
    worst_error: float = 0.0
    reordered: dict[str, int] = field(default_factory=dict)
    max_bad_fraction: float = 1.0

    @property
    def num_bytes(self) -> int:
        """Bytes of its files."""
        return sum(file.bytes for file in self.files.values())


_PLAN = TypeAdapter(Plan)
_RECORD = TypeAdapter(ShardRecord)


def write_plan(out: Path, plan: Plan) -> None:
    """Write plan.json."""
    document = asdict(replace(plan, clips=()))
    clips = ",\n".join(json.dumps(list(clip)) for clip in plan.clips)
    del document["clips"]
    text = json.dumps(document, indent=1)[:-2]
    write_bytes(out / PLAN_FILE, f'{text},\n "clips": [\n{clips}\n]}}\n'.encode())


def read_plan(out: Path) -> Plan:
    """Read plan.json, which may be somebody else's: names in it become paths.

    Raises:
        DataError: It is not there, not readable, of another version, not as it was written, or has impossible names.
    """
    path = out / PLAN_FILE
    fix = "remove the unfinished data set and run `hopescale data shard` again"
    if not path.is_file():
        rule = f"the folder has no {PLAN_FILE}: nothing was begun there"
        raise DataError(Problem("out", out, rule, "name the folder that `hopescale data shard` wrote to"))
    try:
        document = json.loads(path.read_bytes())
        version = document.get("format") if isinstance(document, dict) else None
        if version != PLAN_FORMAT:
            rule = f"is of another release: format {version}, and this one reads {PLAN_FORMAT}"
            raise DataError(Problem("out", path, rule, "use that release, or make the data set again"))
        plan = _PLAN.validate_python(document)
    except (ValidationError, ValueError, RecursionError) as error:
        raise DataError(Problem("out", path, f"not readable as a plan ({error})", fix)) from error
    if wrong := [repr(shard.name[:80]) for shard in plan.shards if not SHARD_STEM.fullmatch(shard.name)]:
        raise DataError(Problem("out", path, f"{wrong[0]} is no name of a shard", fix))
    if wrong := [repr(name[:80]) for name in plan.fields if name not in FIELDS]:
        raise DataError(Problem("out", path, f"{wrong[0]} is no field of a clip", fix))
    if plan_digest(plan) != plan.digest:
        raise DataError(Problem("out", path, "was changed after it was written: its digest is another one", fix))
    return plan


def write_record(out: Path, record: ShardRecord, statistics: Mapping[str, np.ndarray]) -> None:
    """Write a shard's statistics, then its record: from then on the shard counts as finished."""
    folder = out / JOURNAL_FOLDER
    write_bytes(folder / f"{record.name}.npz", npz_bytes(statistics))
    rewrite_record(out, record)


def rewrite_record(out: Path, record: ShardRecord) -> None:
    """Write a record, or another one in its place, and leave the statistics alone."""
    text = json.dumps(asdict(record), separators=(",", ":")) + "\n"
    write_bytes(out / JOURNAL_FOLDER / f"{record.name}.json", text.encode())


def read_record(out: Path, name: str) -> ShardRecord | None:
    """Return the record of a shard, or None if there is none that can be read and speaks of this shard."""
    try:
        record = _RECORD.validate_json((out / JOURNAL_FOLDER / f"{name}.json").read_bytes())
    except (OSError, ValidationError):
        return None
    inside = all(not path.startswith("/") and ".." not in path.split("/") for path in record.files)
    return record if record.name == name and inside else None


def read_statistics(out: Path, name: str) -> dict[str, np.ndarray]:
    """Return the statistics beside a record.

    Raises:
        OSError: They are not there.
        ValueError: They are damaged.
    """
    with np.load(out / JOURNAL_FOLDER / f"{name}.npz", allow_pickle=False) as stored:
        return dict(stored)


def is_complete(out: Path, plan: Plan, record: ShardRecord, *, paranoid: bool = False) -> bool:
    """Return whether the files of a record are those of a plan, and all there.

    Args:
        out: Folder of the data set.
        plan: The current plan.
        record: Of the shard.
        paranoid: Compare the files' sha256 too, not only their sizes.
    """
    if record.plan != plan.digest:
        return False
    files = {out / SHARD_FOLDER / name: file for name, file in record.files.items()}
    if any(not path.is_file() or path.stat().st_size != file.bytes for path, file in files.items()):
        return False
    # Once there is a manifest, the statistics of single shards have done their work.
    if not (out / MANIFEST_FILE).exists() and not (out / JOURNAL_FOLDER / f"{record.name}.npz").is_file():
        return False
    return not paranoid or all(file_sha256(path) == file.sha256 for path, file in files.items())


def remove_leftovers(out: Path, names: Iterable[str]) -> None:
    """Remove what killed workers left of some shards under temporary names."""
    wanted = set(names)
    for folder in (JOURNAL_FOLDER, SHARD_FOLDER):
        for path in (out / folder).glob("*.tmp"):
            if path.name.split(".")[0] in wanted:
                path.unlink(missing_ok=True)


def remove_statistics(out: Path, names: Iterable[str]) -> None:
    """Remove the statistics of shards once the data set has its own."""
    for name in names:
        (out / JOURNAL_FOLDER / f"{name}.npz").unlink(missing_ok=True)
