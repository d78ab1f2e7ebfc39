from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.sources.open import open_source
from tests.source_layouts import make_clips, zarr_clips, zarr_stacked, zarr_v2, zarr_v3, zarr_v3_sharded

pytestmark = pytest.mark.requires("zarr")

LENGTHS = np.array([4, 3, 2, 4])
RANDOM = np.random.default_rng(1)
FEATURES = RANDOM.normal(size=(4, 4, 6, 8)).astype(np.float16)
STATES = RANDOM.normal(size=(4, 4, 3)).astype(np.float32)


def group(root: Path, version: int, **arrays: np.ndarray) -> Path:
    import zarr

    opened: Any = zarr.open_group(root, mode="w", zarr_format=3 if version == 3 else 2)
    for name, array in arrays.items():
        # Labels of zero are meant.
        config = {"write_empty_chunks": array.ndim == 1}
        opened.create_array(name, data=array, chunks=(1, *array.shape[1:]), config=config)
    return root


def padded(root: Path, version: int, recorded: int, **more: np.ndarray) -> Path:
    actions = RANDOM.normal(size=(4, recorded, 2)).astype(np.float32)
    return group(root, version, features=FEATURES, actions=actions, states=STATES, length=LENGTHS, **more)


@pytest.mark.filterwarnings("ignore::zarr.errors.UnstableSpecificationWarning")
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("kind", ["U", "S", "text"])
def test_labels_beside_the_arrays_name_key_partition_and_split(tmp_path: Path, version: int, kind: str) -> None:
    import zarr

    texts = {
        "key": ["a1", "b2", "c3", "d/4"],
        "partition": ["ice", "ice", "base", "base"],
        "split": ["train", "heldout", "train", "train"],
    }
    root = padded(tmp_path / "group", version, 3)
    for name, values in texts.items():
        opened: Any = zarr.open_group(root, mode="a")
        if kind == "text":
            opened.create_array(name, shape=(4,), dtype="str")[:] = np.array(values, dtype=object)
        else:
            opened.create_array(name, data=np.array(values, dtype=kind))
    source = open_source(root)
    listing = source.listing()
    assert not listing.bad
    assert [(clip.key, clip.partition, clip.split) for clip in listing.clips] == list(zip(*texts.values(), strict=True))
    np.testing.assert_array_equal(source.read(listing.clips[1])["features"], FEATURES[1, :3])


@pytest.mark.filterwarnings("ignore::zarr.errors.UnstableSpecificationWarning")
def test_a_group_of_the_sharder_keeps_labels_types_and_provenance(tmp_path: Path) -> None:
    import zarr

    bits, actions = FEATURES.view("u2"), np.ones((4, 3, 2), "f4")
    labels = {"partition": np.array([1, 0, 0, 0]), "split": np.array([0, 1, 0, 0]), "length": np.array([4, 3, 2, 0])}
    root = group(tmp_path / "g", 3, features=bits, actions=actions, key=np.array(["a", "b", "c", ""]), **labels)
    opened: Any = zarr.open_group(root, mode="a")
    names = {"partitions": ["ice", "base"], "splits": ["train", "heldout"], "encode_mode": "prefix"}
    opened.attrs.update(names)
    opened["features"].attrs["stored_type"] = "bfloat16"
    source = open_source(root)
    listing = source.listing()
    assert not listing.bad
    assert [(clip.key, clip.partition, clip.split, clip.length) for clip in listing.clips] == [
        ("a", "base", "train", 4), ("b", "ice", "heldout", 3), ("c", "ice", "train", 2),
    ]  # fmt: skip
    assert listing.clips[0].arrays["features"].dtype == "bfloat16"
    assert source.provenance.encode_mode == "prefix"
    opened.attrs["partitions"] = ["ice"]
    with pytest.raises(DataError, match="it holds numbers from 0 to 1 for 1 names"):
        open_source(root).listing()
    opened.attrs.update(partitions=["ice", "base"], encode_mode="frames")
    with pytest.raises(DataError, match="its attributes cannot be used: encode_mode is 'frames'"):
        open_source(root).listing()


def test_keys_may_be_numbers_and_other_names_are_options(tmp_path: Path) -> None:
    root = padded(tmp_path / "group", 3, 3, ids=np.array([7, 3, 12, 40]), tasks=np.array([0, 1, 1, 2]))
    listing = open_source(root, options={"key": "ids", "partition": "tasks"}).listing()
    assert [(clip.key, clip.partition) for clip in listing.clips] == [("7", "0"), ("3", "1"), ("12", "1"), ("40", "2")]
    with pytest.raises(DataError, match=r"source.key=.*/idz: the file is missing"):
        open_source(root, options={"key": "idz"}).listing()


