"""The manifest of a data set, from the rows of its index and what all its clips have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from data_pipeline.alignment import ActionAlignment
from data_pipeline.checksum import ChecksumName
from data_pipeline.dataset.fingerprint import fingerprint
from data_pipeline.dataset.index import Row
from data_pipeline.schema import (
    MANIFEST_FORMAT,
    SPLITS,
    Conversion,
    Manifest,
    Provenance,
    ShardEntry,
    StoredName,
)


def new_manifest(
    rows: Sequence[Row],
    *,
    widths: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, StoredName],
    partitions: Sequence[str],
    provenance: Provenance,
    action_alignment: ActionAlignment,
    checksum: ChecksumName,
    container: Literal["tar", "zarr"],
    shard_folder: str,
    seed: int,
    sample_every: int,
    conversion: Conversion | None,
    shards: Sequence[ShardEntry],
    files: Mapping[str, str],
) -> Manifest:
    """Return the manifest of some clips.

    Args:
        rows: Of the index, at least one.
        widths: Shape of each field without its first axis; features_scale with it.
        dtypes: Stored type of each field.
        partitions: Names, in the order of the rows' numbers.
        provenance: Of the features.
        action_alignment: Of all clips.
        checksum: Of the fields.
        container: What the shards are.
        shard_folder: Relative to the manifest's.
        seed: Of the shuffle before sharding.
        sample_every: Statistics were made from one of so many training tokens.
        conversion: Of the features' type.
        shards: In the order of the index.
        files: sha256 of the files beside the shards, by relative path.
    """
    counts = Counter((row.partition, row.split) for row in rows)
    return Manifest(
        format=MANIFEST_FORMAT,
        fingerprint=fingerprint(
            rows, provenance=provenance, partitions=partitions, dtypes=dtypes, widths=widths, checksum=checksum
        ),
        num_clips=len(rows),
        frames=max(row.length for row in rows),
        tokens=widths["features"][0],
        encoder_dim=widths["features"][1],
        action_dim=widths["actions"][0],
        state_dim=widths.get("states", (0,))[0],
        extrinsics_dim=widths.get("extrinsics", (0,))[0],
        dtypes=dict(dtypes),
        action_alignment=action_alignment,
        checksum=checksum,
        container=container,
        shard_folder=shard_folder,
        seed=seed,
        statistics_share=1 / sample_every,
        conversion=conversion,
        provenance=provenance,
        partitions={name: {split: counts[code, split] for split in SPLITS} for code, name in enumerate(partitions)},
        shards=tuple(shards),
        files=dict(files),
    )
