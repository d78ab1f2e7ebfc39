from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.sources.base import Listing
from data_pipeline.sources.open import open_source
from tests.source_layouts import listing_lines, make_clips, save_npz

CLIPS = make_clips(3)


@pytest.fixture
def lines(tmp_path: Path) -> list[dict[str, object]]:
    """Lines of a listing in the folder `inside`, whose files are there."""
    return listing_lines(tmp_path / "inside", CLIPS)


def listed(root: Path, lines: list[dict[str, object]] | str, **options: str | bool) -> Listing:
    text = lines if isinstance(lines, str) else "".join(json.dumps(line) + "\n" for line in lines)
    (root / "inside" / "clips.jsonl").write_text(text)
    return open_source(root / "inside" / "clips.jsonl", options=options).listing()


def reason(root: Path, lines: list[dict[str, object]], **change: object) -> str:
    lines[1] |= change
    listing = listed(root, lines)
    assert [clip.key for clip in listing.clips] == ["clip_00000", "clip_00002"]
    return listing.bad[0].reason


def test_partition_split_and_length_come_from_the_lines(tmp_path: Path, lines: list[dict[str, object]]) -> None:
    for line, partition, split in zip(lines, ("a", "b", "b"), ("train", "heldout", "train"), strict=True):
        line |= {"partition": partition, "split": split}
    lines[0] |= {"states": None, "extrinsics": ""}
    for line in lines[1:]:
        del line["states"], line["extrinsics"]
    clips = listed(tmp_path, lines).clips
    assert [(clip.partition, clip.split, sorted(clip.arrays)) for clip in clips] == [
        ("a", "train", ["actions", "features"]),
        ("b", "heldout", ["actions", "features"]),
        ("b", "train", ["actions", "features"]),
    ]


def test_arrays_may_lie_in_an_archive(tmp_path: Path, lines: list[dict[str, object]]) -> None:
    for line in lines:
        save_npz(tmp_path / "inside" / f"{line['key']}.npz", CLIPS[str(line["key"])])
        line |= dict.fromkeys(("features", "actions", "states", "extrinsics"), f"{line['key']}.npz")
    listing = listed(tmp_path, lines)
    assert len(listing.clips) == 3
    source = open_source(tmp_path / "inside" / "clips.jsonl")
    arrays = source.read(listing.clips[2])
    np.testing.assert_array_equal(arrays["extrinsics"], CLIPS["clip_00002"]["extrinsics"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"length": 5}, "features.npy: it has 4 frames, the clip's entry says 5"),
        ({"length": "4x"}, "clips.jsonl:2: length is '4x', not a number"),
        ({"length": True}, "length is True"),
        ({"length": 4.0}, "length is 4.0"),
        ({"actions": None}, "clips.jsonl:2: it says no actions"),
        ({"actions": 3}, "actions is 3, not a text"),
        ({"actions": "files/none.npy"}, "files/none.npy: the file is missing"),
        ({"features": "files"}, "files: it is not a regular file"),
        ({"split": "test"}, "clips.jsonl:2: unknown split 'test': valid: train, heldout"),
        ({"split": "trian"}, "did you mean train?"),
        ({"partition": "../x"}, "the partition '../x' has other signs"),
        ({"partition": 3}, "partition is 3, not a text"),
        ({"key": "a.b"}, "a key has letters"),
        ({"key": ""}, "it says no key"),
        ({"key": 7}, "key is 7, not a text"),
    ],
)
def test_a_bad_line_is_set_apart(
    tmp_path: Path, lines: list[dict[str, object]], change: dict[str, object], expected: str
) -> None:
    assert expected in reason(tmp_path, lines, **change)


@pytest.mark.parametrize("text", ["{", "[]", "7", '"x"', "[" * 60_000, '{"key": "' + "x" * 70_000 + '"}', "\x00"])
def test_a_line_that_is_no_object_is_named_by_its_number(
    tmp_path: Path, lines: list[dict[str, object]], text: str
) -> None:
    good = [json.dumps(line) for line in lines]
    listing = listed(tmp_path, "\n".join([good[0], "", text, *good[1:]]))
    assert len(listing.clips) == 3
    (bad,) = listing.bad
    assert bad.where == "clips.jsonl:3"


def test_paths_stay_inside_the_folder_of_the_listing(tmp_path: Path, lines: list[dict[str, object]]) -> None:
    outside = tmp_path / "outside.npy"
    np.save(outside, CLIPS["clip_00001"]["actions"])
    (tmp_path / "inside" / "way_out").symlink_to(tmp_path)
    (tmp_path / "inside" / "link.npy").symlink_to(outside)
    (tmp_path / "inside" / "loop").symlink_to(tmp_path / "inside" / "loop")
    for path in (str(outside), "../outside.npy", "files/../../outside.npy", "way_out/outside.npy", "a\0b"):
        assert "leads out of the listing's folder; outside=true allows that" in reason(tmp_path, lines, actions=path)
    assert "it is a link" in reason(tmp_path, lines, actions="link.npy")
    assert "it is a link" in reason(tmp_path, lines, actions="loop/x.npy")
    for path in (str(outside), "../outside.npy", "way_out/outside.npy"):
        lines[1]["actions"] = path
        assert not listed(tmp_path, lines, outside=True).bad
    lines[1]["actions"] = "link.npy"
    assert "it is a link" in listed(tmp_path, lines, outside=True).bad[0].reason
    lines[1]["actions"] = "a\0b"
    assert len(listed(tmp_path, lines, outside=True).bad) == 1


def test_a_column_nobody_knows_is_refused_unless_it_is_ignored(tmp_path: Path, lines: list[dict[str, object]]) -> None:
    lines[1] |= {"spilt": "train", "caption": "a block"}
    with pytest.raises(DataError) as caught:
        listed(tmp_path, lines)
    assert "clips.jsonl:2=spilt: unknown column. Fix: did you mean split?" in str(caught.value)
    assert "ignore=caption,spilt" in str(caught.value)
    assert len(listed(tmp_path, lines, ignore="caption, spilt").clips) == 3


def test_the_same_key_twice_is_refused(tmp_path: Path, lines: list[dict[str, object]]) -> None:
    with pytest.raises(DataError, match=r"have this key: at clips.jsonl:2 and at clips.jsonl:4"):
        listed(tmp_path, [*lines, lines[1]])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "its first line must name the columns"),
        ("key,key\n", "its first line must name the columns"),
        ('key,features,actions\n"a,b\n', "not readable as CSV"),
        ("key,features,actions\na,b\n", "it has 2 values, the first line names 3 columns"),
    ],
)
def test_a_csv_of_another_form_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "clips.csv").write_text(text)
    source = open_source(tmp_path / "clips.csv")
    try:
        found = source.listing().bad[0].reason
    except DataError as error:
        found = str(error)
    assert expected in found


def test_only_a_regular_file_is_read_as_a_listing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "clips.jsonl")
    with pytest.raises(DataError, match="not a regular file"):
        open_source(tmp_path / "clips.jsonl").listing()
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(DataError, match="codec can't decode"):
        open_source(tmp_path / "bytes.jsonl").listing()