@pytest.mark.parametrize(
    ("rows", "alignment", "expected"),
    [
        (3, "as-is", LENGTHS - 1),
        (4, "difference", LENGTHS),
        (8, "pair-mean", 2 * LENGTHS),
        (6, "pair-mean", 2 * LENGTHS - 2),
    ],
)
def test_the_padding_of_short_clips_is_left_out(
    tmp_path: Path, rows: int, alignment: str, expected: np.ndarray
) -> None:
    source = open_source(padded(tmp_path / "group", 2, rows), provenance={"action_alignment": alignment})
    listing = source.listing()
    assert not listing.bad
    for clip, length, count in zip(listing.clips, LENGTHS, expected, strict=True):
        arrays = source.read(clip)
        assert (clip.length, len(arrays["states"]), len(arrays["actions"])) == (length, length, count)
        np.testing.assert_array_equal(arrays["features"], FEATURES[int(clip.key[-1]), :length])


def test_rows_of_actions_that_nobody_can_guess_need_an_array_that_says_them(tmp_path: Path) -> None:
    root = padded(tmp_path / "group", 3, 13, rows=np.array([13, 9, 6, 12]))
    source = open_source(root, provenance={"action_alignment": "first"})
    assert [clip.arrays["actions"].shape[0] for clip in source.listing().clips] == [13, 9, 6, 12]
    shutil.rmtree(root / "rows")
    bad = open_source(root, provenance={"action_alignment": "first"}).listing().bad
    assert "nobody says how many of 13 rows of actions belong to 3 frames of 4" in bad[0].reason


def test_flattened_features_are_cut_by_frames(tmp_path: Path) -> None:
    flat = FEATURES.reshape(4, 24, 8)
    root = group(tmp_path / "g", 3, features=flat, actions=np.ones((4, 3, 2), "f4"), length=LENGTHS, states=STATES)
    source = open_source(root, options={"tokens": 6})
    for number, clip in enumerate(source.listing().clips):
        np.testing.assert_array_equal(source.read(clip)["features"], FEATURES[number, : LENGTHS[number]])


@pytest.mark.parametrize("write", [zarr_v2, zarr_v3_sharded, zarr_clips])
def test_a_missing_chunk_is_not_read_as_zeros(tmp_path: Path, write: Callable[..., Any]) -> None:
    root, _ = write(tmp_path / "group", make_clips())
    folder = root / "features" if (root / "features").is_dir() else root / "clip_00000" / "features"
    names = (".zarray", ".zattrs", "zarr.json")
    min(path for path in folder.rglob("*") if path.is_file() and path.name not in names).unlink()
    source = open_source(root)
    listing = source.listing()
    assert "is missing: zarr would read zeros there; empty_chunks=true says" in listing.bad[0].reason
    filled = open_source(root, options={"empty_chunks": True}).listing()
    assert not filled.bad


def test_zeros_that_were_meant_are_read_when_the_user_says_so(tmp_path: Path) -> None:
    actions = np.ones((4, 3, 2), "f4")
    actions[1] = 0
    root = group(tmp_path / "g", 3, features=FEATURES, actions=actions)
    assert [bad.key for bad in open_source(root).listing().bad] == ["clip_00001"]
    source = open_source(root, options={"empty_chunks": "true"})
    clips = source.listing().clips
    np.testing.assert_array_equal(source.read(clips[1])["actions"], actions[1])


@pytest.mark.parametrize("shards", [None, 2])
def test_a_truncated_or_flipped_chunk_is_named_when_it_is_read(tmp_path: Path, shards: int | None) -> None:
    root, _ = zarr_stacked(tmp_path / "group", make_clips(), 3, shards=shards)
    source = open_source(root)
    chunk = root / "features" / "c" / "1" / "0" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-9])
    clip = source.listing().clips[2 if shards else 1]
    with pytest.raises(DataError, match=rf"features\[{clip.where[4:]}\]: its chunks cannot be read") as caught:
        source.read(clip)
    assert clip.key in str(caught.value)


