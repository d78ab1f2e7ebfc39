from __future__ import annotations

import io
import json
import os
import shutil
import stat
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.dataset.index import Index
from data_pipeline.dataset.index_tars import index_tars
from data_pipeline.dataset.manifest import load_manifest
from data_pipeline.dataset.tar_listing import IndexSettings
from data_pipeline.dataset.verify import verify
from data_pipeline.errors import DataError
from data_pipeline.schema import Manifest
from tests.small_dataset import write_dataset

FRAMES, GRID, CHANNELS = 3, (2, 3), 8
TOKENS = GRID[0] * GRID[1]
Members = Mapping[str, np.ndarray | bytes]


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _write_tar(path: Path, samples: Mapping[str, Members], *, prefix: str = "") -> None:
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for name, value in members.items():
                content = value if isinstance(value, bytes) else _npy(value)
                info = tarfile.TarInfo(f"{prefix}{key}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def _sample(number: int, **changes: np.ndarray | bytes | None) -> dict[str, np.ndarray | bytes]:
    draw = np.random.default_rng(number)
    members: dict[str, np.ndarray | bytes | None] = {
        "actions.npy": draw.normal(size=(FRAMES - 1, 2)).astype(np.float32),
        "features.npy": draw.normal(size=(FRAMES, TOKENS, CHANNELS)).astype(np.float16),
    }
    members |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in members.items() if value is not None}


def _meta(**entries: Any) -> bytes:
    return json.dumps(entries).encode()


def _arrays(folder: Path, manifest: Manifest, key: str) -> dict[str, np.ndarray]:
    """Return the fields of a clip, read by the index alone."""
    found = next(row for row in Index(folder, manifest).rows() if row.key == key)
    content = (folder / manifest.shards[found.shard].name).read_bytes()
    kinds = {"float16": np.float16, "float32": np.float32, "int8": np.int8, "bfloat16": np.uint16}
    return {
        name: np.frombuffer(
            content,
            kinds[manifest.dtypes[name]],
            payload.nbytes // np.dtype(kinds[manifest.dtypes[name]]).itemsize,
            payload.offset,
        )
        for name, payload in found.payloads.items()
    }


def _state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.tar")
    }


def test_tars_become_a_sound_data_set_and_are_not_touched(tmp_path: Path) -> None:
    _write_tar(tmp_path / "b.tar", {f"clip_{n}": _sample(n) for n in range(3)})
    _write_tar(tmp_path / "a.tar", {f"run/clip_{n}": _sample(n) for n in range(3, 5)}, prefix="./")
    before = _state(tmp_path)
    manifest = index_tars(tmp_path, workers=2)
    assert _state(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["a.tar", "b.tar", "index", "keys.txt", "manifest.json", "mean_frame.npy", "stats.npz"]
    )
    assert (tmp_path / "keys.txt").read_text().split() == ["run/clip_3", "run/clip_4", "clip_0", "clip_1", "clip_2"]
    assert (manifest.shard_folder, manifest.num_clips, manifest.frames) == (".", 5, FRAMES)
    assert manifest.provenance.encode_mode == "unknown"
    assert manifest.partitions == {"all": {"train": 5, "heldout": 0}}
    assert verify(tmp_path, level="full").sound
    for number in range(5):
        arrays = _arrays(tmp_path, manifest, f"clip_{number}" if number < 3 else f"run/clip_{number}")
        for name, values in arrays.items():
            np.testing.assert_array_equal(values, np.ravel(_sample(number)[f"{name}.npy"]))  # pyright: ignore


