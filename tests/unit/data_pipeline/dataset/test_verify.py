from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.dataset import spans
from data_pipeline.dataset.findings import MAX_LISTED, VerifyReport
from data_pipeline.dataset.index import save_array
from data_pipeline.dataset.manifest import DIGEST_ENTRY, load_manifest, manifest_digest
from data_pipeline.dataset.shard_checks import LEVELS, Level
from data_pipeline.dataset.verify import verify
from data_pipeline.errors import DataError
from tests.small_dataset import rewrite_manifest, write_dataset

LEVEL_NAMES: tuple[Any, ...] = LEVELS


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set with every field; do not change it."""
    folder = tmp_path_factory.mktemp("original")
    write_dataset(folder, lengths=(3, 4, 5), tokens=4, channels=8, state_dim=3, extrinsics_dim=2, dtype="int8")
    return folder


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "copy")


def _kinds(report: VerifyReport) -> set[str]:
    return {finding.kind for finding in report.findings}


def _edit(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def _flip(path: Path, offset: int) -> None:
    _edit(path, offset, bytes([path.read_bytes()[offset] ^ 1]))


def _shard(folder: Path, number: int = 0) -> Path:
    return folder / "shards" / load_manifest(folder).shards[number].name


def _reseal(folder: Path) -> None:
    """Make the manifest agree with files that were changed, as somebody who forges a data set would."""
    document = json.loads((folder / "manifest.json").read_text())
    for name in document["files"]:
        document["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    for entry in document["shards"]:
        content = (folder / "shards" / entry["name"]).read_bytes()
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    document.pop(DIGEST_ENTRY, None)
    document[DIGEST_ENTRY] = manifest_digest(document)
    (folder / "manifest.json").write_text(json.dumps(document))


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("level", LEVEL_NAMES)
def test_what_was_written_is_sound(tmp_path: Path, dtype: Any, level: Level) -> None:
    write_dataset(tmp_path, dtype=dtype, lengths=(2, 5), state_dim=2, extrinsics_dim=3)
    done: list[tuple[int, int]] = []
    report = verify(tmp_path, level=level, workers=2, progress=lambda *numbers: done.append(numbers))
    assert report.sound
    assert report.exit_code == 0
    assert (report.findings, report.damaged_clips, report.not_checked) == ((), (), "")
    assert sorted(done)[-1] == (16, 16)
    assert len(done) <= 16


@pytest.mark.parametrize("alignment", ["first", "pair-mean", "difference", "row1-to-row0"])
def test_rows_of_actions_are_judged_by_the_alignment(tmp_path: Path, alignment: Any) -> None:
    write_dataset(tmp_path, action_alignment=alignment)
    assert verify(tmp_path, level="quick").sound
    rewrite_manifest(tmp_path, action_alignment="as-is")
    report = verify(tmp_path, level="quick")
    if alignment in ("first",):
        assert report.sound
    else:
        assert {finding.field for finding in report.findings} == {"rows"}


def test_one_bit_in_any_field_of_any_clip_is_found_and_its_place_is_named(original: Path, copy: Path) -> None:
    manifest, draw = load_manifest(original), np.random.default_rng(1)
    keys = (original / "keys.txt").read_text().split()
    shards = np.load(original / "index" / "shard.npy")
    for name in manifest.dtypes:
        starts, sizes = (np.load(original / "index" / f"{name}_{part}.npy") for part in ("offset", "nbytes"))
        for row in draw.choice(len(keys), 4, replace=False).tolist():
            path = _shard(copy, shards[row])
            before = path.read_bytes()
            _flip(path, int(starts[row]) + int(draw.integers(sizes[row])))
            report = verify(copy, level="crc")
            (finding,) = report.findings
            assert (finding.kind, finding.shard, finding.clip, finding.field) == (
                "checksum",
                path.name,
                keys[row],
                name,
            )
            assert finding.expected != finding.actual
            assert report.damaged_clips == (keys[row],)
            assert report.damaged_files == (path.name,)
            assert report.exit_code == 1
            assert verify(copy, level="quick").sound
            path.write_bytes(before)
    assert verify(copy, level="full").sound


def test_the_frame_that_is_damaged_is_named(copy: Path) -> None:
    start = int(np.load(copy / "index" / "features_offset.npy")[0])
    _flip(_shard(copy), start + 2 * 4 * 8 + 5)
    (finding,) = verify(copy, level="crc").findings
    assert finding.text.endswith("of frame 2")
    assert finding.offset == start + 2 * 4 * 8


def test_bytes_between_the_fields_are_full_s_to_find(copy: Path) -> None:
    _flip(_shard(copy), 100)
    assert verify(copy, level="crc").sound
    report = verify(copy, level="full")
    assert _kinds(report) == {"shard", "tar"}
    assert report.damaged_clips == ()


DAMAGE: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "missing": (lambda path: path.unlink(), {"the file is missing"}),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + bytes(512)), {"it has another size"}),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), {"it is not a regular file"}),
    "a link": (
        lambda path: (path.rename(path.with_name("x")), path.symlink_to("x")),
        {"it is a link, which is not followed; put the file itself there"},
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("level", LEVEL_NAMES)
def test_a_shard_that_is_not_there_as_it_was_is_named_at_every_level(copy: Path, kind: str, level: Level) -> None:
    damage, expected = DAMAGE[kind]
    path = _shard(copy)
    damage(path)
    report = verify(copy, level=level)
    assert {finding.text for finding in report.findings} - {"it has another sha256"} == expected
    assert report.damaged_files == (path.name,)
    assert len(report.damaged_clips) == (0 if kind == "longer" else 4)


@pytest.mark.parametrize("level", LEVEL_NAMES)
def test_of_a_truncated_shard_the_clips_before_the_end_stay_good(copy: Path, level: Level) -> None:
    offsets = np.load(copy / "index" / "features_offset.npy")
    keys = (copy / "keys.txt").read_text().split()
    os.truncate(_shard(copy), int(offsets[2]))
    report = verify(copy, level=level)
    assert report.damaged_clips == tuple(sorted(keys[2:4]))


def test_values_that_are_not_finite_are_full_s_to_find(tmp_path: Path) -> None:
    write_dataset(tmp_path, dtype="float16", channels=8)
    offset, shard = int(np.load(tmp_path / "index" / "features_offset.npy")[0]), _shard(tmp_path)
    _edit(shard, offset + 6, np.array(np.inf, np.float16).tobytes())
    frames = np.load(tmp_path / "index" / "frame_checksum.npy")
    report = verify(tmp_path, level="crc")
    assert report.findings[0].expected == f"{frames[0]:08x}"
    _forge_checksums(tmp_path)
    assert verify(tmp_path, level="crc").sound
    (finding,) = verify(tmp_path, level="full").findings
    assert (finding.kind, finding.field, finding.text) == ("values", "features", "not all finite of frame 0")


def _forge_checksums(folder: Path) -> None:
    """Make index and manifest agree with the bytes of the first clip's features."""
    from data_pipeline.checksum import checksum_function
    from data_pipeline.dataset.fingerprint import index_fingerprint
    from data_pipeline.dataset.index import Index

    manifest = load_manifest(folder)
    checksum = checksum_function(manifest.checksum)
    offset, nbytes = (int(np.load(folder / "index" / f"features_{part}.npy")[0]) for part in ("offset", "nbytes"))
    length = int(np.load(folder / "index" / "length.npy")[0])
    content = np.frombuffer(_shard(folder).read_bytes(), np.uint8)[offset : offset + nbytes]
    for column, rows, values in (
        ("frame_checksum", slice(0, length), [checksum(frame) for frame in content.reshape(length, -1)]),
        ("features_checksum", 0, checksum(content)),
    ):
        array = np.load(folder / "index" / f"{column}.npy")
        array[rows] = values
        save_array(folder / "index" / f"{column}.npy", array)
    _reseal(folder)
    rewrite_manifest(folder, fingerprint=index_fingerprint(Index(folder, manifest), load_manifest(folder)))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_value_of_the_index_changes_without_being_found(original: Path, copy: Path, data: st.DataObject) -> None:
    names = sorted(path.stem for path in (original / "index").glob("*.npy"))
    name = data.draw(st.sampled_from(names))
    array = np.load(original / "index" / f"{name}.npy")
    row, limits = data.draw(st.integers(0, len(array) - 1)), np.iinfo(array.dtype)
    near = st.integers(-3, 3).map(lambda step: min(max(int(array[row]) + step, limits.min), limits.max))
    value = data.draw(st.one_of(near, st.integers(limits.min, limits.max), st.just(0), st.just(limits.max)))
    changed = array.copy()
    changed[row] = value
    save_array(copy / "index" / f"{name}.npy", changed)
    _reseal(copy)
    try:
        report = verify(copy, level="crc")
        assert report.sound == np.array_equal(array, changed)
    finally:
        save_array(copy / "index" / f"{name}.npy", array)
        _reseal(copy)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_key_changes_without_being_found(original: Path, copy: Path, data: st.DataObject) -> None:
    content = bytearray((original / "keys.txt").read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.one_of(st.sampled_from(b"\n.a/-"), st.integers(0, 255)))
    (copy / "keys.txt").write_bytes(content)
    _reseal(copy)
    assert verify(copy, level="quick").sound == (content == (original / "keys.txt").read_bytes())


