from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.dataset.index_tars import index_tars
from data_pipeline.dataset.manifest import load_manifest
from data_pipeline.dataset.repair import repair
from data_pipeline.dataset.verify import verify
from data_pipeline.errors import DataError
from data_pipeline.shard import shard
from tests.feature_folders import write_features
from tests.small_dataset import write_dataset


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return features and the data set made of them; do not change them."""
    folder = tmp_path_factory.mktemp("made")
    features = write_features(folder / "features", states=True)
    shard(features, folder / "dataset", clips_per_shard=4, statistics="sample", dtype="int8")
    return features, folder / "dataset"


@pytest.fixture
def copy(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(made[1], tmp_path / "copy")


def _content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def _value(path: Path) -> int:
    """Return the place of a value inside a shard."""
    folder = path.parent.parent
    number = [entry.name for entry in load_manifest(folder).shards].index(path.name)
    row = int(np.flatnonzero(np.load(folder / "index" / "shard.npy") == number)[0])
    return int(np.load(folder / "index" / "features_offset.npy")[row])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (lambda path: _flip(path, _value(path)), "crc"),
    "a flipped bit in a header": (lambda path: _flip(path, 3), "full"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "quick"),
    "gone": (lambda path: path.unlink(), "quick"),
    "a link": (lambda path: (path.unlink(), path.symlink_to("train-000001.tar")), "quick"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_is_made_again_from_its_source(made: tuple[Path, Path], copy: Path, kind: str) -> None:
    damage, level = DAMAGE[kind]
    names = [entry.name for entry in load_manifest(copy).shards[:2]]
    damage(copy / "shards" / names[0])
    report = verify(copy, level=level, repair=True, source=made[0])  # pyright: ignore[reportArgumentType]
    assert report.sound
    assert report.repaired == (names[0],)
    assert _content(copy) == _content(made[1])
    assert verify(copy, level="full").sound


def test_damaged_files_beside_the_shards_are_made_again_from_the_shards(made: tuple[Path, Path], copy: Path) -> None:
    (copy / "index" / "uid.npy").unlink()
    _flip(copy / "index" / "features_checksum.npy", 200)
    _flip(copy / "stats.npz", 300)
    (copy / "mean_frame.npy").write_bytes(b"")
    (copy / "keys.txt").write_bytes(b"x\n")
    _flip(copy / "shards" / "train-000001.tar", 30)
    report = verify(copy, level="quick", repair=True, source=made[0])
    files = {"index/uid.npy", "index/features_checksum.npy", "stats.npz", "mean_frame.npy", "keys.txt"}
    assert set(report.repaired) == {"train-000001.tar", *files}
    assert report.not_repaired == {}
    assert _content(copy) == _content(made[1])


def test_a_source_that_has_changed_does_not_replace_a_shard(tmp_path: Path) -> None:
    features = write_features(tmp_path / "features", per_split=2)
    shard(features, tmp_path / "out", clips_per_shard=4)
    name = load_manifest(tmp_path / "out").shards[0].name
    path = tmp_path / "out" / "shards" / name
    _flip(path, _value(path))
    damaged = _content(tmp_path / "out")
    for file in features.rglob("*.npz"):
        with np.load(file) as stored:
            arrays = {key: stored[key] + 1 for key in stored}
        np.savez(file, **arrays)
    report = verify(tmp_path / "out", repair=True, source=features)
    assert report.exit_code == 1
    assert "its sha256 differs from features.json" in report.not_repaired[name]
    assert _content(tmp_path / "out") == damaged
    shutil.rmtree(features)
    assert report.not_repaired.keys() == verify(tmp_path / "out", repair=True).not_repaired.keys()
    assert _content(tmp_path / "out") == damaged


def test_what_has_no_recorded_source_says_so_and_stays(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path)
    name = manifest.shards[0].name
    _flip(tmp_path / "shards" / name, int(np.load(tmp_path / "index" / "features_offset.npy")[0]))
    damaged = _content(tmp_path)
    report = verify(tmp_path, repair=True)
    assert report.exit_code == 1
    assert "plan.json" in report.not_repaired[name]
    assert _content(tmp_path) == damaged


def test_tars_of_others_are_not_made_again_but_their_index_is(tmp_path: Path) -> None:
    write_dataset(tmp_path / "made", clips=3)
    folder = tmp_path / "tars"
    shutil.copytree(tmp_path / "made" / "shards", folder)
    index_tars(folder)
    before = _content(folder)
    (folder / "keys.txt").unlink()
    assert verify(folder, repair=True).repaired == ("keys.txt",)
    assert _content(folder) == before
    _flip(folder / "train-000000.tar", int(np.load(folder / "index" / "features_offset.npy")[-1]))
    report = verify(folder, repair=True)
    assert "somebody else's" in report.not_repaired["train-000000.tar"]


def test_a_shard_whose_bytes_are_as_they_were_written_is_left_alone(made: tuple[Path, Path], copy: Path) -> None:
    manifest = load_manifest(copy)
    done = repair(copy, manifest, [manifest.shards[0].name])
    assert done.names == []
    assert "as they were written" in done.failed[manifest.shards[0].name]
    assert _content(copy) == _content(made[1])


def test_what_a_killed_repair_left_is_removed_by_the_next(made: tuple[Path, Path], copy: Path) -> None:
    (copy / ".repair-abc" / "shards").mkdir(parents=True)
    (copy / ".repair-abc" / "shards" / "x.tar.tmp").write_bytes(b"half")
    name = load_manifest(copy).shards[0].name
    (copy / "shards" / name).unlink()
    assert verify(copy, level="quick", repair=True, source=made[0]).sound
    assert _content(copy) == _content(made[1])


def test_a_quarantine_list_is_left_alone_when_the_index_could_not_be_trusted(copy: Path, tmp_path: Path) -> None:
    skip = tmp_path / "skip.txt"
    skip.write_text("known\n")
    (copy / "keys.txt").write_bytes(b"x\n")
    assert not verify(copy, quarantine=skip).sound
    assert skip.read_text() == "known\n"


def test_a_quarantine_list_that_cannot_be_written_is_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="name a file in a folder that exists"):
        verify(copy, level="quick", quarantine=tmp_path / "nowhere" / "skip.txt")
    with pytest.raises(DataError, match="has no effect without --repair"):
        verify(copy, level="quick", source=tmp_path)