def test_every_layout_of_features_is_read_where_it_lies(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(FRAMES, TOKENS, CHANNELS)).astype(np.float32)
    layouts: dict[str, tuple[tuple[int, ...], IndexSettings, tuple[int, int]]] = {
        "flat": ((FRAMES * TOKENS, CHANNELS), IndexSettings(tokens=TOKENS), (1, TOKENS)),
        "frames": ((FRAMES, TOKENS, CHANNELS), IndexSettings(), (1, TOKENS)),
        "grid": ((FRAMES, *GRID, CHANNELS), IndexSettings(), GRID),
    }
    fingerprints = set()
    for name, (shape, settings, grid) in layouts.items():
        folder = tmp_path / name
        folder.mkdir()
        _write_tar(folder / "x.tar", {"clip": _sample(0, features__npy=features.reshape(shape))})
        manifest = index_tars(folder, settings)
        assert (manifest.tokens, manifest.encoder_dim, manifest.provenance.grid) == (TOKENS, CHANNELS, grid)
        np.testing.assert_array_equal(_arrays(folder, manifest, "clip")["features"], features.ravel())
        assert verify(folder, level="full").sound
        fingerprints.add(manifest.fingerprint)
    assert len(fingerprints) == 2


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8", "float8_e5m2"])
def test_our_own_shards_say_all_that_is_needed_but_their_unsigned_types(tmp_path: Path, dtype: Any) -> None:
    made = write_dataset(tmp_path, dtype=dtype, lengths=(2, 4), state_dim=2, extrinsics_dim=3)
    settings = IndexSettings(
        features_dtype=dtype if dtype[:2] in ("bf", "fl") and dtype[-2:] not in ("16", "32") else None
    )
    if dtype == "bfloat16":
        settings = IndexSettings(features_dtype="bfloat16")
    manifest = index_tars(tmp_path / "shards", settings)
    assert (manifest.dtypes, manifest.partitions) == (made.dtypes, made.partitions)
    assert {entry.sha256 for entry in manifest.shards} == {entry.sha256 for entry in made.shards}
    assert manifest.provenance.encode_mode == made.provenance.encode_mode
    assert manifest.provenance.encoder == made.provenance.encoder
    assert verify(tmp_path / "shards", level="full").sound


def test_statistics_are_those_of_the_training_clips(tmp_path: Path) -> None:
    samples = {}
    for number in range(6):
        split = "heldout" if number % 3 == 0 else "train"
        partition = "ice" if number % 2 else "base"
        samples[f"clip_{number}"] = _sample(number, meta__json=_meta(split=split, partition=partition))
    _write_tar(tmp_path / "x.tar", samples)
    manifest = index_tars(tmp_path)
    assert manifest.partitions == {"base": {"train": 2, "heldout": 1}, "ice": {"train": 2, "heldout": 1}}
    assert manifest.statistics_share == 1
    trained = [samples[f"clip_{number}"] for number in (1, 2, 4, 5)]
    features = np.stack([np.asarray(each["features.npy"]) for each in trained]).astype(np.float64)
    with np.load(tmp_path / "stats.npz", allow_pickle=False) as stats:
        np.testing.assert_allclose(stats["channel_mean"], features.mean((0, 1, 2)), atol=1e-6)
        np.testing.assert_allclose(stats["channel_std"], features.std((0, 1, 2)), rtol=1e-5)
        base = np.concatenate([np.asarray(samples[f"clip_{n}"]["actions.npy"]) for n in (2, 4)])
        np.testing.assert_allclose(stats["actions_mean"][0], base.mean(0), rtol=1e-5)
    normal = torch.nn.functional.layer_norm(torch.from_numpy(features), (CHANNELS,), eps=1e-6)
    np.testing.assert_allclose(np.load(tmp_path / "mean_frame.npy"), normal.mean((0, 1)), atol=1e-5)


def test_the_result_does_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    for folder in ("one", "four"):
        (tmp_path / folder).mkdir()
        for tar in range(5):
            _write_tar(tmp_path / folder / f"{tar}.tar", {f"clip_{tar}_{n}": _sample(10 * tar + n) for n in range(3)})
    first = index_tars(tmp_path / "one")
    assert index_tars(tmp_path / "four", workers=4) == first
    assert (tmp_path / "one" / "manifest.json").read_bytes() == (tmp_path / "four" / "manifest.json").read_bytes()