def test_a_pipe_in_place_of_a_chunk_does_not_hang(tmp_path: Path) -> None:
    root, _ = zarr_v2(tmp_path / "group", make_clips())
    (root / "features" / "2.0.0.0").unlink()
    os.mkfifo(root / "features" / "2.0.0.0")
    (bad,) = open_source(root).listing().bad
    assert bad.reason == "features[2]: its chunk 2.0.0.0 is not a regular file"


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("name", ["partition", "split", "length"])
def test_a_label_whose_chunk_is_lost_or_a_pipe_is_refused(tmp_path: Path, version: int, name: str) -> None:
    import zarr

    labels = {"partition": np.array([1, 0, 0, 1]), "split": np.array([1, 0, 0, 1])}
    root = padded(tmp_path / "g", version, 3, **labels)
    opened: Any = zarr.open_group(root, mode="a")
    opened.attrs.update({"partitions": ["base", "ice"], "splits": ["train", "heldout"]})
    assert len(open_source(root).listing().clips) == 4
    chunk = root / name / ("0" if version == 2 else "c/0")
    chunk.unlink()
    with pytest.raises(DataError, match=rf"source.{name}=.*its chunk .*0 is missing"):
        open_source(root).listing()
    assert open_source(root, options={"empty_chunks": True})
    os.mkfifo(chunk)
    with pytest.raises(DataError, match=rf"source.{name}=.*is not a regular file"):
        open_source(root, options={"empty_chunks": True}).listing()


@pytest.mark.parametrize("version", [2, 3])
def test_labels_of_huge_texts_are_refused_before_they_are_allocated(tmp_path: Path, version: int) -> None:
    root = padded(tmp_path / "g", version, 3, partition=np.array(["a", "b", "a", "b"]))
    path = root / "partition" / (".zarray" if version == 2 else "zarr.json")
    document = json.loads(path.read_text())
    if version == 2:
        document["dtype"] = "<U50000000"
    else:
        document["data_type"]["configuration"]["length_bytes"] = 200_000_000
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match="each of its texts takes 200000000 bytes, more than 4096"):
        open_source(root).listing()


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def edit(content: bytes) -> bytes:
        document = json.loads(content)
        change(document)
        return json.dumps(document).encode()

    return edit


V2: list[tuple[Callable[[bytes], bytes], str]] = [
    (edited(lambda d: d.update(dtype="|O")), "Python objects, which could run code"),
    (edited(lambda d: d.update(dtype="|O", filters=[{"id": "pickle"}])), "its filters pickle are not taken"),
    (edited(lambda d: d.update(filters=[{"id": "pickle"}])), "its filters pickle are not taken"),
    (edited(lambda d: d.update(compressor={"id": "pickle"})), "its compressor 'pickle' is none of"),
    (edited(lambda d: d.update(dtype=[["x", "<f4"]])), "it has a structured type"),
    (edited(lambda d: d.update(dtype=">f2")), "big-endian"),
    (edited(lambda d: d.update(dtype="<U3")), "it holds text, not numbers"),
    (edited(lambda d: d.update(shape=[5, -1, 6, 8])), "are no sizes"),
    (edited(lambda d: d.update(shape=[5, 4, 6, 1 << 50])), "are no sizes"),
    (edited(lambda d: d.update(chunks=[1, 4, 6, 0])), "are no sizes"),
    (edited(lambda d: d.update(chunks=[1, 4, 6])), "do not fit its shape"),
    (edited(lambda d: d.update(shape=[5, 4, 6, 1 << 20], chunks=[1, 1, 1, 8])), "lies in more than 65536 chunks"),
    (
        edited(lambda d: d.update(shape=[5, 4, 1 << 20, 1 << 20], chunks=[1, 4, 1 << 16, 1 << 8])),
        "more than 4294967296",
    ),
    (edited(lambda d: d.update(chunks=[1, 1 << 20, 1 << 10, 8])), "are too large"),
    (edited(lambda d: d.update(chunks=[1 << 30, 4, 6, 8])), "are too large"),
    (edited(lambda d: d.update(shape=[1 << 39, 4, 6, 8])), "clips, more than 10000000"),
    (edited(lambda d: d.update(dimension_separator="../")), "neither . nor /"),
    (edited(lambda d: d.pop("chunks")), "its metadata lack something"),
    (edited(lambda d: d.update(zarr_format=7)), "its zarr_format is 7"),
    (lambda _: b"[" * 100_000, "nested too deeply"),
    (lambda _: b"[]", "not a JSON object"),
    (lambda content: content[:-5], "not readable as JSON"),
    (lambda _: b" " * (1 << 21), "more than 1048576"),
]
V3: list[tuple[Callable[[bytes], bytes], str]] = [
    (edited(lambda d: d.update(data_type="bool")), "its type 'bool' is refused"),
    (edited(lambda d: d.update(data_type={"name": "numpy.datetime64"})), "its type 'numpy.datetime64' is refused"),
    (edited(lambda d: d["codecs"].append({"name": "numcodecs.pickle"})), "its codec 'numcodecs.pickle' is none of"),
    (edited(lambda d: d["codecs"][0].update(configuration={"endian": "big"})), "big-endian"),
    (edited(lambda d: d["chunk_grid"].update(name="rectangular")), "its chunk grid 'rectangular'"),
    (edited(lambda d: d.update(node_type="group")), "not a zarr array of format 2 or 3"),
    (edited(lambda d: d.update(codecs=None)), "its metadata lack something"),
    (
        edited(lambda d: d["chunk_grid"]["configuration"].update(chunk_shape=[1 << 30, 4, 6, 8])),
        "are too large",
    ),
]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("zarr")
    return {2: zarr_v2(root / "2", make_clips())[0], 3: zarr_v3(root / "3", make_clips())[0]}


