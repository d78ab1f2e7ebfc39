"""The same small clips in every layout that a source may have, written with the tools people write them with."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Clips = Mapping[str, Mapping[str, np.ndarray]]
Kwargs = dict[str, Any]
FRAMES, TOKENS, CHANNELS = 4, 6, 8


def make_clips(count: int = 5, *, frames: int = FRAMES, fields: Sequence[str] = ("states", "extrinsics")) -> Clips:
    """Return clips of random numbers: features f16 [F, 6, 8], actions f32 [F - 1, 2], and what `fields` names."""
    random = np.random.default_rng(7)

    def clip() -> dict[str, np.ndarray]:
        shapes = {"actions": (frames - 1, 2), "states": (frames, 3), "extrinsics": (frames - 1, 4)}
        arrays = {name: random.normal(size=shapes[name]).astype(np.float32) for name in ("actions", *fields)}
        return {"features": random.normal(size=(frames, TOKENS, CHANNELS)).astype(np.float16), **arrays}

    return {f"clip_{number:05d}": clip() for number in range(count)}


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def save_npz(file: Path | io.BytesIO, arrays: Mapping[str, Any], *, deflated: bool = False) -> None:
    (np.savez_compressed if deflated else np.savez)(file, **arrays)


def thesis(root: Path, clips: Clips) -> tuple[Path, Kwargs]:
    for key, arrays in clips.items():
        (root / key / "feature_maps").mkdir(parents=True)
        for name, array in arrays.items():
            place = "feature_maps/vjepa2_vitl16" if name == "features" else f"actions_states/{name}"
            save(root / key / f"{place}.npy", array)
    return root, {"provenance": {"action_alignment": "as-is"}}


def thesis_flattened(root: Path, clips: Clips) -> tuple[Path, Kwargs]:
    flat = {key: {**arrays, "features": arrays["features"].reshape(-1, CHANNELS)} for key, arrays in clips.items()}
    thesis(root, flat)
    return root, {"options": {"tokens": TOKENS}, "provenance": {"action_alignment": "as-is"}}


def npy_beside(root: Path, clips: Clips) -> tuple[Path, Kwargs]:
    for key, arrays in clips.items():
        for name, array in arrays.items():
            save(root / (f"{key}.npy" if name == "features" else f"{key}.{name}.npy"), array)
    return root, {}


def npy_folders(root: Path, clips: Clips) -> tuple[Path, Kwargs]:
    for key, arrays in clips.items():
        for name, array in arrays.items():
            save(root / name / f"{key}.npy", np.asfortranarray(array))
    return root, {}


def npz(root: Path, clips: Clips) -> tuple[Path, Kwargs]:
    root.mkdir()
    for key, arrays in clips.items():
        save_npz(root / f"{key}.npz", arrays)
    return root, {}


def npz_deflated(root: Path, clips: Clips) -> tuple[Path, Kwargs]:
    root.mkdir()
    for key, arrays in clips.items():
        renamed = {f"my_{name}": array for name, array in arrays.items()}
        save_npz(root / f"{key}.npz", renamed, deflated=True)
    return root, {"options": {name: f"my_{name}" for name in next(iter(clips.values()))}}


def zarr_stacked(
    root: Path, clips: Clips, version: int, shards: int | None = None, chunks: int = 1
) -> tuple[Path, Kwargs]:
    import zarr
    import zarr.codecs

    group: Any = zarr.open_group(root, mode="w", zarr_format=3 if version == 3 else 2)
    for name in next(iter(clips.values())):
        stacked = np.stack([arrays[name] for arrays in clips.values()])
        layout: Kwargs = {"chunks": (chunks, *stacked.shape[1:])}
        if shards is not None:
            layout["shards"] = (shards, *stacked.shape[1:])
            layout["compressors"] = [zarr.codecs.ZstdCodec(level=3)]
        group.create_array(name, data=stacked, **layout)
    return root, {}


def zarr_v2(root: Path, clips: Clips) -> tuple[Path, Kwargs]:
    return zarr_stacked(root, clips, 2)


def zarr_v3(root: Path, clips: Clips) -> tuple[Path, Kwargs]:
    return zarr_stacked(root, clips, 3, chunks=2)


def zarr_v3_sharded(root: Path, clips: Clips) -> tuple[Path, Kwargs]:
    return zarr_stacked(root, clips, 3, shards=2)


def zarr_clips(root: Path, clips: Clips) -> tuple[Path, Kwargs]:
    import zarr

    group: Any = zarr.open_group(root, mode="w", zarr_format=3)
    for key, arrays in clips.items():
        for name, array in arrays.items():
            group.create_array(f"{key}/{name}", data=array)
    return root, {}


def listing_lines(root: Path, clips: Clips) -> list[dict[str, Any]]:
    for key, arrays in clips.items():
        for name, array in arrays.items():
            save(root / "files" / key / f"{name}.npy", array)
    return [
        {"key": key, "length": len(arrays["features"])} | {name: f"files/{key}/{name}.npy" for name in arrays}
        for key, arrays in clips.items()
    ]


def jsonl(root: Path, clips: Clips) -> tuple[Path, Kwargs]:
    lines = listing_lines(root, clips)
    (root / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root / "clips.jsonl", {}


def csv_file(root: Path, clips: Clips) -> tuple[Path, Kwargs]:
    lines = listing_lines(root, clips)
    with (root / "clips.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return root / "clips.csv", {}


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def tars(root: Path, clips: Clips) -> tuple[Path, Kwargs]:
    for number, (key, arrays) in enumerate(clips.items()):
        members = {f"{key}.{name}.npy": npy_bytes(array) for name, array in arrays.items()}
        write_tar(root / f"shard-{number:06d}.tar", members)
    return root, {}


def tar_of_npz(root: Path, clips: Clips) -> tuple[Path, Kwargs]:
    members = {}
    for key, arrays in clips.items():
        buffer = io.BytesIO()
        save_npz(buffer, arrays)
        members[f"{key}.npz"] = buffer.getvalue()
    return write_tar(root / "all.tar", members), {}


def features_folder(root: Path, clips: Clips) -> tuple[Path, Kwargs]:
    entries = []
    for key, arrays in clips.items():
        path = root / "all" / f"{key}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_npz(path, arrays)
        entries.append(
            {
                "key": key,
                "partition": "all",
                "split": "train",
                "length": len(arrays.get("features", ())),
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
        )
    texts = dict.fromkeys(("encoder", "weights_sha256", "preprocessing", "pixels_digest", "digest"), "x")
    document = {"format": 1, "encode_mode": "per-frame", "grid": [2, 3], "clips": entries, **texts}
    (root / "features.json").write_text(json.dumps(document))
    return root, {}


LAYOUTS: Mapping[str, Callable[[Path, Clips], tuple[Path, Kwargs]]] = {
    "thesis": thesis,
    "thesis, flattened": thesis_flattened,
    "npy beside": npy_beside,
    "npy in folders, Fortran order": npy_folders,
    "npz": npz,
    "npz, deflated": npz_deflated,
    "zarr v2": zarr_v2,
    "zarr v3": zarr_v3,
    "zarr v3, sharded": zarr_v3_sharded,
    "zarr, a group a clip": zarr_clips,
    "jsonl": jsonl,
    "csv": csv_file,
    "tars": tars,
    "tar of npz": tar_of_npz,
    "features folder": features_folder,
}
"""By name: writes the clips below a folder that does not exist, and returns what `open_source` needs."""
