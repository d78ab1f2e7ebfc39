"""Whether a shard holds what the index says: its size, every byte of every clip, and the tar around them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from data_pipeline.checksum import checksum_function
from data_pipeline.dataset.findings import Finding, Findings, Kind
from data_pipeline.dataset.places import ClipPlaces, Piece
from data_pipeline.dataset.spans import Digest, Span, SpanReader
from data_pipeline.dataset.tar_checks import check_tar
from data_pipeline.dtypes import STORED_TYPES
from data_pipeline.schema import ShardEntry
from data_pipeline.shard.convert import all_finite
from data_pipeline.shard.walk import BadTar, open_regular
from data_pipeline.sources.stored import reason

Level = Literal["quick", "crc", "full"]
LEVELS: tuple[str, ...] = get_args(Level)
Tick = Callable[[int], None]


@dataclass
class ShardCheck:
    """The check of one shard.

    Attributes:
        places: Of all clips.
        shard: Row of the manifest's `shards`.
        reader: Of the calling thread.
        tick: Called with numbers of clips that are done.
        findings: What is wrong.
        bytes_read: So far.
    """

    places: ClipPlaces
    shard: int
    reader: SpanReader
    tick: Tick
    findings: Findings = field(default_factory=Findings)
    bytes_read: int = 0
    _ticked: int = -1

    def run(self, level: Level) -> ShardCheck:
        """Look at the size alone (quick), at every field (crc), or at every byte and the tar around them (full)."""
        rows = self.places.rows(self.shard)
        try:
            descriptor = open_regular(self.places.folder / self.entry.name)
        except (OSError, BadTar) as error:
            self._note(Finding("shard", reason(error), self.entry.name), *rows)
            self.tick(len(rows))
            return self
        try:
            size = os.fstat(descriptor).st_size
            whole = self._present(rows, size)
            self.tick(len(rows) if level == "quick" else len(rows) - len(whole))
            if level != "quick":
                self._check_bytes(descriptor, whole, size, every=level == "full")
            if level == "full" and size == self.entry.bytes:
                check_tar(descriptor, self.places, self.shard, self.findings)
        finally:
            os.close(descriptor)
        return self

    @property
    def entry(self) -> ShardEntry:
        """What the manifest says of the shard."""
        return self.places.manifest.shards[self.shard]

    def _note(self, finding: Finding, *rows: int) -> None:
        self.findings.add(finding, rows)

    def _present(self, rows: range, size: int) -> list[int]:
        """Return the rows of the clips that end inside the file, and note the others."""
        if size != self.entry.bytes:
            wanted = self.entry.bytes
            self._note(Finding("shard", "it has another size", self.entry.name, expected=wanted, actual=size))
        present = []
        for row in rows:
            beyond = [name for name in self.places.columns if self.places.end(row, name) > size]
            if not beyond:
                present.append(row)
                continue
            offset, name = min((self.places.start(row, name), name) for name in beyond)
            text, place = "the file ends before the field does", (self.places.index.key(row), name, offset)
            self._note(Finding("shard", text, self.entry.name, *place, self.places.end(row, name), size), row)
        return present

    def _check_bytes(self, descriptor: int, rows: Sequence[int], size: int, *, every: bool) -> None:
        pairs = [pair for row in rows for pair in self.places.pieces(row)]
        digest, found = hashlib.sha256() if every else None, Findings()
        try:
            self._compare(descriptor, pairs, size, digest, found, values=every)
        except OSError as error:
            # A byte that cannot be read spoils the digest, but not what the other bytes can tell.
            digest, found = None, Findings()
            self._note(Finding("unreadable", f"{reason(error)}, so it has no sha256", self.entry.name))
            self._compare(descriptor, pairs, size, None, found, values=every)
        self.findings.merge(found)
        if digest is not None and digest.hexdigest() != self.entry.sha256:
            wanted, actual = self.entry.sha256, digest.hexdigest()
            self._note(Finding("shard", "it has another sha256", self.entry.name, expected=wanted, actual=actual))

    def _compare(
        self,
        descriptor: int,
        pairs: Sequence[tuple[Piece, Span]],
        size: int,
        digest: Digest | None,
        found: Findings,
        *,
        values: bool,
    ) -> None:
        name = self.places.manifest.checksum
        checksum = checksum_function(name)
        for number, content in self.reader.read(descriptor, [span for _, span in pairs], size=size, digest=digest):
            piece, span = pairs[number]
            if content is None:
                found.add(self._finding("unreadable", "the disk does not give these bytes", piece, span), (piece.row,))
            elif (actual := checksum(content)) != piece.checksum:
                text, figures = f"another {name}{_frame(piece)}", (f"{piece.checksum:08x}", f"{actual:08x}")
                found.add(self._finding("checksum", text, piece, span, *figures), (piece.row,))
            elif values and not self._is_finite(piece, content):
                found.add(self._finding("values", f"not all finite{_frame(piece)}", piece, span), (piece.row,))
            self.bytes_read += span.nbytes
            if piece.row > self._ticked:
                self._ticked = piece.row
                self.tick(1)

    def _is_finite(self, piece: Piece, content: NDArray[np.uint8]) -> bool:
        name = self.places.manifest.dtypes[piece.field]
        return all_finite(content.view(STORED_TYPES[name].numpy), name)

    def _finding(
        self, kind: Kind, text: str, piece: Piece, span: Span, expected: str | None = None, actual: str | None = None
    ) -> Finding:
        key = self.places.index.key(piece.row)
        return Finding(kind, text, self.entry.name, key, piece.field, span.offset, expected, actual)


def _frame(piece: Piece) -> str:
    return f" of frame {piece.frame}" if piece.field == "features" else ""