@pytest.mark.parametrize(("version", "edit", "expected"), [(2, *case) for case in V2] + [(3, *case) for case in V3])
def test_hostile_and_damaged_metadata_are_refused_before_zarr_sees_them(
    stores: dict[int, Path], tmp_path: Path, version: int, edit: Callable[[bytes], bytes], expected: str
) -> None:
    shutil.copytree(stores[version], tmp_path / "group")
    path = tmp_path / "group" / "features" / (".zarray" if version == 2 else "zarr.json")
    path.write_bytes(edit(path.read_bytes()))
    try:
        listing = open_source(tmp_path / "group", kind="zarr").listing()
    except DataError as error:
        text = str(error)
    else:
        assert not listing.clips
        text = listing.bad[0].reason
    assert expected in text
    assert "features" in text


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("{")])
def test_a_field_whose_metadata_are_lost_is_not_an_absent_field(
    stores: dict[int, Path], tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    shutil.copytree(stores[3], tmp_path / "group")
    damage(tmp_path / "group" / "states" / "zarr.json")
    with pytest.raises(DataError, match=r"source.states=.*/states: "):
        open_source(tmp_path / "group").listing()
    root, _ = zarr_clips(tmp_path / "clips", make_clips(4))
    damage(root / "clip_00001" / "states" / "zarr.json")
    damage(root / "clip_00002" / "zarr.json")
    assert [bad.reason.split(": ")[:2] for bad in open_source(root).listing().bad] == [
        ["clip_00001", "states"],
        ["clip_00002", "it is no zarr group, or its metadata are damaged or lost"],
    ]


def test_names_that_lead_out_of_the_group_are_refused(tmp_path: Path) -> None:
    root, _ = zarr_v3(tmp_path / "group", make_clips())
    for name in ("../group/features", "/etc", "a/../../b"):
        with pytest.raises(DataError, match="leads out of the group"):
            open_source(root, options={"features": name})


def test_a_stack_of_other_clips_than_its_keys_is_refused(tmp_path: Path) -> None:
    root = group(tmp_path / "g", 3, features=FEATURES, actions=np.ones((3, 3, 2), "f4"))
    with pytest.raises(DataError, match=r"its shape is \[3, 3, 2\], and features have 4 clips"):
        open_source(root).listing()
    root = group(tmp_path / "h", 3, features=FEATURES, actions=np.ones((4, 3, 2), "f4"), key=np.array([1, 2, 2, 3]))
    with pytest.raises(DataError, match=r"two clips of .* have this key: at row 1 and at row 2"):
        open_source(root).listing()


def test_a_row_that_has_become_another_clip_is_not_read(tmp_path: Path) -> None:
    actions = np.ones((4, 3, 2), "f4")
    root = group(tmp_path / "g", 3, features=FEATURES, actions=actions, key=np.arange(4) + 1)
    source = open_source(root)
    clip = source.listing().clips[2]
    group(root, 3, features=FEATURES, actions=actions, key=np.arange(4) + 2)
    with pytest.raises(DataError, match="row 2 is another clip now"):
        pickle.loads(pickle.dumps(source)).read(clip)
