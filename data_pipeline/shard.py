"""Features to a data set: verified tar shards, an index of every field, and a manifest written last."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np

from data_pipeline.cache import write_json
from data_pipeline.encode import FEATURES_FILE, read_document
from data_pipeline.errors import DataError, Problem, nearest
from data_pipeline.manifest import INDEX_FOLDER, KEYS_FILE, MANIFEST_FILE, MEAN_FRAME_FILE, SHARD_FOLDER, load_manifest
from data_pipeline.order import mix64, uid
from data_pipeline.schema import MANIFEST_FORMAT, SPLITS, EncodeMode, Manifest, Provenance, ShardEntry
from data_pipeline.stats import SharderStats
from data_pipeline.tar import KEY_RULE, Payload, ShardWriter, is_valid_key

SHARD_VERSION = 1
LAYER_NORM_EPS = 1e-6
UNFINISHED_FILE = "UNFINISHED"


def shard(
    features: Path,
    out: Path,
    *,
    clips_per_shard: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    report: Callable[[SharderStats], None] | None = None,
) -> Manifest:
    """Write a features folder as a data set.

    The clips of each split are shuffled by `seed` and packed in that order. What an interrupted run left is cleared and
    written again.

    Args:
        features: Folder with `features.json`.
        out: New or empty folder, or what an interrupted run left.
        clips_per_shard: Clips in each tar file; the last one of a split may hold fewer.
        seed: Seed of the shuffle.
        progress: Called with (clips done, clips in all) after each clip.
        report: Called with cumulative numbers after each shard.

    Returns:
        The manifest of the finished data set.

    Raises:
        DataError: Unusable features, keys or values, or `out` holds something else.
    """
    if clips_per_shard < 1:
        raise DataError(Problem("clips_per_shard", clips_per_shard, "must be at least 1", "use 64"))
    source = read_document(features, FEATURES_FILE, "features", "hopescale data encode")
    _check_fields(source, features / FEATURES_FILE)
    clips: list[dict[str, Any]] = source["clips"]
    _check_clips(clips, features)
    _prepare(out)

    partitions = list(dict.fromkeys(clip["partition"] for clip in clips))
    index = _Index()
    mean = _MeanFrame()
    shards: list[ShardEntry] = []
    contents: dict[str, str] = {}
    first = _read_clip(features, clips[0], None)
    started = time.monotonic()
    done = 0
    for split in SPLITS:
        ordered = _shuffled([clip for clip in clips if clip["split"] == split], seed)
        for number, begin in enumerate(range(0, len(ordered), clips_per_shard)):
            writer = ShardWriter(out / SHARD_FOLDER / f"{split}-{number:06d}.tar")
            try:
                for clip in ordered[begin : begin + clips_per_shard]:
                    arrays = _read_clip(features, clip, first)
                    meta = _meta(clip, source)
                    payloads = writer.add(clip["key"], arrays, meta)
                    index.add(clip, len(shards), partitions, payloads)
                    contents[clip["key"]] = _content_line(clip, arrays)
                    if split == "train":
                        mean.add(arrays["features"])
                    done += 1
                    if progress is not None:
                        progress(done, len(clips))
                sha256 = writer.finish()
            except BaseException:
                writer.discard()
                raise
            shards.append(ShardEntry(writer.path.name, writer.num_bytes, writer.num_clips, sha256))
            if report is not None:
                written = sum(entry.bytes for entry in shards)
                report(SharderStats(done, written, len(shards), time.monotonic() - started))

    files = index.write(out) | mean.write(out, first["features"].shape[1:])
    provenance = _provenance(source)
    manifest = Manifest(
        format=MANIFEST_FORMAT,
        fingerprint=_fingerprint(contents, provenance),
        frames=max(clip["length"] for clip in clips),
        tokens=first["features"].shape[1],
        encoder_dim=first["features"].shape[2],
        action_dim=first["actions"].shape[1],
        state_dim=first["states"].shape[1] if "states" in first else 0,
        dtypes={field: array.dtype.name for field, array in sorted(first.items())},  # pyright: ignore[reportArgumentType]
        seed=seed,
        provenance=provenance,
        partitions={
            name: {s: sum(clip["partition"] == name and clip["split"] == s for clip in clips) for s in SPLITS}
            for name in partitions
        },
        shards=tuple(shards),
        files=files,
    )
    write_json(out / MANIFEST_FILE, asdict(manifest))
    (out / UNFINISHED_FILE).unlink()
    return load_manifest(out)


def shards_key_parts(features_digest: str, clips_per_shard: int = 64, seed: int = 0) -> tuple:
    """Return everything the shards depend on, for `cache.content_key`."""
    return ("shards", SHARD_VERSION, MANIFEST_FORMAT, features_digest, clips_per_shard, seed)


def layer_norm(features: np.ndarray) -> np.ndarray:
    """Return features `[..., E]` normalised over E without affine parameters, as f32."""
    values = features.astype(np.float32)
    centred = values - values.mean(-1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + LAYER_NORM_EPS)


def _check_fields(source: dict[str, Any], path: Path) -> None:
    """Check that a features.json, which may be written by hand, has all its fields, of the right types."""
    wanted = dict.fromkeys(
        ("encoder", "weights_sha256", "encode_mode", "preprocessing", "pixels_digest", "digest"), str
    ) | {"grid": list, "clips": list}
    in_clip = {"key": str, "partition": str, "split": str, "length": int, "sha256": str}
    clips = source.get("clips")
    entries = [(source, wanted, "features")]
    entries += [
        (clip, in_clip, f"features.clips[{n}]") for n, clip in enumerate(clips if isinstance(clips, list) else ())
    ]
    problems = [
        Problem(f"{where}.{name}", entry.get(name), f"must be of type {kind.__name__}", f"correct {path}")
        for entry, kinds, where in entries
        for name, kind in kinds.items()
        if not isinstance(entry.get(name), kind)
    ]
    if not problems and source["encode_mode"] not in get_args(EncodeMode):
        fix = nearest(source["encode_mode"], get_args(EncodeMode))
        problems.append(Problem("features.encode_mode", source["encode_mode"], "not an encode mode", fix))
    if problems:
        raise DataError(problems[:20])


def _check_clips(clips: list[dict[str, Any]], features: Path) -> None:
    problems: list[Problem] = []
    seen: set[str] = set()
    for clip in clips:
        key, split = clip["key"], clip["split"]
        if not is_valid_key(key):
            problems.append(Problem("features.key", key, f"a key has {KEY_RULE}", "rename the clip"))
        if key in seen:
            problems.append(Problem("features.key", key, "two clips have this key", "rename one of them"))
        if split not in SPLITS:
            problems.append(Problem("features.split", split, f"clip {key}: must be one of {SPLITS}", "correct it"))
        if clip["length"] < 2:
            rule = f"clip {key}: there is no transition to learn"
            problems.append(Problem("features.length", clip["length"], rule, "leave out clips of one frame"))
        seen.add(key)
    if not clips:
        problems.append(Problem("features", features, "the folder lists no clips", "encode some"))
    if problems:
        raise DataError(problems[:20])


def _prepare(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in out.iterdir()}
    if MANIFEST_FILE in names:
        raise DataError(Problem("out", out, "holds a complete data set", "name another folder or remove this one"))
    # Only a folder that a run of this function has marked may be cleared: shards of others look the same.
    if names and UNFINISHED_FILE not in names:
        raise DataError(Problem("out", out, f"holds {min(names)}", "name a new or empty folder"))
    (out / UNFINISHED_FILE).touch()
    for folder in (SHARD_FOLDER, INDEX_FOLDER):
        (out / folder).mkdir(exist_ok=True)
        # With other settings an earlier run may have made more shards than this one will.
        for left in (out / folder).iterdir():
            left.unlink()


def _shuffled(clips: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    # By key first: the source's own order must not leak in through equal hashes.
    clips = sorted(clips, key=lambda clip: clip["key"])
    uids = np.array([uid(clip["key"]) for clip in clips], np.uint64)
    return [clips[row] for row in np.argsort(mix64(uids, seed), kind="stable")]


def _read_clip(folder: Path, clip: dict[str, Any], like: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    path = folder / clip["partition"] / f"{clip['key']}.npz"
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != clip["sha256"]:
            raise ValueError("its sha256 differs from features.json")
        with np.load(path, allow_pickle=False) as stored:
            arrays = {field: stored[field] for field in ("actions", "features", "states") if field in stored}
        length = clip["length"]
        leading = {"features": length, "actions": length - 1, "states": length}
        for field in ("features", "actions"):
            if field not in arrays:
                raise ValueError(f"no array {field}")
        for field, array in arrays.items():
            if array.dtype.name not in ("float16", "float32"):
                raise ValueError(f"{field} has type {array.dtype}, not float16 or float32")
            if len(array) != leading[field] or array.ndim != (3 if field == "features" else 2):
                raise ValueError(f"{field} has shape {list(array.shape)}, which does not fit {length} frames")
            if not np.isfinite(array).all():
                raise ValueError(f"{field} holds values that are not finite")
        if like is not None and {k: (a.dtype, a.shape[1:]) for k, a in arrays.items()} != {
            k: (a.dtype, a.shape[1:]) for k, a in like.items()
        }:
            raise ValueError("its fields, types or widths differ from those of the first clip")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(Problem("features", path, f"cannot be used: {error}", "encode the clips again")) from error
    return arrays


def _meta(clip: dict[str, Any], source: dict[str, Any]) -> bytes:
    content = {
        "key": clip["key"],
        "partition": clip["partition"],
        "split": clip["split"],
        "length": clip["length"],
        "encoder": source["encoder"],
        "encode_mode": source["encode_mode"],
    }
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _content_line(clip: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for field in sorted(arrays):
        digest.update(f"{field} {arrays[field].dtype.name} {arrays[field].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[field]).tobytes())
    return f"{clip['key']} {clip['partition']} {clip['split']} {clip['length']} {digest.hexdigest()}\n"


def _fingerprint(contents: dict[str, str], provenance: Provenance) -> str:
    digest = hashlib.sha256(json.dumps(asdict(provenance), sort_keys=True).encode())
    for key in sorted(contents):
        digest.update(contents[key].encode())
    return digest.hexdigest()


def _provenance(source: dict[str, Any]) -> Provenance:
    return Provenance(
        encoder=source["encoder"],
        weights_sha256=source["weights_sha256"],
        encode_mode=source["encode_mode"],
        preprocessing=source["preprocessing"],
        grid=(source["grid"][0], source["grid"][1]),
        pixels_digest=source["pixels_digest"],
        features_digest=source["digest"],
    )


class _Index:
    """Columns of the index, one row a clip, in shard order."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._columns: dict[str, tuple[type, list[int]]] = {}

    def add(self, clip: dict[str, Any], shard_row: int, partitions: list[str], payloads: dict[str, Payload]) -> None:
        self._keys.append(clip["key"])
        row: dict[str, tuple[type, int]] = {
            "uid": (np.uint64, uid(clip["key"])),
            "shard": (np.int32, shard_row),
            "length": (np.int32, clip["length"]),
            "partition": (np.int16, partitions.index(clip["partition"])),
            "split": (np.int8, SPLITS.index(clip["split"])),
        }
        for field, payload in payloads.items():
            row[f"{field}_offset"] = (np.int64, payload.offset)
            row[f"{field}_nbytes"] = (np.int64, payload.nbytes)
            row[f"{field}_crc32"] = (np.uint32, payload.crc32)
        for name, (dtype, value) in row.items():
            self._columns.setdefault(name, (dtype, []))[1].append(value)

    def write(self, out: Path) -> dict[str, str]:
        """Write columns and keys and return their sha256 by relative path."""
        for name, (dtype, values) in self._columns.items():
            np.save(out / INDEX_FOLDER / f"{name}.npy", np.array(values, dtype))
        (out / KEYS_FILE).write_text("".join(f"{key}\n" for key in self._keys), encoding="ascii")
        names = [*(f"{INDEX_FOLDER}/{name}.npy" for name in sorted(self._columns)), KEYS_FILE]
        return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names}


class _MeanFrame:
    """Mean over all training frames of layer-normalised features, per token and channel."""

    def __init__(self) -> None:
        self._sum: np.ndarray | float = 0.0
        self._num_frames = 0

    def add(self, features: np.ndarray) -> None:
        self._sum = self._sum + layer_norm(features).sum(0, dtype=np.float64)
        self._num_frames += len(features)

    def write(self, out: Path, shape: tuple[int, ...]) -> dict[str, str]:
        """Write f32 `[N, E]` (zeros without training clips) and return its sha256 by relative path."""
        mean = np.broadcast_to(self._sum / max(self._num_frames, 1), shape)
        np.save(out / MEAN_FRAME_FILE, np.ascontiguousarray(mean, np.float32))
        return {MEAN_FRAME_FILE: hashlib.sha256((out / MEAN_FRAME_FILE).read_bytes()).hexdigest()}