def test_members_and_rules_are_named_by_settings(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    samples = {
        f"clip_{number:03d}": {
            "Emb.NPY": draw.normal(size=(FRAMES, TOKENS, CHANNELS)).astype(np.float32),
            "acts.npy": draw.normal(size=(2 * FRAMES, 2)).astype(np.float32),
            "mp4": b"not looked at",
        }
        for number in range(10)
    }
    _write_tar(tmp_path / "x.tar", samples)
    settings = IndexSettings(
        fields="features:emb.npy,actions:acts.npy",
        encode_mode="per-frame",
        encoder="vjepa2",
        action_alignment="pair-mean",
        partitions=("base=0..6", "ice=6.."),
        split="heldout_last=0.5",
    )
    manifest = index_tars(tmp_path, settings)
    assert manifest.partitions == {"base": {"train": 3, "heldout": 3}, "ice": {"train": 2, "heldout": 2}}
    assert (manifest.provenance.encode_mode, manifest.provenance.encoder) == ("per-frame", "vjepa2")
    assert manifest.action_alignment == "pair-mean"
    assert verify(tmp_path, level="full").sound


def test_members_called_npy_alone_are_features(tmp_path: Path) -> None:
    sample = _sample(0)
    _write_tar(tmp_path / "x.tar", {"clip": {"actions.npy": sample["actions.npy"], "npy": sample["features.npy"]}})
    assert index_tars(tmp_path).num_clips == 1


WRONG: dict[str, tuple[dict[str, Any], IndexSettings, str]] = {
    "no features": (
        {"features__npy": None},
        IndexSettings(),
        "there is no member clip_1.features.npy or npy; it has actions",
    ),
    "no actions": ({"actions__npy": None}, IndexSettings(), "there is no member clip_1.actions.npy"),
    "double actions": (
        {"actions__npy": np.zeros((FRAMES - 1, 2))},
        IndexSettings(),
        "member clip_1.actions.npy: its type '<f8' is none of",
    ),
    "half actions": ({"actions__npy": np.zeros((FRAMES - 1, 2), np.float16)}, IndexSettings(), "must be float32"),
    "too few actions": ({"actions__npy": np.zeros((1, 2), np.float32)}, IndexSettings(), "actions have 1 rows"),
    "wider actions": ({"actions__npy": np.zeros((FRAMES - 1, 3), np.float32)}, IndexSettings(), "those of clip_0"),
    "states of one": (
        {"states__npy": np.zeros((FRAMES, 3), np.float32)},
        IndexSettings(),
        "it has states, which clip_0",
    ),
    "other channels": (
        {"features__npy": np.zeros((FRAMES, TOKENS, 4), np.float16)},
        IndexSettings(),
        r"float16 with widths \[6, 4\], those of clip_0 float16 with widths \[6, 8\]",
    ),
    "another type": (
        {"features__npy": np.zeros((FRAMES, TOKENS, CHANNELS), np.float32)},
        IndexSettings(),
        "float32 with",
    ),
    "unsigned": (
        {"features__npy": np.zeros((FRAMES, TOKENS, CHANNELS), np.uint16)},
        IndexSettings(),
        "bfloat16 or uint16",
    ),
    "Fortran order": (
        {"features__npy": np.asfortranarray(np.ones((FRAMES, TOKENS, CHANNELS), np.float16))},
        IndexSettings(),
        "Fortran order",
    ),
    "objects": ({"features__npy": np.array([None, {}])}, IndexSettings(), r"its type '\|O'"),
    "one frame": ({"features__npy": np.zeros((1, TOKENS, CHANNELS), np.float16)}, IndexSettings(), "no transition"),
    "flat without tokens": (
        {"features__npy": np.zeros((FRAMES * TOKENS, CHANNELS), np.float16)},
        IndexSettings(),
        "only when the option tokens",
    ),
    "other tokens": ({}, IndexSettings(tokens=5), "the option tokens says 5"),
    "int8 without scale": (
        {"features__npy": np.zeros((FRAMES, TOKENS, CHANNELS), np.int8)},
        IndexSettings(),
        "without features_scale",
    ),
    "trailing bytes": (
        {"features__npy": _npy(np.zeros((FRAMES, TOKENS, CHANNELS), np.float16)) + b"x"},
        IndexSettings(),
        "it holds",
    ),
    "not npy": ({"features__npy": b"PK\x03\x04" + bytes(500)}, IndexSettings(), "does not start like a .npy"),
    "infinity": (
        {"features__npy": np.full((FRAMES, TOKENS, CHANNELS), np.inf, np.float16)},
        IndexSettings(),
        r"member clip_1.features.npy: features holds inf at \[0, 0, 0\]",
    ),
    "NaN actions": (
        {"actions__npy": np.full((FRAMES - 1, 2), np.nan, np.float32)},
        IndexSettings(),
        "actions holds nan",
    ),
    "meta that is a list": ({"meta__json": b"[]"}, IndexSettings(), "not a JSON object"),
    "meta too long": ({"meta__json": b" " * (1 << 17)}, IndexSettings(), "more than 65536"),
    "meta too deep": ({"meta__json": b"[" * 60_000}, IndexSettings(), "deep"),
    "an odd split": ({"meta__json": _meta(split="val")}, IndexSettings(), "split is 'val', not one of train, heldout"),
    "an odd partition": ({"meta__json": _meta(partition="a b")}, IndexSettings(), "partition is 'a b'"),
    "an odd mode": ({"meta__json": _meta(encode_mode=3)}, IndexSettings(), "encode_mode is '3'"),
    "another mode": (
        {"meta__json": _meta(encode_mode="clip")},
        IndexSettings(encode_mode="prefix"),
        "samples say clip",
    ),
    "a mode of some": ({"meta__json": _meta(encode_mode="clip")}, IndexSettings(), "1 samples do not say it"),
    "a partition of some": (
        {"meta__json": _meta(partition="ice")},
        IndexSettings(),
        "1 clips, e.g. clip_0, have no partition",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_indexed_is_named_with_tar_sample_and_fix(tmp_path: Path, kind: str) -> None:
    changes, settings, expected = WRONG[kind]
    _write_tar(tmp_path / "some.tar", {"clip_0": _sample(0), "clip_1": _sample(1, **changes)})
    with pytest.raises(DataError, match=expected) as caught:
        index_tars(tmp_path, settings)
    text = str(caught.value)
    assert "Fix: " in text
    if kind not in ("another mode", "a mode of some", "a partition of some"):
        assert "some.tar" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["some.tar"]


def test_all_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    for tar in "ab":
        _write_tar(tmp_path / f"{tar}.tar", {f"{tar}{n}": _sample(n, actions__npy=None) for n in range(3)})
    (tmp_path / "c.tar").write_bytes(b"x" * 1000)
    with pytest.raises(DataError) as caught:
        index_tars(tmp_path)
    assert len(caught.value.problems) == 7


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "none": (lambda folder: None, "there is no .tar file"),
    "compressed": (lambda folder: (folder / "x.tar.gz").write_bytes(b""), "unpack it"),
    "compressed too": (lambda folder: (folder / "y.tgz").write_bytes(b""), "unpack it"),
    "deeper": (lambda folder: ((folder / "sub").mkdir(), (folder / "sub" / "x.tar").touch()), "folders of their own"),
    "a bad name": (lambda folder: (folder / "-x y.tar").touch(), "rename it"),
    "empty": (lambda folder: _write_tar(folder / "x.tar", {}), "it has no samples"),
    "no samples": (lambda folder: _write_tar(folder / "x.tar", {"": {"hidden": b""}}), "it has no samples"),
    "an empty file": (lambda folder: (folder / "x.tar").touch(), "without the two empty blocks"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_without_usable_tars_are_refused(tmp_path: Path, kind: str) -> None:
    make, expected = FOLDERS[kind]
    make(tmp_path)
    with pytest.raises(DataError, match=expected):
        index_tars(tmp_path)


def test_one_key_in_two_tars_is_refused_with_both_places(tmp_path: Path) -> None:
    for tar in "ab":
        _write_tar(tmp_path / f"{tar}.tar", {"clip": _sample(0)})
    with pytest.raises(DataError, match=r"two clips of .* have this key: at a\.tar and at b\.tar"):
        index_tars(tmp_path)


def test_members_of_a_sample_that_do_not_lie_side_by_side_are_refused(tmp_path: Path) -> None:
    one, other = _sample(0), _sample(1)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("actions.npy", "features.npy"):
            for key, sample in (("a", one), ("b", other)):
                content = _npy(np.asarray(sample[name]))
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    with pytest.raises(DataError, match=r"there is no member a\.features\.npy"):
        index_tars(tmp_path)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"encode_mode": "perframe"}, "did you mean per-frame"),
        ({"action_alignment": "mean"}, "pair-mean"),
        ({"features_dtype": "uint16"}, "bfloat16"),
        ({"statistics": "some"}, "sample"),
        ({"tokens": 0}, "at least one token"),
        ({"encoder": "a\nb"}, "short text"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        IndexSettings(**settings)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ("featurs:x.npy", "did you mean features"),
        ("features", "must be FIELD:MEMBER"),
        ("features:../x", "must be FIELD"),
    ],
)
def test_names_of_members_that_make_no_sense_are_refused(tmp_path: Path, fields: str, expected: str) -> None:
    _write_tar(tmp_path / "x.tar", {"clip": _sample(0)})
    with pytest.raises(DataError, match=expected):
        index_tars(tmp_path, IndexSettings(fields=fields))


def test_an_index_is_made_anew_only_when_asked_for(tmp_path: Path) -> None:
    _write_tar(tmp_path / "x.tar", {"clip": _sample(0, states__npy=np.zeros((FRAMES, 2), np.float32))})
    first = index_tars(tmp_path)
    with pytest.raises(DataError, match="replace=true"):
        index_tars(tmp_path)
    assert load_manifest(tmp_path) == first
    _write_tar(tmp_path / "x.tar", {"clip": _sample(0), "other": _sample(1)})
    assert not verify(tmp_path, level="full").sound
    manifest = index_tars(tmp_path, replace=True)
    assert (manifest.num_clips, manifest.state_dim) == (2, 0)
    assert not (tmp_path / "index" / "states_offset.npy").exists()
    assert verify(tmp_path, level="full").sound


def test_a_failed_attempt_leaves_the_index_that_was_there(tmp_path: Path) -> None:
    _write_tar(tmp_path / "x.tar", {"clip": _sample(0)})
    first = index_tars(tmp_path)
    _write_tar(
        tmp_path / "y.tar", {"clip_1": _sample(1, features__npy=np.full((3, TOKENS, CHANNELS), np.nan, np.float16))}
    )
    with pytest.raises(DataError, match="nan"):
        index_tars(tmp_path, replace=True)
    assert load_manifest(tmp_path) == first


def test_a_data_set_of_our_own_is_not_replaced(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    shutil.copy(next((tmp_path / "shards").iterdir()), tmp_path / "x.tar")
    with pytest.raises(DataError, match="has its shards in shards/"):
        index_tars(tmp_path, replace=True)


def test_a_folder_that_cannot_be_written_keeps_its_tars_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_tar(tmp_path / "x.tar", {"clip": _sample(0)})
    before, real = _state(tmp_path), os.fsync

    def full(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(28, os.strerror(28))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left"):
        index_tars(tmp_path)
    assert _state(tmp_path) == before
    assert [path.name for path in tmp_path.rglob("*.tmp")] == []
    monkeypatch.undo()
    assert index_tars(tmp_path).num_clips == 1


def test_two_at_once_in_one_folder_are_refused(tmp_path: Path) -> None:
    import fcntl

    _write_tar(tmp_path / "x.tar", {"clip": _sample(0)})
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is indexing"):
            index_tars(tmp_path)
    finally:
        os.close(descriptor)
    assert index_tars(tmp_path).num_clips == 1


@pytest.mark.parametrize("name", ["a/b/c.tar", "a/b.tar.zst", "a/B.TAR"])
def test_tars_below_the_folder_are_not_left_out_silently(tmp_path: Path, name: str) -> None:
    _write_tar(tmp_path / "x.tar", {"x": _sample(0)})
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=name):
        index_tars(tmp_path)
