from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError
from data_pipeline.reader import fetching
from data_pipeline.reader.staging import StagedShards
from data_pipeline.reader.storage import LocalShards, OpenedDataset, StorageStats, open_dataset
from data_pipeline.schema import DataConfig, ShardEntry
from data_pipeline.shard import shard
from tests.clip_sources import memory_source
from tests.small_dataset import rewrite_manifest, write_dataset


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copied"))


def _open(path: Path | str, **settings: Any) -> OpenedDataset:
    return open_dataset(DataConfig.model_validate({"path": str(path), **settings}))


def _sha256(descriptor: int) -> str:
    with os.fdopen(descriptor, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shard(folder: Path, entry: ShardEntry) -> Path:
    return folder / "shards" / entry.name


def test_local_shards_are_read_where_they_are(written: Path) -> None:
    opened = _open(written)
    assert opened.folder == written
    assert isinstance(opened.store, LocalShards)
    for number, entry in enumerate(opened.manifest.shards):
        assert opened.store.where(number) == str(_shard(written, entry))
        assert _sha256(opened.store.open(number)) == entry.sha256
    opened.store.expect([1, 0])
    opened.store.recheck(0)
    assert opened.store.stats() == StorageStats()
    opened.store.close()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: os.truncate(path, 1024), "1024 "),
        (lambda path: path.write_bytes(path.read_bytes() + bytes(512)), " bytes"),
        (lambda path: (path.rename(path.with_suffix(".x")), path.symlink_to(path.with_suffix(".x"))), "symbolic link"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
        (lambda path: (path.unlink(), path.mkdir()), "not a regular file"),
    ],
    ids=["gone", "shorter", "longer", "link", "pipe", "folder"],
)
@pytest.mark.parametrize("staged", [False, True])
def test_a_shard_that_changes_after_the_start_is_named(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, expected: str, staged: bool
) -> None:
    monkeypatch.setattr(fetching, "PAUSES", (0, 0))
    opened = _open(copied, staging={"folder": str(tmp_path / "node")} if staged else {})
    entry = opened.manifest.shards[1]
    damage(_shard(copied, entry))
    with pytest.raises(DataError) as caught:
        opened.store.open(1)
    opened.store.close()
    text = str(caught.value)
    assert expected in text
    assert f"data.path: shard {entry.name}" in text
    assert str(_shard(copied, entry)) in text
    assert "Fix: " in text


def test_staged_shards_are_copies(written: Path, tmp_path: Path) -> None:
    opened = _open(written, staging={"folder": str(tmp_path)})
    assert isinstance(opened.store, StagedShards)
    for number, entry in enumerate(opened.manifest.shards):
        assert _sha256(opened.store.open(number)) == entry.sha256
    nbytes = sum(entry.bytes for entry in opened.manifest.shards)
    assert opened.store.stats() == StorageStats(0, 4, nbytes, 0, nbytes)
    opened.store.close()


def test_tars_indexed_in_place_are_found(tmp_path: Path) -> None:
    write_dataset(tmp_path / "tars", clips=2, shard_folder=".")
    for staging in ({}, {"folder": str(tmp_path / "node")}):
        opened = _open(tmp_path / "tars", staging=staging)
        assert _sha256(opened.store.open(0)) == opened.manifest.shards[0].sha256
        opened.store.close()


def test_a_container_for_analysis_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    shard(memory_source(4), tmp_path, format="zarr")
    with pytest.raises(DataError, match="container is zarr, which is for analysis"):
        _open(tmp_path)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "a/b.tar", "x\ny.tar"])
def test_a_shard_name_that_leads_elsewhere_is_refused(copied: Path, tmp_path: Path, name: str) -> None:
    manifest = write_dataset(tmp_path / "other")
    listed = [vars(entry) for entry in manifest.shards]
    rewrite_manifest(copied, shards=[{**listed[0], "name": name}, *listed[1:]])
    with pytest.raises(DataError, match="not a shard's file name"):
        _open(copied, staging={"folder": str(tmp_path / "node")})


@pytest.mark.parametrize("sha256", ["../../x", "/etc/passwd", "A" * 64, "0" * 63, "0" * 63 + "\n"])
def test_a_sha256_that_is_none_names_no_copy(copied: Path, tmp_path: Path, sha256: str) -> None:
    manifest = write_dataset(tmp_path / "other")
    listed = [vars(entry) for entry in manifest.shards]
    rewrite_manifest(copied, shards=[{**listed[0], "sha256": sha256}, *listed[1:]])
    with pytest.raises(DataError, match="sha256"):
        _open(copied, staging={"folder": str(tmp_path / "node")})
    assert not (tmp_path / "node").exists()


class TestRoom:
    def sizes(self, written: Path) -> list[int]:
        return [entry.bytes for entry in _open(written).manifest.shards]

    def staged(self, written: Path, tmp_path: Path, max_bytes: int, **settings: Any) -> None:
        _open(written, staging={"folder": str(tmp_path), "max_bytes": max_bytes}, **settings).store.close()

    def test_the_full_order_needs_all_shards_of_the_view(self, written: Path, tmp_path: Path) -> None:
        sizes = self.sizes(written)
        self.staged(written, tmp_path, sum(sizes))
        with pytest.raises(DataError, match=r"data\.staging\.max_bytes=.* Fix: set data\.order=windowed"):
            self.staged(written, tmp_path, sum(sizes) - 1)

    def test_shards_without_a_clip_of_the_view_are_not_counted(self, written: Path, tmp_path: Path) -> None:
        # Shards are filled partition by partition: the first one has base alone, the second one both.
        sizes = self.sizes(written)
        self.staged(written, tmp_path, sizes[0] + sizes[1] + sizes[3], view=["base"])
        with pytest.raises(DataError, match=r"max_bytes"):
            self.staged(written, tmp_path, sizes[0] + sizes[1] + sizes[3] - 1, view=["base"])

    def test_the_windowed_order_needs_a_group_of_shards(self, written: Path, tmp_path: Path) -> None:
        largest = sorted(self.sizes(written))[-2:]
        self.staged(written, tmp_path, sum(largest), order="windowed", order_shards=2)
        with pytest.raises(DataError, match=r"the 2 shards that data\.order_shards=2 reads at a time"):
            self.staged(written, tmp_path, sum(largest) - 1, order="windowed", order_shards=2)

    def test_one_shard_must_fit(self, written: Path, tmp_path: Path) -> None:
        largest = max(self.sizes(written))
        self.staged(written, tmp_path, largest, order="windowed", order_shards=1)
        with pytest.raises(DataError, match=f"alone has {largest} bytes.*allow at least {largest}"):
            self.staged(written, tmp_path, largest - 1, order="windowed", order_shards=1)

    def test_no_limit_asks_for_nothing(self, written: Path, tmp_path: Path) -> None:
        _open(written, staging={"folder": str(tmp_path)}).store.close()
