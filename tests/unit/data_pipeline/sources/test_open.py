from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.sources.open import KINDS, open_source, options_of, recognise
from tests.source_layouts import LAYOUTS, make_clips, npy_beside, save, thesis, write_tar

CLIPS = make_clips(2)
SHOWN = {
    "thesis": ("thesis", "clip_00000/feature_maps"),
    "npy beside": ("npy", "clip_00000.actions.npy"),
    "npy in folders, Fortran order": ("npy", "actions/clip_00000.npy"),
    "npz": ("npz", "clip_00000.npz"),
    "zarr v2": ("zarr", "features"),
    "zarr v3, sharded": ("zarr", "features"),
    "zarr, a group a clip": ("zarr-clips", "clip_00000"),
    "jsonl": ("listing", "clips.jsonl"),
    "csv": ("listing", "clips.csv"),
    "tars": ("tars", "shard-000000.tar"),
    "tar of npz": ("tars", "all.tar"),
    "features folder": ("features", "features.json"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.requires("zarr")] if "zarr" in n else []) for n in SHOWN]
)
def test_every_layout_is_recognised_and_says_by_what(tmp_path: Path, name: str) -> None:
    path, _ = LAYOUTS[name](tmp_path / "clips", CLIPS)
    assert recognise(path) == SHOWN[name]
    assert open_source(path).kind == SHOWN[name][0]


def test_several_kinds_in_one_folder_are_not_chosen_between(tmp_path: Path) -> None:
    path, _ = npy_beside(tmp_path / "clips", CLIPS)
    np.savez(path / "more.npz", np.zeros(3))
    write_tar(path / "deep" / "er" / "a.tar", {})
    with pytest.raises(DataError) as caught:
        open_source(path)
    assert "several kinds: npy (clip_00000.actions.npy), npz (more.npz), tars (deep/er/a.tar)" in str(caught.value)
    assert open_source(path, kind="npy").kind == "npy"


def test_a_listing_beside_its_files_is_not_passed_over(tmp_path: Path) -> None:
    path, _ = npy_beside(tmp_path / "clips", CLIPS)
    (path / "clips.jsonl").write_text(
        '{"key": "only", "features": "clip_00000.npy", "actions": "clip_00000.actions.npy"}'
    )
    with pytest.raises(DataError, match=r"npy \(clip_00000.actions.npy\), listing \(clips.jsonl\)"):
        open_source(path)
    assert [clip.key for clip in open_source(path, kind="listing").listing().clips] == ["only"]
    (path / "others.csv").write_text("key\n")
    for kind in (None, "listing"):
        with pytest.raises(DataError, match="it holds 2 listings"):
            open_source(path, kind=kind)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("manifest.json", "it is a data set already"),
        ("journal/plan.json", "it is an unfinished data set"),
        ("parts/plan.json", "they are unfinished features"),
        ("pixels.json", "they are pixels"),
    ],
)
def test_what_other_commands_left_is_not_taken_for_a_source(tmp_path: Path, name: str, expected: str) -> None:
    path, _ = npy_beside(tmp_path / "clips", CLIPS)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("{}")
    if name.startswith("journal"):
        (path / "plan.json").write_text("{}")
    with pytest.raises(DataError, match=expected):
        open_source(path)


def test_a_source_may_have_names_that_commands_use_too(tmp_path: Path) -> None:
    path, _ = npy_beside(tmp_path / "clips", CLIPS)
    (path / "plan.json").write_text("{}")
    (path / "parts").mkdir()
    for file in path.glob("*.npy"):
        file.rename(path / "parts" / file.name)
    assert [clip.key for clip in open_source(path).listing().clips] == [f"parts/{key}" for key in CLIPS]


def test_a_path_that_is_too_long_is_explained() -> None:
    for kind in (None, "npy"):
        with pytest.raises(DataError, match=r"source=.*cannot be read"):
            open_source("x" * 5000, kind=kind)


def test_rules_that_are_no_texts_are_explained(tmp_path: Path) -> None:
    path, _ = npy_beside(tmp_path / "clips", CLIPS)
    with pytest.raises(DataError, match="partition=1: a rule is a text"):
        open_source(path, partitions=[1, 2])  # pyright: ignore[reportArgumentType]


def test_a_tree_may_hold_other_files_of_its_clips(tmp_path: Path) -> None:
    path, _ = thesis(tmp_path / "clips", CLIPS)
    np.savez(path / "clip_00000" / "rgb.npz", np.zeros(3))
    assert open_source(path).kind == "thesis"


