"""Small data sets for tests, written with the writers of shards and indexes, without a source or the sharder."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_pipeline.alignment import ActionAlignment, rows_needed
from data_pipeline.cache import write_bytes, write_json
from data_pipeline.checksum import ChecksumName, best_checksum
from data_pipeline.dataset.fingerprint import fingerprint
from data_pipeline.dataset.index import IndexWriter, Row, save_array
from data_pipeline.dataset.manifest import (
    DIGEST_ENTRY,
    MANIFEST_FILE,
    MEAN_FRAME_FILE,
    SHARD_FOLDER,
    STATISTICS_FILE,
    load_manifest,
    write_manifest,
)
from data_pipeline.dtypes import SCALED, STORED_TYPES
from data_pipeline.schema import (
    MANIFEST_FORMAT,
    SPLITS,
    EncodeMode,
    Manifest,
    Provenance,
    ShardEntry,
    StoredName,
)
from data_pipeline.shard.tar import ShardWriter


@dataclass(frozen=True)
class SmallClip:
    """One clip of a small data set, before it is stored.

    Attributes:
        key: `PARTITION-SPLIT-NNNNN`.
        partition: Its partition.
        split: train or heldout.
        arrays: By field, as they are stored; bfloat16 and fp8 as unsigned integers.
    """

    key: str
    partition: str
    split: str
    arrays: Mapping[str, np.ndarray]


def write_dataset(
    folder: Path,
    *,
    clips: int = 6,
    heldout: int = 2,
    partitions: Sequence[str] = ("base", "ice"),
    frames: int = 5,
    lengths: Sequence[int] | None = None,
    tokens: int = 6,
    channels: int = 16,
    action_dim: int = 2,
    state_dim: int = 0,
    extrinsics_dim: int = 0,
    clips_per_shard: int = 4,
    dtype: StoredName = "float16",
    action_alignment: ActionAlignment = "as-is",
    encode_mode: EncodeMode = "per-frame",
    checksum: ChecksumName | None = None,
    shard_folder: str = SHARD_FOLDER,
    seed: int = 0,
) -> Manifest:
    """Write a data set of random clips; the same arguments give the same bytes.

    Clips are stored partition by partition in the order of their keys, training shards before held-out ones.

    Args:
        folder: New or empty folder.
        clips: Training clips of each partition.
        heldout: Held-out clips of each partition.
        partitions: Names of the partitions.
        frames: Stored frames of a clip, F.
        lengths: Instead of `frames`: clip i of a split and partition has `lengths[i % len(lengths)]` frames.
        tokens: Patch tokens of a frame, N.
        channels: Channels of a token, E.
        action_dim: Numbers in an action, A.
        state_dim: Numbers in a state; 0 for no states.
        extrinsics_dim: Numbers in a camera's extrinsics; 0 for none.
        clips_per_shard: Clips in each shard; the last one of a split may hold fewer.
        dtype: Stored type of the features.
        action_alignment: Decides how many rows of actions a clip has.
        encode_mode: For the provenance.
        checksum: Of the fields; the best of this machine when absent.
        shard_folder: `shards`, or `.` for a data set that was indexed in place.
        seed: Of the values.

    Returns:
        The manifest, as `load_manifest` reads it.
    """
    lengths = (frames,) if lengths is None else lengths
    random = np.random.default_rng(seed)
    checksum = checksum or best_checksum()
    rows: list[Row] = []
    shards: list[ShardEntry] = []
    (folder / shard_folder).mkdir(parents=True, exist_ok=True)
    for split, count in zip(SPLITS, (clips, heldout), strict=True):
        names = [(partition, number) for partition in partitions for number in range(count)]
        for start in range(0, len(names), clips_per_shard):
            path = folder / shard_folder / f"{split}-{start // clips_per_shard:06d}.tar"
            writer = ShardWriter(path, checksum)
            for partition, number in names[start : start + clips_per_shard]:
                length = lengths[number % len(lengths)]
                arrays = _arrays(
                    random, length, (tokens, channels), action_dim, state_dim, extrinsics_dim, dtype, action_alignment
                )
                clip = SmallClip(f"{partition}-{split}-{number:05d}", partition, split, arrays)
                payloads = writer.add(clip.key, clip.arrays, _meta(clip, encode_mode))
                recorded = len(arrays["actions"])
                rows.append(Row(clip.key, len(shards), length, partitions.index(partition), split, recorded, payloads))
            sha256 = writer.finish()
            shards.append(ShardEntry(path.name, writer.num_bytes, writer.num_clips, sha256))
    dtypes: dict[str, StoredName] = {"actions": "float32", "features": dtype}
    dtypes |= dict.fromkeys(
        [name for name, size in (("states", state_dim), ("extrinsics", extrinsics_dim)) if size], "float32"
    )
    dtypes |= {"features_scale": "float32"} if dtype == SCALED else {}
    dtypes = dict(sorted(dtypes.items()))
    provenance = Provenance("random", "0" * 64, encode_mode, "none", (1, tokens), "", "", "tests")
    manifest = Manifest(
        format=MANIFEST_FORMAT,
        fingerprint=fingerprint(
            rows,
            provenance=provenance,
            partitions=partitions,
            dtypes=dtypes,
            widths={
                "actions": (action_dim,),
                "extrinsics": (extrinsics_dim,),
                "features": (tokens, channels),
                "features_scale": (channels,),
                "states": (state_dim,),
            },
            checksum=checksum,
        ),
        num_clips=len(rows),
        frames=max(row.length for row in rows),
        tokens=tokens,
        encoder_dim=channels,
        action_dim=action_dim,
        state_dim=state_dim,
        extrinsics_dim=extrinsics_dim,
        dtypes=dtypes,
        action_alignment=action_alignment,
        checksum=checksum,
        container="tar",
        shard_folder=shard_folder,
        seed=seed,
        statistics_share=1.0,
        conversion=None,
        provenance=provenance,
        partitions={name: dict(zip(SPLITS, (clips, heldout), strict=True)) for name in partitions},
        shards=tuple(shards),
        files=_write_files(folder, rows, tuple(dtypes), (tokens, channels)),
    )
    write_manifest(folder, manifest)
    return load_manifest(folder)


def rewrite_manifest(folder: Path, **changes: object) -> None:
    """Change entries at the top of a manifest.json, valid or not, and leave its digest out, as an editor would."""
    document = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    document.pop(DIGEST_ENTRY, None)
    write_json(folder / MANIFEST_FILE, document | changes)


def _arrays(
    random: np.random.Generator,
    length: int,
    frame: tuple[int, int],
    action_dim: int,
    state_dim: int,
    extrinsics_dim: int,
    dtype: StoredName,
    alignment: ActionAlignment,
) -> dict[str, np.ndarray]:
    values = random.normal(size=(length, *frame)).astype(np.float32)
    arrays = {"actions": random.normal(size=(rows_needed(alignment, length)[0], action_dim)).astype(np.float32)}
    if dtype == SCALED:
        arrays["features_scale"] = np.abs(values).max((0, 1)) / np.float32(127)
        arrays["features"] = np.rint(values / arrays["features_scale"]).astype(np.int8)
    else:
        stored = STORED_TYPES[dtype]
        unsigned = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[stored.itemsize]
        arrays["features"] = torch.from_numpy(values).to(stored.torch).view(unsigned).numpy().view(stored.numpy)
    if state_dim:
        arrays["states"] = random.normal(size=(length, state_dim)).astype(np.float32)
    if extrinsics_dim:
        arrays["extrinsics"] = random.normal(size=(length - 1, extrinsics_dim)).astype(np.float32)
    return arrays


def _meta(clip: SmallClip, encode_mode: EncodeMode) -> bytes:
    content = {
        "encode_mode": encode_mode,
        "encoder": "random",
        "key": clip.key,
        "length": len(clip.arrays["features"]),
        "partition": clip.partition,
        "split": clip.split,
    }
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _write_files(folder: Path, rows: Sequence[Row], fields: tuple[str, ...], frame: tuple[int, int]) -> dict[str, str]:
    index = IndexWriter(fields)
    for row in rows:
        index.add(row)
    files = index.write(folder)
    files[MEAN_FRAME_FILE] = save_array(folder / MEAN_FRAME_FILE, np.zeros(frame, np.float32))
    statistics = io.BytesIO()
    np.savez(statistics, channel_mean=np.zeros(frame[1]), channel_std=np.ones(frame[1]))
    write_bytes(folder / STATISTICS_FILE, statistics.getvalue())
    return files | {STATISTICS_FILE: hashlib.sha256(statistics.getvalue()).hexdigest()}
