"""One bad clip among good ones is set apart with a reason that names file, value and rule; the others stay usable."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.sources.base import Listing, SkippedClip
from data_pipeline.sources.open import open_source
from tests import source_layouts as layouts
from tests.source_layouts import LAYOUTS, make_clips, save

CLIPS = make_clips()
BAD = "clip_00002"


def listed_with(name: str, root: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Listing:
    clips = {key: dict(arrays) for key, arrays in CLIPS.items()}
    change(clips[BAD])
    path, kwargs = LAYOUTS[name](root, clips)
    return open_source(path, **kwargs).listing()


def only_bad(listing: Listing) -> SkippedClip:
    assert [clip.key for clip in listing.clips] == [key for key in CLIPS if key != BAD]
    (bad,) = listing.bad
    assert bad.key == BAD
    return bad


Change = Callable[[np.ndarray], np.ndarray]
CHANGES: dict[str, tuple[str, Change, str]] = {
    "too wide": ("features", lambda a: a.repeat(2, 2), "are float16 [rows, 6, 16], not float16 [rows, 6, 8]"),
    "other tokens": ("features", lambda a: a.repeat(2, 1), "are float16 [rows, 12, 8], not float16 [rows, 6, 8]"),
    "other type": ("features", lambda a: a.astype("f4"), "are float32 [rows, 6, 8], not float16 [rows, 6, 8]"),
    "one frame": ("features", lambda a: a[:1], "too few frames, 1: there is no transition in fewer than 2"),
    "five dimensions": ("features", lambda a: a[None, None], "must be [F * N, E], [F, N, E] or [F, H, W, E]"),
    "big-endian": ("features", lambda a: a.astype(">f2"), "big-endian; store it with .astype('<f2')"),
    "bits": ("features", lambda a: a.view("u2"), "is it bfloat16 or uint16? Say so with the option"),
    "int8": ("features", lambda a: a.astype("i1"), "int8 features mean nothing without features_scale"),
    "narrow actions": ("actions", lambda a: a[:, :1], "actions are float32 [rows, 1], not float32 [rows, 2]"),
    "short actions": ("actions", lambda a: a[:2], "actions have 2 rows, and 4 frames need 3"),
    "long actions": ("actions", lambda a: a.repeat(3, 0), "actions have 9 rows, and 4 frames need 3"),
    "flat actions": ("actions", lambda a: a[:, 0], "actions [3]: must have two dimensions"),
    "text": ("actions", lambda a: a.astype("U3"), "its type '<U3' is refused: strings"),
    "truth": ("actions", lambda a: a > 0, "its type '|b1' is refused: truth values"),
    "short states": ("states", lambda a: a[:1], "states have 1 rows, and 4 frames need 4"),
    "short extrinsics": ("extrinsics", lambda a: a[:2], "extrinsics have 2 rows, and 4 frames need"),
}


def changed(change: str) -> Callable[[dict[str, np.ndarray]], None]:
    field, alter, _ = CHANGES[change]
    return lambda arrays: arrays.update({field: alter(arrays[field])})


def without(field: str) -> Callable[[dict[str, np.ndarray]], None]:
    def remove(arrays: dict[str, np.ndarray]) -> None:
        del arrays[field]

    return remove


@pytest.mark.parametrize("change", CHANGES)
def test_a_clip_of_another_shape_or_type_is_set_apart(tmp_path: Path, change: str) -> None:
    bad = only_bad(listed_with("npy beside", tmp_path / "clips", changed(change)))
    assert CHANGES[change][2] in bad.reason


@pytest.mark.parametrize("name", ["thesis", "npz", "csv", "tars", "tar of npz"])
def test_clips_of_every_kind_must_agree(tmp_path: Path, name: str) -> None:
    bad = only_bad(listed_with(name, tmp_path / "type", changed("other type")))
    assert CHANGES["other type"][2] in bad.reason
    bad = only_bad(listed_with(name, tmp_path / "states", without("states")))
    assert bad.reason == "it has no states, as in clip_00000 and 4 of 5 clips in all"


@pytest.mark.parametrize("name", ["thesis", "npy beside", "npz", "tars", "tar of npz", "features folder"])
@pytest.mark.parametrize("field", ["features", "actions"])
def test_a_clip_without_a_field_it_needs_is_set_apart(tmp_path: Path, name: str, field: str) -> None:
    bad = only_bad(listed_with(name, tmp_path / "clips", without(field)))
    assert BAD in bad.where
    missing = {"thesis": "holds no .npy" if field == "features" else "actions.npy: the file is missing"}
    assert missing.get(name, field) in bad.reason


@pytest.mark.requires("zarr")
def test_a_group_of_zarr_with_a_bad_clip_sets_it_apart(tmp_path: Path) -> None:
    for change, expected in (("too wide", "[rows, 6, 16]"), ("short actions", "2 rows"), ("truth", "type 'bool'")):
        assert expected in only_bad(listed_with("zarr, a group a clip", tmp_path / change, changed(change))).reason
    bad = only_bad(listed_with("zarr, a group a clip", tmp_path / "none", without("actions")))
    assert bad.reason == "clip_00002: actions: the file is missing"


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "it is truncated"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "something follows the values"),
        (lambda path: path.write_bytes(b""), "does not start like a .npy"),
        (lambda path: path.unlink() or path.symlink_to(path.parent.parent / "none.npy"), "it is a link"),
        (lambda path: path.unlink() or os.mkfifo(path), "not a regular file"),
        (lambda path: path.unlink() or np.savez(path.with_suffix(""), path.name) or rename_npz(path), "this is an npz"),
    ],
)
@pytest.mark.parametrize("name", ["npy beside", "jsonl"])
def test_a_bad_file_is_named(tmp_path: Path, name: str, place: Callable[[Path], object], expected: str) -> None:
    root = tmp_path / "clips"
    path, kwargs = LAYOUTS[name](root, CLIPS)
    files = [path for path in root.rglob("*.npy") if BAD in str(path.relative_to(root)) and "actions." in path.name]
    place(files[0])
    bad = only_bad(open_source(path, **kwargs).listing())
    assert bad.reason.startswith(f"{files[0].relative_to(root).as_posix()}: ")
    assert expected in bad.reason


def rename_npz(path: Path) -> None:
    path.with_suffix(".npz").rename(path)


def test_most_clips_rule_and_of_equal_parts_the_first(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number, channels in enumerate((4, 8, 8, 4, 8)):
        save(tmp_path / "most" / f"c{number}.npy", random.normal(size=(3, 2, channels)))
        save(tmp_path / "most" / f"c{number}.actions.npy", random.normal(size=(2, 1)))
    listing = open_source(tmp_path / "most").listing()
    assert [clip.key for clip in listing.clips] == ["c1", "c2", "c4"]
    assert listing.bad[0].reason == (
        "features are float64 [rows, 2, 4], not float64 [rows, 2, 8], as in c1 and 3 of 5 clips in all"
    )
    (tmp_path / "most" / "c4.npy").unlink()
    (tmp_path / "most" / "c4.actions.npy").unlink()
    assert [clip.key for clip in open_source(tmp_path / "most").listing().clips] == ["c0", "c3"]


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [("ep0.5_clip1", "ep0_5_clip1"), ("a b", "a_b"), ("é", "clip"), ("x" * 90, "x" * 60 + "-")],
)
@pytest.mark.parametrize("name", ["npy beside", "npz"])
def test_keys_that_cannot_be_are_set_apart_with_one_that_can(
    tmp_path: Path, name: str, key: str, suggestion: str
) -> None:
    clips = {**CLIPS, key: CLIPS[BAD]}
    path, kwargs = LAYOUTS[name](tmp_path / "clips", clips)
    listing = open_source(path, **kwargs).listing()
    assert len(listing.clips) == len(CLIPS)
    (bad,) = listing.bad
    assert repr(key) in bad.reason
    assert "no dots" in bad.reason
    assert suggestion in bad.reason


def test_a_name_that_no_terminal_can_show_is_made_readable(tmp_path: Path) -> None:
    path, _ = LAYOUTS["npz"](tmp_path / "clips", CLIPS)
    os.rename(os.fsencode(path / f"{BAD}.npz"), os.fsencode(path) + b"/\xff\x1b[31m.npz")
    (bad,) = open_source(path).listing().bad
    assert bad.reason.isprintable()
    assert bad.key.isprintable()
    bad.reason.encode()


def test_two_files_that_could_be_the_same_field_are_not_chosen_between(tmp_path: Path) -> None:
    path, _ = LAYOUTS["npy beside"](tmp_path / "clips", CLIPS)
    save(path / f"{BAD}_actions.npy", CLIPS[BAD]["actions"])
    text = only_bad(open_source(path).listing()).reason
    assert f"{BAD}.actions.npy: {BAD}_actions.npy could be the actions of the same clip" in text


def test_a_link_to_a_folder_is_not_followed_and_named(tmp_path: Path) -> None:
    path, _ = LAYOUTS["npy beside"](tmp_path / "clips", CLIPS)
    (path / "more").symlink_to(tmp_path)
    listing = open_source(path).listing()
    assert len(listing.clips) == len(CLIPS)
    assert [bad.reason for bad in listing.bad] == ["more: it is a link to a folder, which is not followed"]


def test_several_features_of_one_clip_need_a_name(tmp_path: Path) -> None:
    path, kwargs = LAYOUTS["thesis"](tmp_path / "clips", CLIPS)
    save(path / BAD / "feature_maps" / "other.npy", CLIPS[BAD]["features"])
    bad = only_bad(open_source(path, **kwargs).listing())
    assert "it holds other.npy, vjepa2_vitl16.npy; name one with the option features" in bad.reason
    chosen = {"features": "vjepa2_vitl16.npy"}
    assert len(open_source(path, options=chosen, **kwargs).listing().clips) == len(CLIPS)
    (bad, *others) = open_source(path, options={"features": "none.npy"}, **kwargs).listing().bad
    assert bad.reason == "clip_00000/feature_maps: it has no none.npy, only vjepa2_vitl16.npy"
    assert len(others) == 4


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it has no clips of the kind npz"):
        open_source(tmp_path, kind="npz").listing()


def test_what_every_kind_says_of_lengths(tmp_path: Path) -> None:
    layouts.thesis(tmp_path / "clips", CLIPS)
    longer = np.concatenate([CLIPS[BAD]["extrinsics"]] * 3)
    save(tmp_path / "clips" / BAD / "actions_states" / "extrinsics.npy", longer)
    source = open_source(tmp_path / "clips")
    listing = source.listing()
    assert not listing.bad
    assert source.provenance.action_alignment == "row1-to-row0"
    clip = next(clip for clip in listing.clips if clip.key == BAD)
    np.testing.assert_array_equal(source.read(clip)["extrinsics"], longer[:3])
    exact = open_source(tmp_path / "clips", options={"extrinsics_rows": "exact"})
    assert "extrinsics_rows=first takes the first ones" in only_bad(exact.listing()).reason
