from __future__ import annotations

import json
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.shard.tar import ShardWriter
from data_pipeline.sources.base import Listing
from data_pipeline.sources.open import open_source
from tests.source_layouts import make_clips, npy_bytes, tar_of_npz, tars, write_tar

CLIPS = make_clips(3, fields=())


def members(**names: str) -> dict[str, bytes]:
    """Members of a tar: names are extensions, the last one of the key by default."""
    return {f"{key}.{names[field]}": npy_bytes(array) for key, clip in CLIPS.items() for field, array in clip.items()}


def listed(path: Path, **options: str) -> Listing:
    return open_source(path, options=options).listing()


def test_extensions_are_options_and_npy_alone_means_features(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", members(features="emb.npy", actions="act.npy"))
    write_tar(tmp_path / "b.tar", members(features="npy", actions="actions.npy"))
    renamed = listed(tmp_path / "a.tar", features="emb.npy", actions="act.npy")
    assert [clip.arrays["features"].shape for clip in renamed.clips] == [(4, 6, 8)] * 3
    assert len(listed(tmp_path / "b.tar").clips) == 3
    text = listed(tmp_path / "a.tar").bad[0].reason
    assert "there is no member clip_00000.features.npy or npy but clip_00000.emb.npy, clip_00000.act.npy" in text
    text = listed(tmp_path / "b.tar", states="state.npy").bad[0].reason
    assert "there is no member clip_00000.state.npy" in text


META = {
    "action_alignment": "first",
    "dtypes": {"features": "bfloat16", "actions": "float32"},
    "encode_mode": "prefix",
    "encoder": "vjepa2",
    "length": 4,
    "partition": "ice",
    "split": "heldout",
}


def own_shard(folder: Path, **change: object) -> Path:
    """Write a shard as the sharder does, features as bits of bfloat16; what is given changes the last clip's meta."""
    folder.mkdir()
    writer = ShardWriter(folder / "train-000000.tar", "crc32")
    for key, arrays in CLIPS.items():
        meta = META | {"key": key} | (change if key == "clip_00002" else {})
        writer.add(key, {**arrays, "features": arrays["features"].view("u2")}, json.dumps(meta).encode())
    writer.finish()
    return folder


def test_our_own_shards_keep_labels_types_and_provenance(tmp_path: Path) -> None:
    source = open_source(own_shard(tmp_path / "shards"), provenance={"encoder": "vjepa2"})
    for _ in range(2):
        listing = source.listing()
        assert not listing.bad
        assert {(clip.partition, clip.split) for clip in listing.clips} == {("ice", "heldout")}
        assert {clip.arrays["features"].dtype for clip in listing.clips} == {"bfloat16"}
        found = source.provenance
        assert (found.encoder, found.encode_mode, found.action_alignment) == ("vjepa2", "prefix", "first")
    arrays = source.read(listing.clips[1])
    np.testing.assert_array_equal(arrays["features"], CLIPS[listing.clips[1].key]["features"].view("u2"))


def test_a_clip_of_another_origin_is_set_apart_and_a_setting_that_contradicts_is_refused(tmp_path: Path) -> None:
    folder = own_shard(tmp_path / "shards", encode_mode="clip")
    source = open_source(folder)
    for _ in range(2):
        (bad,) = source.listing().bad
        assert bad.reason == "it says encode_mode=clip, not prefix, as in clip_00000 and 2 of 3 clips in all"
    with pytest.raises(DataError, match=r"provenance.encode_mode=per-frame: .*clip_00000 says prefix"):
        open_source(folder, provenance={"encode_mode": "per-frame"}).listing()
    reasons = [bad.reason for bad in listed(folder, features_dtype="uint16").bad]
    assert "says that its features are bfloat16, the option features_dtype says uint16" in reasons[0]


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        (b"[]", "clip_00001.meta.json: it is not a JSON object"),
        (b"[" * 50_000, "nested too deeply"),
        (b'{"partition": 3}', "partition is 3, not a text"),
        (b'{"split": "val"}', "unknown split 'val'"),
        (b'{"action_alignment": "raw"}', "action_alignment is 'raw', not one of as-is, first"),
        (b'{"encoder": 3}', "encoder is '3', not a short text"),
        (b" " * 70_000, "more than 65536"),
    ],
)
def test_a_bad_meta_sets_its_clip_apart(tmp_path: Path, meta: bytes, expected: str) -> None:
    content = members(features="features.npy", actions="actions.npy")
    ordered = {**dict(list(content.items())[:4]), "clip_00001.meta.json": meta, **dict(list(content.items())[4:])}
    listing = listed(write_tar(tmp_path / "a.tar", ordered))
    assert [clip.key for clip in listing.clips] == ["clip_00000", "clip_00002"]
    assert expected in listing.bad[0].reason


