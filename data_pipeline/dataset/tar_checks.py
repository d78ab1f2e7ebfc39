"""Whether the tar of a shard, read without the index, says the same as the index."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_pipeline.dataset.findings import Finding, Findings, Kind
from data_pipeline.dataset.places import ClipPlaces
from data_pipeline.dataset.samples import Sample, read_header, read_meta, samples
from data_pipeline.dtypes import STORED_TYPES
from data_pipeline.schema import SPLITS
from data_pipeline.shard.npy import NpyHeader
from data_pipeline.shard.walk import BadTar, Member
from data_pipeline.sources.stored import reason

_OWN_META = ("encode_mode", "key", "length", "partition", "split")
_FOREIGN_META = ("action_alignment", "encode_mode", "partition", "split")


def check_tar(descriptor: int, places: ClipPlaces, shard: int, findings: Findings) -> None:
    """Compare names, places, headers and descriptions of a tar's members with the index.

    Args:
        descriptor: Of the open shard.
        places: By the index.
        shard: Row of the manifest's `shards`.
        findings: What is wrong is added here.
    """
    _TarCheck(descriptor, places, shard, findings).run()


class _TarCheck:
    def __init__(self, descriptor: int, places: ClipPlaces, shard: int, findings: Findings) -> None:
        self._descriptor, self._places, self._findings = descriptor, places, findings
        self._manifest = places.manifest
        self._name = self._manifest.shards[shard].name
        self._rows = places.rows(shard)
        self._own = self._manifest.shard_folder != "."

    def run(self) -> None:
        rows = {self._places.index.key(row): row for row in self._rows}
        last: Sample | None = None
        try:
            for sample in samples(self._descriptor):
                self._take(last, rows)
                last = sample
        except (OSError, BadTar) as error:
            # Where a tar is damaged its last sample may lack members, and nobody knows which samples follow.
            self._take(last, rows, whole=False)
            self._findings.add(Finding("tar", reason(error), self._name))
            return
        self._take(last, rows)
        for key, row in rows.items():
            self._findings.add(Finding("tar", "the tar lacks this clip", self._name, key), (row,))

    def _take(self, sample: Sample | None, rows: dict[str, int], *, whole: bool = True) -> None:
        if sample is None:
            return
        row = rows.pop(sample.key, None)
        if row is None:
            text = "the tar has a sample, or a second one, that the index lacks"
            self._findings.add(Finding("tar", text, self._name, sample.key[:200]))
            return
        for name in self._manifest.dtypes:
            offset = self._places.start(row, name)
            member = self._member(sample, name, offset)
            if member is not None:
                for text, expected, actual in self._differences(member, row, name, offset):
                    self._note("tar", text, row, name, offset, expected, actual)
            elif whole:
                self._note("tar", "no member of the sample holds it", row, name, offset)
        if whole or sample.meta is not None:
            self._check_meta(sample, row)

    def _member(self, sample: Sample, name: str, offset: int) -> Member | None:
        """Return the member of a field: by its name in our shards, in tars of others by where it lies."""
        if self._own:
            return sample.members.get(f"{name}.npy")
        return next((m for m in sample.members.values() if m.offset <= offset < m.offset + m.size), None)

    def _differences(
        self, member: Member, row: int, name: str, offset: int
    ) -> Iterator[tuple[str, str | int, str | int]]:
        stored = STORED_TYPES[self._manifest.dtypes[name]]
        try:
            header = read_header(self._descriptor, member)
        except (OSError, ValueError) as error:
            yield f"its header: {reason(error)}", stored.descr, "unreadable"
            return
        if member.offset + header.nbytes != offset:
            yield "its values start elsewhere", offset, member.offset + header.nbytes
        if member.offset + member.size != self._places.end(row, name):
            yield "its values end elsewhere", self._places.end(row, name), member.offset + member.size
        if header.descr != stored.descr:
            yield "its header has another type", stored.descr, header.descr
        wanted = self._manifest.shape(name, int(self._places.lengths[row]), int(self._places.recorded[row]))
        if header.shape != wanted and not (name == "features" and self._is_other_layout(header, wanted)):
            yield "its header has another shape", str(list(wanted)), str(list(header.shape))

    def _is_other_layout(self, header: NpyHeader, wanted: tuple[int, ...]) -> bool:
        """Return whether features of somebody else's tar are these, as `[F * N, E]` or `[F, H, W, E]`."""
        frames, tokens, channels = wanted
        shape = header.shape
        flat = shape == (frames * tokens, channels)
        grid = len(shape) == 4 and (shape[0], shape[1] * shape[2], shape[3]) == wanted
        return not self._own and (flat or grid)

    def _check_meta(self, sample: Sample, row: int) -> None:
        if sample.meta is None:
            if self._own:
                self._note("meta", "the sample has no meta.json", row, "meta", None)
            return
        try:
            meta = read_meta(self._descriptor, sample.meta)
        except (OSError, ValueError) as error:
            self._note("meta", reason(error), row, "meta", sample.meta.offset)
            return
        known = self._known(row)
        needed = _OWN_META if self._own else ()
        for name in sorted({*needed, *(name for name in (*_FOREIGN_META, *needed) if name in meta)}):
            if meta.get(name) != known[name]:
                actual = str(meta.get(name))[:200]
                self._note("meta", f"its {name}", row, "meta", sample.meta.offset, str(known[name]), actual)

    def _known(self, row: int) -> dict[str, Any]:
        places, manifest = self._places, self._manifest
        return {
            "action_alignment": manifest.action_alignment,
            "key": places.index.key(row),
            "partition": list(manifest.partitions)[places.partitions[row]],
            "split": SPLITS[places.splits[row]],
            "length": int(places.lengths[row]),
            "encode_mode": manifest.provenance.encode_mode,
        }

    def _note(
        self,
        kind: Kind,
        text: str,
        row: int,
        name: str,
        offset: int | None,
        expected: str | int | None = None,
        actual: str | int | None = None,
    ) -> None:
        key = self._places.index.key(row)
        self._findings.add(Finding(kind, text, self._name, key, name, offset, expected, actual), (row,))