@pytest.mark.parametrize(
    ("path", "kind", "expected"),
    [
        ("none", None, "there is no such file or folder"),
        ("none", "npy", "there is no such file or folder"),
        ("empty", None, "it does not look like a source of clips of any kind"),
        ("notes.txt", None, "it does not look like a source"),
        ("notes.txt", "npy", "the kind npy is a folder"),
        ("notes.txt", "tars", "the kind tars is a .tar file or a folder of them"),
        ("empty", "listing", "it holds 0 listings"),
        ("empty", "zar", "kind=zar: there is no such kind of source. Fix: did you mean zarr?"),
        ("http://x/y.tar", None, "only local files are read"),
        ("pipe:cat x.tar", "tars", "only local files are read"),
    ],
)
def test_what_cannot_be_opened_is_said(tmp_path: Path, path: str, kind: str | None, expected: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError) as caught:
        open_source(path if ":" in path else tmp_path / path, kind=kind)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"token": 6}, "source.token=6: the kind npy has no such option. Fix: did you mean tokens?"),
        ({"frames": 3}, "source.frames=3: the kind npy has no such option"),
        ({"path": "x"}, "source.path=x: the kind npy has no such option"),
        ({"tokens": "six"}, "source.tokens=six: must be a whole number"),
        ({"tokens": True}, "source.tokens=True: must be a whole number"),
        ({"tokens": 0}, "source.tokens=0: a frame has at least one token"),
        ({"features_dtype": "float16"}, "must be bfloat16, float8_e4m3fn, float8_e5m2, uint16, uint8"),
        ({"extrinsics_rows": "all"}, "must be exact, first"),
    ],
)
def test_options_that_a_kind_does_not_have_are_refused(tmp_path: Path, options: dict, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        open_source(tmp_path, kind="npy", options=options)
    assert expected in str(caught.value)


def test_all_wrong_options_are_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_source(tmp_path, kind="zarr", options={"empty_chunks": "maybe", "tokens": "x", "a": 1})
    assert len(caught.value.problems) == 3


def test_numbers_and_truth_values_may_come_as_text(tmp_path: Path) -> None:
    flat = {key: {**arrays, "features": arrays["features"].reshape(24, 8)} for key, arrays in CLIPS.items()}
    path, _ = npy_beside(tmp_path / "clips", flat)
    clips = open_source(path, options={"tokens": "6"}).listing().clips
    assert clips[0].arrays["features"].shape == (4, 6, 8)


def test_rules_for_partitions_and_splits_reach_the_listing(tmp_path: Path) -> None:
    path, _ = npy_beside(tmp_path / "clips", make_clips(10, fields=()))
    source = open_source(path, partitions=("a=0..4", "b=4.."), split="heldout_last=0.5")
    found = [(clip.partition, clip.split) for clip in source.listing().clips]
    assert found == [("a", "train")] * 2 + [("a", "heldout")] * 2 + [("b", "train")] * 3 + [("b", "heldout")] * 3


@pytest.mark.parametrize("grid", ["2x3", (2, 3), [2, 3]])
def test_provenance_is_taken_and_the_grid_comes_from_the_features_too(tmp_path: Path, grid: object) -> None:
    path, _ = npy_beside(tmp_path / "clips", CLIPS)
    given = {"encoder": "vjepa2", "weights_sha256": "a" * 64, "encode_mode": "prefix", "grid": grid}
    source = open_source(path, provenance=given)
    source.listing()
    assert source.provenance.grid == (2, 3)
    assert (source.provenance.encoder, source.provenance.encode_mode) == ("vjepa2", "prefix")
    square = {key: {**arrays, "features": arrays["features"].reshape(4, 3, 2, 8)} for key, arrays in CLIPS.items()}
    path, _ = npy_beside(tmp_path / "square", square)
    own = open_source(path)
    assert {clip.arrays["features"].shape for clip in own.listing().clips} == {(4, 6, 8)}
    assert own.provenance.grid == (3, 2)
    with pytest.raises(DataError, match=r"provenance.grid=\[2, 3\]: the features of .* have a grid of \[3, 2\]"):
        open_source(path, provenance=given).listing()
    other = {"clip_00001": {**CLIPS["clip_00001"], "features": CLIPS["clip_00001"]["features"].reshape(4, 2, 3, 8)}}
    save(path / "clip_00001.npy", other["clip_00001"]["features"])
    assert "lie in 2 x 3, not 3 x 2" in open_source(path).listing().bad[0].reason


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"encodr": "x"}, "provenance.encodr=x: there is no such entry. Fix: did you mean encoder?"),
        (
            {"encode_mode": "per_frame"},
            "provenance.encode_mode=per_frame: there is no such thing. Fix: did you mean per-frame?",
        ),
        ({"action_alignment": "row1_to_row0"}, "did you mean row1-to-row0?"),
        ({"weights_sha256": "abc"}, "must be 64 hex digits"),
        ({"encoder": 3}, "must be a text"),
        ({"grid": "2x"}, "must be rows and columns of tokens"),
        ({"grid": (0, 6)}, "must be rows and columns of tokens"),
        ({"grid": 16}, "must be rows and columns of tokens"),
    ],
)
def test_provenance_that_cannot_be_is_refused(tmp_path: Path, given: dict[str, object], expected: str) -> None:
    with pytest.raises(DataError) as caught:
        open_source(tmp_path, kind="npy", provenance=given)
    assert expected in str(caught.value)


def test_every_kind_tells_its_options() -> None:
    for kind in KINDS:
        assert {"tokens", "features_dtype", "extrinsics_rows"} <= set(options_of(kind))
    assert options_of("zarr")["empty_chunks"] == "true or false"
