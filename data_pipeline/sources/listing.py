"""A JSONL or CSV file that says where the arrays of each clip lie."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.errors import DataError, Problem, nearest
from data_pipeline.schema import FIELDS
from data_pipeline.sources.base import SourceClip
from data_pipeline.sources.clip_source import ClipSource, FoundClip
from data_pipeline.sources.layout import REQUIRED
from data_pipeline.sources.npy_file import BadArray
from data_pipeline.sources.stored import NpyArray, NpzArray, StoredArray, parse_json, read_small, reason

SUFFIXES = (".jsonl", ".csv")
LABELS = ("key", "partition", "split", "length")
COLUMNS = (*LABELS, *FIELDS)
MAX_LISTING = 1 << 30
MAX_LINE = 1 << 16


@dataclass(kw_only=True)
class ListedFiles(ClipSource):
    """One line a clip: key, paths of features and actions, optionally of states, extrinsics and features_scale.

    A line may also say partition, split and length, in stored frames. Paths are relative to the listing's folder and
    end in .npy, or in .npz for the array named like the field.

    Attributes:
        outside: Allow paths that lead out of the listing's folder, absolute ones too.
        ignore: Further columns that are known to be of no use here, separated by commas.
    """

    outside: bool = False
    ignore: str = ""

    kind = "listing"
    _lines: dict[int, dict[str, Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the lines read so far: a worker reads its own."""
        return {**self.__dict__, "_lines": {}}

    def found(self) -> Iterable[FoundClip]:
        """See `ClipSource`."""
        for number, line in self._entries():
            where = f"{self.path.name}:{number}"
            if isinstance(line, str):
                yield FoundClip("", where, problem=f"{where}: {line}")
                continue
            key = str(line.get("key", ""))
            try:
                yield self._clip(key, where, line)
            except (OSError, ValueError) as error:
                yield FoundClip(key, where, problem=f"{where}: {reason(error)}")

    def again(self, clip: SourceClip) -> Mapping[str, StoredArray]:
        """See `ClipSource`."""
        if not self._lines:
            self._lines = {number: line for number, line in self._entries() if isinstance(line, dict)}
        line = self._lines.get(int(clip.where.rpartition(":")[2]), {})
        try:
            if str(line.get("key")) != clip.key:
                raise BadArray("the line is another one now")
            return self._clip(clip.key, clip.where, line).arrays
        except (OSError, ValueError) as error:
            raise self._unreadable(clip, f"{clip.where}: {reason(error)}") from error

    def _clip(self, key: str, where: str, line: Mapping[str, Any]) -> FoundClip:
        for name in ("key", *REQUIRED):
            if line.get(name) in (None, ""):
                raise BadArray(f"it says no {name}")
        texts = {name: line[name] for name in COLUMNS if name != "length" and line.get(name) not in (None, "")}
        for name, value in texts.items():
            if not isinstance(value, str):
                raise BadArray(f"{name} is {value!r}, not a text")
        arrays = {name: self._array(name, text) for name, text in texts.items() if name in FIELDS}
        length = line.get("length")
        frames = None if length in (None, "") else _whole_number(length)
        return FoundClip(key, where, arrays, texts.get("partition"), texts.get("split"), frames)

    def _array(self, name: str, text: str) -> StoredArray:
        folder = self.path.parent
        if not self.outside and not _is_inside(folder, text):
            raise BadArray(f"the path {text!r} of {name} leads out of the listing's folder; outside=true allows that")
        if text.endswith(".npz"):
            return NpzArray(folder / text, text, name)
        return NpyArray(folder / text, text)

    def _entries(self) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """Yield the number and content of each line, or what is wrong with it."""
        try:
            text = read_small(self.path, MAX_LISTING).decode("utf-8-sig")
        except (OSError, ValueError) as error:
            raise DataError(Problem("source", self.path, reason(error), "correct the listing")) from error
        lines = _csv_lines(text, self.path) if self.path.suffix == ".csv" else _json_lines(text)
        unknown: dict[str, int] = {}
        for number, line in lines:
            if isinstance(line, dict):
                for name in line.keys() - {*COLUMNS, *self._ignored()}:
                    unknown.setdefault(str(name), number)
            yield number, line
        if unknown:
            raise DataError(
                [
                    Problem(
                        f"{self.path.name}:{number}",
                        name,
                        "unknown column",
                        f"{nearest(name, COLUMNS)}; or set ignore={','.join(sorted(unknown))}",
                    )
                    for name, number in list(unknown.items())[:20]
                ]
            )

    def _ignored(self) -> set[str]:
        return {name.strip() for name in self.ignore.split(",") if name.strip()}


def _is_inside(folder: Path, text: str) -> bool:
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or "\0" in text:
        return False
    # A link to a folder elsewhere leads out as well; one in place of the file is refused where it is opened.
    return Path(os.path.realpath((folder / text).parent)).is_relative_to(os.path.realpath(folder))


def _json_lines(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(io.StringIO(text), 1):
        if len(line) > MAX_LINE:
            yield number, f"it has {len(line)} signs, more than {MAX_LINE}"
        elif line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                yield number, str(error)


def _csv_lines(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) != len(header) or not header:
            rule = "its first line must name the columns, each once"
            raise DataError(Problem("source", path, rule, f"name some of {', '.join(COLUMNS)}"))
        for row in reader:
            if len(row) == len(header):
                yield reader.line_num, dict(zip(header, row, strict=True))
            elif row:
                yield reader.line_num, f"it has {len(row)} values, the first line names {len(header)} columns"
    except csv.Error as error:
        rule = f"line {reader.line_num} is not readable as CSV ({error})"
        raise DataError(Problem("source", path, rule, "correct it")) from error


def _whole_number(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    raise BadArray(f"length is {value!r}, not a number of frames")