def test_a_dot_in_a_key_is_explained(tmp_path: Path) -> None:
    content = {
        f"ep0.{number}.{field}.npy": npy_bytes(array)
        for number in (5, 7)
        for field, array in CLIPS["clip_00000"].items()
    }
    (bad,) = listed(write_tar(tmp_path / "a.tar", content)).bad
    assert bad.key == "ep0"
    assert "is there a dot in the key? A key ends at the first one" in bad.reason


def test_keys_in_folders_keep_their_folder(tmp_path: Path) -> None:
    content = {
        f"./v1.0/{name}": value for name, value in members(features="features.npy", actions="actions.npy").items()
    }
    (bad, *_) = listed(write_tar(tmp_path / "a.tar", content)).bad
    assert "v1_0/clip_00000 would do" in bad.reason
    content = {name.replace("./v1.0", "ice"): value for name, value in content.items()}
    assert listed(write_tar(tmp_path / "b.tar", content)).clips[0].key == "ice/clip_00000"


def test_the_same_key_in_two_tars_or_twice_in_one_is_refused(tmp_path: Path) -> None:
    path, _ = tars(tmp_path / "two", CLIPS)
    (path / "shard-000007.tar").write_bytes((path / "shard-000001.tar").read_bytes())
    with pytest.raises(
        DataError, match=r"clip_00001: two clips .* shard-000001.tar/clip_00001 and at shard-000007.tar"
    ):
        open_source(path).listing()
    (path / "shard-000007.tar").unlink()
    with tarfile.open(path / "shard-000001.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("other.features.npy"))
        tar.addfile(tarfile.TarInfo("clip_00001.features.npy"))
    with pytest.raises(DataError, match=r"source\.key=clip_00001: two clips"):
        open_source(path).listing()
    with tarfile.open(path / "shard-000001.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("clip_00001.features.npy"))
    with pytest.raises(DataError, match=r"there are two members clip_00001.features.npy"):
        open_source(path).listing()


def test_a_damaged_tar_is_an_error_of_the_whole_source_and_never_a_shorter_one(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", members(features="features.npy", actions="actions.npy"))
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar]
    for length in range(0, headers[-1] + 512, 512):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=re.escape(f"source={path}: ")):
            open_source(path).listing()
    for at in headers:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(DataError, match=f"the header at byte {at} is damaged"):
            open_source(path).listing()


def test_a_member_with_a_bad_header_is_named(tmp_path: Path) -> None:
    content = members(features="features.npy", actions="actions.npy")
    content["clip_00001.features.npy"] = content["clip_00001.features.npy"][:-3]
    content["clip_00002.actions.npy"] = b"PK\x03\x04" + bytes(60)
    listing = listed(write_tar(tmp_path / "a.tar", content))
    assert [bad.reason.split(": ")[1] for bad in listing.bad] == ["clip_00001.features.npy", "clip_00002.actions.npy"]
    assert "it is truncated" in listing.bad[0].reason
    assert "this is an npz" in listing.bad[1].reason


def test_what_looks_like_a_tar_and_is_not_read_is_reported(tmp_path: Path) -> None:
    content = members(features="features.npy", actions="actions.npy")
    (tmp_path / "a" / "b").mkdir(parents=True)
    write_tar(tmp_path / "a" / "b" / "x.tar", content)
    for name in ("y.tar.gz", "a/z.TGZ", "a/w.TAR"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    listing = listed(tmp_path)
    assert {clip.where.rpartition("/")[0] for clip in listing.clips} == {"a/b/x.tar"}
    reasons = sorted(bad.reason.split(";")[0].split(",")[0] for bad in listing.bad)
    assert reasons == [
        "a/w.TAR: the names of tars end in .tar",
        "a/z.TGZ: compressed tars cannot be read at any place",
        "link: it is a link to a folder",
        "y.tar.gz: compressed tars cannot be read at any place",
    ]


@pytest.mark.parametrize("kind", [tars, tar_of_npz])
def test_listed_clips_are_read_without_walking_their_tars_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Callable[..., tuple[Path, dict[str, Any]]]
) -> None:
    path, kwargs = kind(tmp_path / "clips", CLIPS)
    source = open_source(path, **kwargs)
    clips = source.listing().clips
    fresh = pickle.loads(pickle.dumps(source))
    found = fresh.read(clips[0])
    walked: list[int] = []
    monkeypatch.setattr("data_pipeline.sources.tars.samples", walked.append)
    for each in (source, pickle.loads(pickle.dumps(source))):
        for clip in clips:
            arrays = each.read(clip)
            for name, array in CLIPS[clip.key].items():
                np.testing.assert_array_equal(arrays[name], array)
    assert walked == []
    np.testing.assert_array_equal(found["features"], CLIPS[clips[0].key]["features"])
