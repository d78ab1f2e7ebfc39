from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.sources.base import Listing
from data_pipeline.sources.open import open_source
from tests.source_layouts import features_folder, make_clips, save_npz

CLIPS = make_clips(3, fields=("states",))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return features_folder(tmp_path / "features", CLIPS)[0]


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / "features.json").read_text())
    change(document)
    (folder / "features.json").write_text(json.dumps(document))


def rewrite(folder: Path, **arrays: np.ndarray) -> None:
    """Change arrays of the second clip, as its encoder might have."""
    path = folder / "all" / "clip_00001.npz"
    save_npz(path, {**CLIPS["clip_00001"], **arrays})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit(folder, lambda document: document["clips"][1].update(sha256=digest))


def reason(folder: Path) -> str:
    listing = open_source(folder).listing()
    assert [clip.key for clip in listing.clips] == ["clip_00000", "clip_00002"]
    return listing.bad[0].reason


def test_clips_partitions_splits_and_provenance_are_those_of_the_document(folder: Path) -> None:
    edit(folder, lambda document: document["clips"][2].update(split="heldout"))
    source = open_source(folder)
    listing = source.listing()
    assert [(clip.partition, clip.split) for clip in listing.clips] == [("all", "train")] * 2 + [("all", "heldout")]
    digests = [hashlib.sha256((folder / clip.where).read_bytes()).hexdigest() for clip in listing.clips]
    assert [clip.stamp for clip in listing.clips] == digests
    assert (source.provenance.encoder, source.provenance.grid) == ("x", (2, 3))
    assert (source.provenance.encode_mode, source.provenance.action_alignment) == ("per-frame", "as-is")


def test_the_document_may_say_how_actions_are_aligned_and_what_integers_are(folder: Path) -> None:
    features = CLIPS["clip_00001"]["features"].view("u2")
    for key in CLIPS:
        np.savez(folder / "all" / f"{key}.npz", features=features, actions=np.ones((8, 2), "f4"))
        digest = hashlib.sha256((folder / "all" / f"{key}.npz").read_bytes()).hexdigest()
        edit(folder, lambda document, d=digest, k=key: document["clips"][int(k[-1])].update(sha256=d))
    edit(folder, lambda document: document.update(action_alignment="pair-mean", dtype="bfloat16"))
    source = open_source(folder)
    listing: Listing = source.listing()
    assert not listing.bad
    assert source.provenance.action_alignment == "pair-mean"
    assert listing.clips[0].arrays["features"].dtype == "bfloat16"
    np.testing.assert_array_equal(source.read(listing.clips[0])["features"], features)


def test_a_file_of_another_sha256_is_not_read(folder: Path) -> None:
    source = open_source(folder)
    clip = source.listing().clips[1]
    save_npz(folder / clip.where, {**CLIPS[clip.key], "actions": CLIPS[clip.key]["actions"] + 1})
    with pytest.raises(DataError, match=r"all/clip_00001.npz: its sha256 differs from features.json"):
        source.read(clip)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"key": "a.b"}, "a key has letters, digits, _, - and / only, at most 80 bytes, no dots; a_b would do"),
        ({"key": "../up"}, "a key has letters"),
        ({"partition": "../.."}, "the partition '../..' has other signs"),
        ({"partition": "/etc"}, "the partition '/etc' has other signs"),
        ({"split": "test"}, "unknown split 'test'"),
        ({"length": 3}, "it has 4 frames, the clip's entry says 3"),
        ({"key": "gone"}, "all/gone.npz: the file is missing"),
    ],
)
def test_a_bad_entry_sets_its_clip_apart(folder: Path, change: dict[str, object], expected: str) -> None:
    edit(folder, lambda document: document["clips"][1].update(change))
    assert expected in reason(folder)


def test_a_bad_archive_sets_its_clip_apart(folder: Path) -> None:
    rewrite(folder, features=CLIPS["clip_00001"]["features"][:1], states=np.ones((1, 3), "f4"))
    edit(folder, lambda document: document["clips"][1].update(length=1))
    assert "there is no transition" in reason(folder)
    rewrite(folder, features=np.repeat(CLIPS["clip_00001"]["features"], 2, 2))
    edit(folder, lambda document: document["clips"][1].update(length=4))
    assert "float16 [rows, 6, 16], not float16 [rows, 6, 8]" in reason(folder)
    (folder / "all" / "clip_00001.npz").write_bytes(b"x")
    assert "it is not a .npz archive" in reason(folder)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d.update(grid=None), "features.grid=None: must be of type list"),
        (lambda d: d.update(grid=[2]), "features.grid=[2]: must be rows and columns"),
        (lambda d: d.update(grid=[2, 4]), "provenance.grid=[2, 4]: the features of"),
        (lambda d: d.update(clips=[{"key": "a"}]), "features.clips[0].partition=None: must be of type str"),
        (lambda d: d.update(clips=[7]), "features.clips[0]=7: must be an object"),
        (lambda d: d["clips"][0].update(length=True), "features.clips[0].length=True: must be of type int"),
        (lambda d: d.update(clips=[]), "it has no clips"),
        (lambda d: d.update(encode_mode="frames"), "features.encode_mode=frames: there is no such thing"),
        (lambda d: d.update(action_alignment="pair_mean"), "did you mean pair-mean?"),
        (lambda d: d.update(format=2), "features.format=2"),
        (lambda d: d["clips"].append(d["clips"][0]), "source.key=clip_00000: two clips"),
    ],
)
def test_a_document_that_cannot_be_used_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], object], expected: str
) -> None:
    edit(folder, change)
    with pytest.raises(DataError) as caught:
        open_source(folder).listing()
    assert expected in str(caught.value)


def test_provenance_may_be_added_to_but_not_contradicted(folder: Path) -> None:
    edit(folder, lambda document: document.update(encode_mode="unknown"))
    source = open_source(folder, provenance={"encode_mode": "prefix", "action_alignment": "first"})
    assert (source.provenance.encode_mode, source.provenance.action_alignment) == ("prefix", "first")
    with pytest.raises(DataError, match=r"provenance.encoder=mine: .*features.json says x"):
        open_source(folder, provenance={"encoder": "mine"})