def test_two_clips_of_one_key_are_found(copy: Path) -> None:
    keys = (copy / "keys.txt").read_text().split()
    keys[1] = keys[0]
    (copy / "keys.txt").write_text("".join(f"{key}\n" for key in keys))
    uids = np.load(copy / "index" / "uid.npy")
    uids[1] = uids[0]
    save_array(copy / "index" / "uid.npy", uids)
    _reseal(copy)
    assert "another clip has this key" in {finding.text for finding in verify(copy, level="quick").findings}


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("encode_mode", "clip"),
        ("encoder", "another"),
        ("preprocessing", "resized"),
        ("weights_sha256", "f" * 64),
    ],
)
def test_a_provenance_that_was_changed_on_purpose_no_longer_fits_the_fingerprint(
    copy: Path, entry: str, value: str
) -> None:
    provenance = json.loads((copy / "manifest.json").read_text())["provenance"]
    rewrite_manifest(copy, provenance=provenance | {entry: value})
    assert verify(copy, level="quick").sound
    assert any(finding.text.startswith("fingerprint") for finding in verify(copy, level="crc").findings)


FILE_DAMAGE: dict[str, Callable[[Path], object]] = {
    "index/uid.npy": lambda path: _flip(path, 200),
    "index/frame_checksum.npy": lambda path: path.unlink(),
    "keys.txt": lambda path: path.write_bytes(b"x\n"),
    "mean_frame.npy": lambda path: os.truncate(path, 130),
    "stats.npz": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("name", FILE_DAMAGE)
@pytest.mark.parametrize("level", LEVEL_NAMES)
def test_damaged_files_beside_the_shards_are_named(copy: Path, name: str, level: Level) -> None:
    FILE_DAMAGE[name](copy / name)
    report = verify(copy, level=level)
    assert _kinds(report) == {"file"}
    assert report.damaged_files == (name,)
    assert "not checked" in report.not_checked


UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "does not exist"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"),
    "no JSON": (lambda folder: (folder / "manifest.json").write_text("{"), "not readable as JSON"),
    "another format": (lambda folder: rewrite_manifest(folder, format=1), "reads format 2"),
    "no such shard name": (lambda folder: rewrite_manifest(folder, shard_folder=".."), "must be shards or ."),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_is_no_data_set_ends_in_an_error(copy: Path, kind: str) -> None:
    damage, expected = UNUSABLE[kind]
    damage(copy)
    with pytest.raises(DataError, match=expected) as caught:
        verify(copy, level="crc")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("setting", [{"level": "deep"}, {"workers": 0}])
def test_settings_that_make_no_sense_are_refused(original: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=next(iter(setting))):
        verify(original, **setting)


def test_the_tar_of_a_shard_is_compared_without_the_index(copy: Path) -> None:
    path = _shard(copy)
    content = path.read_bytes()
    header = content.index(b"(3, 4, 8)")
    _edit(path, header, b"(4, 3, 8)")
    meta = content.index(b'"split":"train"')
    _edit(path, meta, b'"split":"trial"')
    _reseal(copy)
    report = verify(copy, level="full")
    found = {(finding.kind, finding.field, finding.expected, finding.actual) for finding in report.findings}
    assert found == {("tar", "features", "[3, 4, 8]", "[4, 3, 8]"), ("meta", "meta", "train", "trial")}
    assert len(report.damaged_clips) <= 2
    assert verify(copy, level="crc").sound


def test_a_disk_that_does_not_give_some_bytes_costs_only_their_clips(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offset, real = int(np.load(copy / "index" / "features_offset.npy")[1]), os.preadv
    inode = _shard(copy).stat().st_ino

    def preadv(descriptor: int, buffers: list[memoryview], at: int) -> int:
        if os.fstat(descriptor).st_ino == inode and at <= offset < at + len(buffers[0]):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, at)

    monkeypatch.setattr(spans.os, "preadv", preadv)
    key = (copy / "keys.txt").read_text().split()[1]
    for level in ("crc", "full"):
        report = verify(copy, level=level)
        assert _kinds(report) == {"unreadable"}
        assert report.damaged_clips == (key,)


def test_the_skip_list_names_the_damaged_clips(original: Path, copy: Path, tmp_path: Path) -> None:
    skip = tmp_path / "skip.txt"
    verify(original, quarantine=skip)
    assert skip.read_text() == ""
    keys, offsets = (copy / "keys.txt").read_text().split(), np.load(copy / "index" / "actions_offset.npy")
    _flip(_shard(copy), int(offsets[0]))
    _flip(_shard(copy), int(offsets[3]))
    verify(copy, quarantine=skip)
    assert skip.read_text().split() == sorted([keys[0], keys[3]])


def test_findings_beyond_the_first_thousand_are_counted_and_their_clips_remembered(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"heldout": 0, "partitions": ("base",), "frames": 2, "tokens": 1, "channels": 1}
    manifest = write_dataset(tmp_path, clips=MAX_LISTED + 50, clips_per_shard=2000, **shape)
    shard = tmp_path / "shards" / manifest.shards[0].name
    content = bytearray(shard.read_bytes())
    for offset in np.load(tmp_path / "index" / "actions_offset.npy"):
        content[offset] ^= 1
    shard.write_bytes(content)
    report = verify(tmp_path)
    assert len(report.findings) == MAX_LISTED
    assert report.num_findings == len(report.damaged_clips) == MAX_LISTED + 50
    assert report.as_dict()["state"] == "damaged"
