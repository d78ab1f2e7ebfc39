"""Whether an index can be that of its data set: everything that follows from its numbers, without reading a shard."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from data_pipeline.alignment import rows_needed
from data_pipeline.checksum import ChecksumName, combined
from data_pipeline.dataset.findings import Finding, Findings
from data_pipeline.dataset.index import FRAME_COLUMN, KEYS_FILE, Index
from data_pipeline.dtypes import STORED_TYPES
from data_pipeline.order import uid
from data_pipeline.schema import SPLITS, Manifest
from data_pipeline.shard.tar import KEY_RULE, is_valid_key

_MAX_EACH = 20
_MAX_BYTES = 1 << 62
Column = NDArray[np.int64]


def frame_bytes(manifest: Manifest) -> int:
    """Return the bytes of one frame of features as stored."""
    return manifest.tokens * manifest.encoder_dim * STORED_TYPES[manifest.dtypes["features"]].itemsize


def check_index(index: Index, manifest: Manifest) -> Findings:
    """Return what is wrong with an index whose files are as the manifest says.

    Args:
        index: With columns of the right types and sizes.
        manifest: Of the same data set.
    """
    return _IndexCheck(index, manifest).run()


class _IndexCheck:
    def __init__(self, index: Index, manifest: Manifest) -> None:
        self._index, self._manifest, self._findings = index, manifest, Findings()
        self._keys: list[str] = []

    def run(self) -> Findings:
        if self._keys_are_whole() and self._codes_are_in_range():
            self._check_keys()
            self._check_counts()
            if self._manifest.container == "tar":
                self._check_places()
                self._check_frame_checksums()
        return self._findings

    def _keys_are_whole(self) -> bool:
        content = (self._index.folder / KEYS_FILE).read_bytes()
        ends = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n"))
        if not content.isascii() or not np.array_equal(ends, self._index.column("key_end")):
            self._findings.add(Finding("index", "its lines are not the keys that key_end divides", KEYS_FILE))
            return False
        self._keys = self._index.keys()
        return True

    def _codes_are_in_range(self) -> bool:
        ends = {"partition": len(self._manifest.partitions), "split": len(SPLITS), "shard": len(self._manifest.shards)}
        for name, end in ends.items():
            codes = self._column(name)
            self._each((codes < 0) | (codes >= end), name, f"it must be 0 to {end - 1}", codes)
        return not self._findings.count

    def _check_keys(self) -> None:
        valid = np.array([is_valid_key(key) for key in self._keys])
        self._each(~valid, "key_end", f"a key has {KEY_RULE}")
        uids = np.array([uid(key) for key in self._keys], np.uint64)
        self._each(uids != self._index.column("uid"), "uid", "it is not the hash of the key")
        if len(np.unique(uids)) < len(uids):
            first: dict[str, int] = {}
            repeated = np.array([first.setdefault(key, row) != row for row, key in enumerate(self._keys)])
            self._each(repeated, "key_end", "another clip has this key")

    def _check_counts(self) -> None:
        manifest = self._manifest
        shards, splits = self._column("shard"), len(SPLITS)
        if np.any(np.diff(shards) < 0):
            text = "clips are not in the order of the manifest's shards"
            self._findings.add(Finding("index", text, "index/shard.npy"))
        cells = np.bincount(self._column("partition") * splits + self._column("split"), minlength=1)
        for place, (name, counts) in enumerate(manifest.partitions.items()):
            for code, split in enumerate(SPLITS):
                cell = place * splits + code
                there = int(cells[cell]) if cell < len(cells) else 0
                if there != counts.get(split, 0):
                    text = f"{split} clips of the partition {name}"
                    expected = counts.get(split, 0)
                    self._findings.add(Finding("index", text, "manifest.json", expected=expected, actual=there))
        if manifest.container == "tar":
            held = np.bincount(shards, minlength=len(manifest.shards))
            for entry, there in zip(manifest.shards, held.tolist(), strict=True):
                if there != entry.num_clips:
                    text = "clips of the shard in the index"
                    self._findings.add(Finding("index", text, entry.name, expected=entry.num_clips, actual=there))

    def _check_places(self) -> None:
        manifest, lengths, rows = self._manifest, self._column("length"), self._column("rows")
        if max(manifest.frames, int(rows.max())) * max(frame_bytes(manifest), 4 * manifest.action_dim) >= _MAX_BYTES:
            self._findings.add(Finding("index", "no shard can hold such clips", "manifest.json"))
            return
        self._check_rows(lengths, rows)
        sizes = np.array([entry.bytes for entry in manifest.shards], np.int64)[self._column("shard")]
        expected = self._expected_bytes(lengths, rows)
        starts: dict[str, Column] = {}
        for name, wanted in expected.items():
            nbytes, offset = self._column(f"{name}_nbytes"), self._column(f"{name}_offset")
            self._each(nbytes != wanted, f"{name}_nbytes", "not the bytes that follow from the shape", nbytes, wanted)
            outside = (offset < 0) | (offset > sizes - wanted)
            self._each(outside, f"{name}_offset", "the field does not lie inside the shard", offset)
            starts[name] = offset
        if not self._findings.count:
            self._check_overlaps(starts, expected)

    def _check_rows(self, lengths: Column, rows: Column) -> None:
        for length in np.unique(lengths).tolist():
            least, most = rows_needed(self._manifest.action_alignment, length)
            wrong = (lengths == length) & ((rows < least) | (rows > (np.iinfo(np.int64).max if most is None else most)))
            wanted = f"{least}" if most == least else f"at least {least}"
            rule = f"{length} frames with action_alignment {self._manifest.action_alignment} need {wanted} rows"
            self._each(wrong, "rows", rule, rows)

    def _expected_bytes(self, lengths: Column, rows: Column) -> dict[str, Column]:
        manifest = self._manifest
        every = {
            "actions": rows * (4 * manifest.action_dim),
            "extrinsics": (lengths - 1) * (4 * manifest.extrinsics_dim),
            "features": lengths * frame_bytes(manifest),
            "features_scale": np.full(len(lengths), 4 * manifest.encoder_dim, np.int64),
            "states": lengths * (4 * manifest.state_dim),
        }
        return {name: every[name] for name in manifest.dtypes}

    def _check_overlaps(self, starts: Mapping[str, Column], sizes: Mapping[str, Column]) -> None:
        shard = np.tile(self._column("shard"), len(starts))
        rows = np.tile(np.arange(len(self._keys)), len(starts))
        start, size = np.concatenate(list(starts.values())), np.concatenate([sizes[name] for name in starts])
        order = np.lexsort((start, shard))
        shard, rows, start, end = shard[order], rows[order], start[order], (start + size)[order]
        inside = (shard[1:] == shard[:-1]) & (start[1:] < end[:-1])
        overlapping = np.zeros(len(self._keys), bool)
        overlapping[rows[1:][inside]] = True
        self._each(overlapping, "features_offset", "two fields overlap", starts["features"])
        # Fields of a clip lie side by side, and clips in the order of their rows.
        again = np.zeros(len(self._keys), bool)
        again[rows[1:][(shard[1:] == shard[:-1]) & (rows[1:] < rows[:-1])]] = True
        rule = "clips do not lie in the shard in the order of the index"
        self._each(again, "features_offset", rule, starts["features"])

    def _check_frame_checksums(self) -> None:
        if self._findings.count:
            return
        manifest, lengths = self._manifest, self._column("length")
        frames = np.asarray(self._index.column(FRAME_COLUMN)).astype(np.uint32)
        whole = _combined(manifest.checksum, frames, lengths, self._index.frame_starts, frame_bytes(manifest))
        stored = self._column("features_checksum")
        rule = "the checksums of its frames do not make up this one"
        self._each(whole != stored, "features_checksum", rule, stored, whole.astype(np.int64))

    def _column(self, name: str) -> Column:
        return np.asarray(self._index.column(name)).astype(np.int64)

    def _each(
        self,
        wrong: np.ndarray,
        column: str,
        text: str,
        actual: np.ndarray | None = None,
        expected: np.ndarray | None = None,
    ) -> None:
        """Note the rows where `wrong` holds: the first ones each, the others by their number."""
        rows = np.flatnonzero(wrong).tolist()
        for row in rows[:_MAX_EACH]:
            wanted, found = (None if values is None else int(values[row]) for values in (expected, actual))
            clip = self._keys[row][:200]
            self._findings.add(Finding("index", text, None, clip, column, expected=wanted, actual=found), (row,))
        if len(rows) > _MAX_EACH:
            more = Finding("index", f"{text} ({len(rows) - _MAX_EACH} more clips)", field=column)
            self._findings.add(more, rows)


def _combined(
    name: ChecksumName, parts: NDArray[np.uint32], lengths: Column, starts: Column, nbytes: int
) -> NDArray[np.uint32]:
    """Return the checksum of every clip from those of its frames, as `checksum.combined` does for one.

    Passing a checksum over `nbytes` further bytes is linear over GF(2): its value for each of 32 bits gives all.
    """
    past = np.array([combined(name, (1 << bit, 0), nbytes) for bit in range(32)], np.uint32)
    totals = np.zeros(len(lengths), np.uint32)
    for frame in range(int(lengths.max(initial=0))):
        rows = np.flatnonzero(lengths > frame)
        moved = np.zeros(len(rows), np.uint32)
        for bit, value in enumerate(past):
            moved ^= np.where((totals[rows] >> np.uint32(bit)) & np.uint32(1), value, np.uint32(0))
        totals[rows] = moved ^ parts[starts[rows] + frame]
    return totals
