"""`metrics.jsonl`: one JSON object a line, appended, the record of a run that survives everything else."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path


class JsonlSink:
    """Appends records to a file; each line is one `write()` call, so a crash can tear only the last one.

    Numbers that are not finite become `null`: NaN is not JSON.

    Args:
        path: the file; it is created when missing. A torn last line of an earlier process is cut off.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = self._open()

    def _open(self) -> int:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        content = self._path.read_bytes()
        os.ftruncate(file, content.rfind(b"\n") + 1)
        return file

    def write(self, step: int, kind: str, values: Mapping[str, float], time: float) -> None:
        """Appends one line.

        Raises:
            OSError: the line could not be stored; the file then ends with the line before it.
        """
        record: dict[str, object] = {"kind": kind, "step": step, "time": round(time, 3)}
        record.update({key: value if math.isfinite(value) else None for key, value in values.items()})
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        end = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(f"{self._path}: only a part of the line was written (is the disk full?)")
        except OSError:
            os.ftruncate(self._file, end)
            raise

    def truncate_after(self, step: int) -> int:
        """Removes records of steps after `step`, which a resumed run is about to write again.

        Lines that are no record (torn by a crash) go too. The shortened file replaces the old one atomically.

        Returns:
            Number of lines removed.
        """
        lines = self._path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if (record := _parse(line)) is not None and int(record["step"]) <= step]
        if len(kept) == len(lines):
            return 0
        temporary = self._path.with_name(self._path.name + ".tmp")
        with temporary.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)
        os.close(self._file)
        self._file = self._open()
        return len(lines) - len(kept)

    def close(self) -> None:
        """Makes the file durable and closes it."""
        os.fsync(self._file)
        os.close(self._file)


def _parse(line: bytes) -> dict | None:
    """The record in a line, or None when the line is torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
