"""The identity of a data set: its clips and where they come from, whatever the number and size of its shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict

from data_pipeline.checksum import ChecksumName
from data_pipeline.dataset.index import Index, Row
from data_pipeline.schema import Manifest, Provenance


def fingerprint(
    rows: Iterable[Row],
    *,
    provenance: Provenance,
    partitions: Iterable[str],
    dtypes: Mapping[str, str],
    widths: Mapping[str, tuple[int, ...]],
    checksum: ChecksumName,
) -> str:
    """Return the sha256, in hex, over provenance and clips in the order of their keys.

    Args:
        rows: Of the index, in any order.
        provenance: Of the features.
        partitions: Names, in the order of the rows' numbers.
        dtypes: Stored type of each field.
        widths: Shape of each field without its first axis; features_scale with it.
        checksum: Algorithm of the fields' checksums, on which the result depends.
    """
    names, fields = list(partitions), sorted(dtypes)
    kinds = [[name, dtypes[name], list(widths[name])] for name in fields]
    # Not by which layout they came: the same clips sharded again from tars are the same data set.
    origin = {name: value for name, value in asdict(provenance).items() if name != "source"}
    digest = hashlib.sha256(json.dumps([origin, checksum, kinds], sort_keys=True).encode())
    lines = []
    for row in rows:
        sums = " ".join(f"{row.payloads[name].checksum:08x}" for name in fields)
        lines.append(f"{row.key} {names[row.partition]} {row.split} {row.length} {row.rows} {sums}\n")
    # Keys hold no sign that sorts below the space after them.
    for line in sorted(lines):
        digest.update(line.encode())
    return digest.hexdigest()


def index_fingerprint(index: Index, manifest: Manifest) -> str:
    """Return the fingerprint that a data set's index and provenance make."""
    return fingerprint(
        index.rows(),
        provenance=manifest.provenance,
        partitions=manifest.partitions,
        dtypes=manifest.dtypes,
        widths={name: manifest.row_shape(name) for name in manifest.dtypes},
        checksum=manifest.checksum,
    )
