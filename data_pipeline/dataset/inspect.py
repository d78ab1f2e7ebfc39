"""What is in a data set, in figures: its clips, its statistics, and the values of one clip."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset.index import Index, Row
from data_pipeline.dataset.index_checks import check_index
from data_pipeline.dataset.manifest import STATISTICS_FILE, load_manifest
from data_pipeline.dtypes import STORED_TYPES
from data_pipeline.errors import DataError, Problem
from data_pipeline.schema import SPLITS, Manifest
from data_pipeline.shard.convert import as_float32, layer_norm
from data_pipeline.shard.tar import Payload
from data_pipeline.shard.walk import open_regular
from data_pipeline.sources.stored import NpzArray, npz_names, reason

_SEARCHED = 5000
_ROW_FIELDS = ("actions", "states", "extrinsics")


class InspectedDataset:
    """An opened data set, to be looked at clip by clip."""

    def __init__(self, folder: Path) -> None:
        """Open it.

        Raises:
            DataError: See `load_manifest`; or the numbers in the index cannot be those of this data set.
        """
        self.folder = folder
        self.manifest: Manifest = load_manifest(folder, field="dataset")
        self.index = Index(folder, self.manifest)
        findings = check_index(self.index, self.manifest)
        if findings.count:
            first = findings.listed[0]
            rule = f"the index cannot be trusted: {first.text}"
            where = folder if first.shard is None else folder / first.shard
            raise DataError(Problem("dataset", where, rule, "`hopescale data verify` lists all that is wrong"))

    def row(self, key: str) -> Row:
        """Return a clip's row.

        Raises:
            DataError: There is no such clip; names one that is called alike.
        """
        keys = self.index.keys()
        if key not in keys:
            close = difflib.get_close_matches(key, keys[:_SEARCHED], n=1) or keys[:1]
            fix = f"keys are called like {close[0]}; keys.txt lists all"
            raise DataError(Problem("key", key, "no clip has this key", fix))
        return self.row_at(keys.index(key))

    def row_at(self, number: int) -> Row:
        """Return the row of the clip with some number in the index."""
        column = self.index.column
        payloads = {
            name: Payload(
                offset=int(column(f"{name}_offset")[number]),
                nbytes=int(column(f"{name}_nbytes")[number]),
                checksum=int(column(f"{name}_checksum")[number]),
            )
            for name in self.manifest.dtypes
        }
        length, shard, partition, split, rows = (
            int(column(name)[number]) for name in ("length", "shard", "partition", "split", "rows")
        )
        return Row(self.index.key(number), shard, length, partition, SPLITS[split], rows, payloads)

    def first_rows(self, most: int) -> list[Row]:
        """Return the first clip of each partition, then the second ones, up to some number of clips."""
        codes = np.asarray(self.index.column("partition"))
        seen: dict[int, int] = {}
        ranked = []
        for row, code in enumerate(codes.tolist()):
            ranked.append((seen.get(code, 0), row))
            seen[code] = seen.get(code, 0) + 1
        return [self.row_at(row) for _, row in sorted(ranked)[:most]]

    def array(self, row: Row, name: str) -> np.ndarray:
        """Return one field of a clip as it is stored, in its shape.

        Raises:
            DataError: The data set is one zarr group, or the shard cannot be read.
        """
        if self.manifest.container != "tar":
            rule = f"a {self.manifest.container} data set"
            raise DataError(Problem("dataset", self.folder, rule, "open it with zarr.open_group"))
        payload = row.payloads[name]
        content = np.empty(payload.nbytes, np.uint8)
        path = self.folder / self.manifest.shard_folder / self.manifest.shards[row.shard].name
        try:
            descriptor = open_regular(path)
            try:
                done = os.preadv(descriptor, [content.data], payload.offset)
            finally:
                os.close(descriptor)
        except (OSError, ValueError) as error:
            raise DataError(Problem("dataset", path, f"cannot be read ({error})", "copy the shard again")) from error
        if done != payload.nbytes:
            rule = f"clip {row.key} ends after {done} of {payload.nbytes} bytes of {name}"
            raise DataError(Problem("dataset", path, rule, "copy the shard again; `hopescale data verify` lists more"))
        return content.view(STORED_TYPES[self.manifest.dtypes[name]].numpy).reshape(self.shape(row, name))

    def values(self, row: Row, name: str) -> NDArray[np.float32]:
        """Return one field of a clip as f32; int8 times its scale."""
        scaled = name == "features" and "features_scale" in row.payloads
        scale = self.array(row, "features_scale") if scaled else None
        return as_float32(self.array(row, name), self.manifest.dtypes[name], scale).numpy()

    def normalised(self, row: Row) -> NDArray[np.float32]:
        """Return the features of a clip after LayerNorm, f32 `[F, N, E]`."""
        scale = self.array(row, "features_scale") if "features_scale" in row.payloads else None
        features = as_float32(self.array(row, "features"), self.manifest.dtypes["features"], scale)
        return layer_norm(features).numpy()

    def shape(self, row: Row, name: str) -> tuple[int, ...]:
        """Return the shape of one field of a clip."""
        return self.manifest.shape(name, row.length, row.rows)


def describe(dataset: InspectedDataset) -> dict[str, Any]:
    """Return everything there is to say about a data set without reading a shard, as JSON values."""
    manifest, lengths = dataset.manifest, np.asarray(dataset.index.column("length")).astype(np.int64)
    payload = {name: int(np.sum(dataset.index.column(f"{name}_nbytes"), dtype=np.int64)) for name in manifest.dtypes}
    return {
        "dataset": str(dataset.folder),
        "fingerprint": manifest.fingerprint,
        "clips": manifest.num_clips,
        "frames": {"all": int(lengths.sum()), "least": int(lengths.min()), "most": int(lengths.max())},
        "tokens": manifest.tokens,
        "channels": manifest.encoder_dim,
        "widths": {"actions": manifest.action_dim, "states": manifest.state_dim, "extrinsics": manifest.extrinsics_dim},
        "dtypes": dict(manifest.dtypes),
        "bytes": {"shards": sum(entry.bytes for entry in manifest.shards), **payload},
        "shards": len(manifest.shards),
        "container": manifest.container,
        "shard_folder": manifest.shard_folder,
        "partitions": dict(_partitions(dataset, lengths)),
        "action_alignment": manifest.action_alignment,
        "checksum": manifest.checksum,
        "seed": manifest.seed,
        "provenance": asdict(manifest.provenance),
        "conversion": None if manifest.conversion is None else asdict(manifest.conversion),
        "statistics_share": manifest.statistics_share,
        "statistics": _statistics(dataset),
    }


def describe_clip(dataset: InspectedDataset, row: Row) -> dict[str, Any]:
    """Return what there is to say about one clip, as JSON values.

    Raises:
        DataError: Its shard cannot be read.
    """
    fields = {}
    for name in dataset.manifest.dtypes:
        payload, values = row.payloads[name], dataset.values(row, name).astype(np.float64)
        fields[name] = {
            "dtype": dataset.manifest.dtypes[name],
            "shape": list(dataset.shape(row, name)),
            "offset": payload.offset,
            "bytes": payload.nbytes,
            dataset.manifest.checksum: f"{payload.checksum:08x}",
            "min": float(values.min()),
            "max": float(values.max()),
            "mean": float(values.mean()),
            "std": float(values.std()),
        }
    return {
        "key": row.key,
        "partition": list(dataset.manifest.partitions)[row.partition],
        "split": row.split,
        "frames": row.length,
        "shard": dataset.manifest.shards[row.shard].name,
        "fields": fields,
    }


def _partitions(dataset: InspectedDataset, lengths: NDArray[np.int64]) -> Iterator[tuple[str, dict[str, int]]]:
    codes = np.asarray(dataset.index.column("partition"))
    for code, (name, counts) in enumerate(dataset.manifest.partitions.items()):
        yield name, {split: counts.get(split, 0) for split in SPLITS} | {"frames": int(lengths[codes == code].sum())}


def _statistics(dataset: InspectedDataset) -> dict[str, Any]:
    shapes = _statistics_shapes(dataset.manifest)
    path = dataset.folder / STATISTICS_FILE
    arrays: dict[str, np.ndarray] = {}
    try:
        for name in filter(shapes.__contains__, npz_names(path)):
            array = NpzArray(path, STATISTICS_FILE, name)
            seen = array.look()
            if seen.shape != shapes[name]:
                raise ValueError(f"{name} has the shape {list(seen.shape)}, not {list(shapes[name])}")
            arrays[name] = array.read()[0]
    except (OSError, ValueError) as error:
        rule = f"the statistics cannot be used: {reason(error)}"
        raise DataError(Problem("dataset", path, rule, "copy the file again")) from error
    found: dict[str, Any] = {}
    if {"channel_mean", "channel_std", "channel_absmax"} <= arrays.keys():
        found["features"] = _channels(arrays)
        if "features_count" in arrays:
            arrays["features_count"] //= dataset.manifest.encoder_dim  # of values; a row here is a token
            found["features"]["partitions"] = _rows("features", arrays, list(dataset.manifest.partitions))
    for name in _ROW_FIELDS:
        if {f"{name}_mean", f"{name}_count"} <= arrays.keys():
            found[name] = _rows(name, arrays, list(dataset.manifest.partitions))
    return found


def _statistics_shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays that are described, by name."""
    shapes: dict[str, tuple[int, ...]] = {"channel_count": ()}
    shapes |= dict.fromkeys(("channel_mean", "channel_std", "channel_absmax"), (manifest.encoder_dim,))
    partitions = len(manifest.partitions)
    widths = {name: manifest.row_shape(name) for name in _ROW_FIELDS} | {"features": (1,)}
    for name, width in widths.items():
        shapes[f"{name}_count"] = (partitions,)
        shapes |= {f"{name}_{part}": (partitions, *width) for part in ("mean", "std", "min", "max")}
    return shapes


def _channels(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    largest = arrays["channel_absmax"]
    outliers = np.argsort(-largest, kind="stable")[:3]
    return {
        "tokens": int(arrays["channel_count"]) if "channel_count" in arrays else None,
        "mean": float(arrays["channel_mean"].mean()),
        "std": float(np.sqrt(np.square(arrays["channel_std"]).mean())),
        "absmax": float(largest.max()),
        "absmax_median_channel": float(np.median(largest)),
        "largest_channels": {int(channel): float(largest[channel]) for channel in outliers},
    }


def _rows(name: str, arrays: Mapping[str, np.ndarray], partitions: Sequence[str]) -> dict[str, dict[str, Any]]:
    figures = [part for part in ("mean", "std", "min", "max") if f"{name}_{part}" in arrays]
    found = {}
    for code, partition in enumerate(partitions):
        found[partition] = {"rows": int(arrays[f"{name}_count"][code])}
        found[partition] |= {part: arrays[f"{name}_{part}"][code].tolist() for part in figures}
    return found
