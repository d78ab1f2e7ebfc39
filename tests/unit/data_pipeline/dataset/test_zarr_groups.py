"""Zarr data sets that have lost something: zarr itself takes what is not there for zeros."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.dataset.manifest import load_manifest
from data_pipeline.dataset.verify import verify
from data_pipeline.errors import DataError
from data_pipeline.shard import shard
from data_pipeline.shard.merge import merge
from tests.clip_sources import memory_source
from tests.small_dataset import rewrite_manifest

pytest.importorskip("zarr")
CHUNK = "shards/clips.zarr/features/c/1/0/0/0"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("zarr") / "out"
    shard(memory_source(8), out, clips_per_shard=3, format="zarr")
    return out


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copy")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _as_link(path: Path) -> None:
    path.rename(path.with_name("other"))
    path.symlink_to("other")


@pytest.mark.parametrize("level", ["quick", "crc", "full"])
def test_a_sound_group_is_sound_at_every_level(made: Path, level: str) -> None:
    report = verify(made, level=level)  # pyright: ignore[reportArgumentType]
    assert report.sound
    assert (report.bytes_read > 0) == (level != "quick")
    listed = {name for name, _, _ in json.loads((made / "group_files.json").read_text())}
    assert listed == {
        path.relative_to(made / "shards").as_posix() for path in (made / "shards").rglob("*") if path.is_file()
    }


LOSSES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a chunk is gone": (lambda out: (out / CHUNK).unlink(), "the file is missing"),
    "all chunks are gone": (lambda out: shutil.rmtree(out / "shards/clips.zarr/features/c"), "the file is missing"),
    "a label is gone": (lambda out: shutil.rmtree(out / "shards/clips.zarr/partition/c"), "the file is missing"),
    "the group is gone": (lambda out: shutil.rmtree(out / "shards/clips.zarr"), "the file is missing"),
    "a chunk is cut": (lambda out: (out / CHUNK).write_bytes(b"x"), "it has another size"),
    "a chunk is a link": (lambda out: _as_link(out / CHUNK), "not a regular file"),
    "a file is new": (lambda out: (out / CHUNK).with_name("9").touch(), "not written with the group"),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_what_a_group_has_lost_is_found_by_everybody(copy: Path, kind: str) -> None:
    damage, expected = LOSSES[kind]
    damage(copy)
    report = verify(copy, level="quick")
    assert report.damaged_files == ("clips.zarr",)
    assert any(expected in finding.text for finding in report.findings)
    for opened in (load_manifest, merge):
        with pytest.raises(DataError, match=expected):
            opened(copy)


def test_a_flipped_bit_is_found_where_bytes_are_read_and_not_mended(copy: Path, tmp_path: Path) -> None:
    _flip(copy / CHUNK)
    assert verify(copy, level="quick").sound
    report = verify(copy, repair=True, quarantine=tmp_path / "skip.txt")
    assert [finding.text for finding in report.findings] == [f"{CHUNK.removeprefix('shards/')}: it has another sha256"]
    assert "remove the data set and make it again" in report.not_repaired["clips.zarr"]
    assert not (tmp_path / "skip.txt").exists()
    with pytest.raises(DataError, match=r"are damaged.*remove the data set and make it again"):
        shard(memory_source(8), copy, clips_per_shard=3, format="zarr", paranoid=True)


@pytest.mark.parametrize(
    "entry", ["../../etc/passwd", "/etc/passwd", "clips.zarr/../../x", "clips.zarr", "clips.zarr//x"]
)
def test_a_list_of_files_elsewhere_is_refused(copy: Path, entry: str) -> None:
    import hashlib

    (copy / "group_files.json").write_text(json.dumps([[entry, 1, "0" * 64]]))
    files = json.loads((copy / "manifest.json").read_text())["files"]
    files["group_files.json"] = hashlib.sha256((copy / "group_files.json").read_bytes()).hexdigest()
    rewrite_manifest(copy, files=files)
    with pytest.raises(DataError, match="not a list of files of the group"):
        load_manifest(copy)
    assert [finding.shard for finding in verify(copy).findings] == ["group_files.json"]


def test_a_manifest_without_the_list_is_refused(copy: Path) -> None:
    files = json.loads((copy / "manifest.json").read_text())["files"]
    del files["group_files.json"]
    rewrite_manifest(copy, files=files)
    with pytest.raises(DataError, match=r"the manifest lists no group_files\.json"):
        load_manifest(copy)
    assert not verify(copy, level="quick").sound
