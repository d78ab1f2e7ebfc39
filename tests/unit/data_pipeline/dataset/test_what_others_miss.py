"""Ten ways in which readers of tars lose or change data without a word: here each is noticed, or cannot happen."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.checksum import best_checksum
from data_pipeline.dataset.index_tars import index_tars
from data_pipeline.dataset.verify import verify
from data_pipeline.errors import DataError
from data_pipeline.reader.batches import GlobalBatches
from data_pipeline.reader.clips import ClipReader
from data_pipeline.schema import DataConfig, Manifest
from data_pipeline.shard.tar import ShardWriter
from tests.small_dataset import write_dataset

BLOCK = 512


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """Return a data set of two training shards; do not change it."""
    folder = tmp_path_factory.mktemp("original")
    return folder, write_dataset(folder, clips=4, heldout=0)


@pytest.fixture
def copy(original: tuple[Path, Manifest], tmp_path: Path) -> Path:
    return shutil.copytree(original[0], tmp_path / "copy")


def _keys(folder: Path, *, seed: int = 0, rank: int = 0, world: int = 1, steps: int = 2, batch: int = 8) -> list[str]:
    """Return the keys that one rank reads; the data set has 8 training clips, so a step of 8 is an epoch."""
    reader = ClipReader(DataConfig(path=str(folder)), split="train", seed=seed)
    batches = GlobalBatches(reader, global_batch=batch, rank=rank, world_size=world, micro_batch=batch)
    try:
        return [
            key
            for _ in range(steps)
            for micro in next(batches).micro
            for key, weight in zip(micro.keys, micro.weights, strict=True)
            if weight
        ]
    finally:
        batches.close()


def _is_refused(folder: Path) -> None:
    """Check that nobody takes the data set for whole: not the reader, nor verify, nor a new index of its tars."""
    assert not verify(folder, level="full").sound
    with pytest.raises(DataError):
        _keys(folder)
    with pytest.raises(DataError):
        index_tars(folder / "shards")


def _shard(folder: Path) -> Path:
    return folder / "shards" / "train-000000.tar"


def test_1_a_tar_cut_between_two_members_is_not_a_shorter_one(copy: Path) -> None:
    with tarfile.open(_shard(copy)) as tar:
        starts = [member.offset for member in tar.getmembers()]
    whole = _shard(copy).read_bytes()
    for start in starts[1:]:
        _shard(copy).write_bytes(whole[:start])
        _is_refused(copy)


def test_2_a_damaged_header_or_a_hole_of_zeros_hides_no_member(copy: Path) -> None:
    whole = _shard(copy).read_bytes()
    with tarfile.open(_shard(copy)) as tar:
        starts = [member.offset for member in tar.getmembers()]
    damages: list[tuple[int, bytes]] = [
        (starts[5] + 20, b"\xff"),
        (starts[5], bytes(8192)),
        (starts[5], bytes(2 * BLOCK)),
    ]
    for at, content in damages:
        _shard(copy).write_bytes(whole[:at] + content + whole[at + len(content) :])
        assert not verify(copy, level="full").sound
        with pytest.raises(DataError, match=r"damaged|empty block|data after the end"):
            index_tars(copy / "shards")


def test_3_a_tar_cut_inside_a_payload_gives_no_partial_sample(copy: Path) -> None:
    offset = int(np.load(copy / "index" / "features_offset.npy")[1])
    os.truncate(_shard(copy), offset + 100)
    _is_refused(copy)


def test_4_flipped_bits_of_a_payload_are_not_delivered(copy: Path) -> None:
    offset = int(np.load(copy / "index" / "features_offset.npy")[1])
    content = bytearray(_shard(copy).read_bytes())
    content[offset + 9] ^= 4
    _shard(copy).write_bytes(content)
    assert verify(copy, level="crc").damaged_clips == ((copy / "keys.txt").read_text().split()[1],)
    with pytest.raises(DataError, match="crc"):
        _keys(copy)


def test_5_a_key_with_a_dot_merges_no_clips(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for key in ("ep0.5_clip1", "ep0.5_clip2"):
            for name, shape in (("actions", (1, 2)), ("features", (2, 3, 4))):
                content = io.BytesIO()
                np.save(content, np.zeros(shape, np.float32))
                info = tarfile.TarInfo(f"{key}.{name}.npy")
                info.size = content.tell()
                content.seek(0)
                tar.addfile(info, content)
    with pytest.raises(DataError, match="keys with dots are merged"):
        index_tars(tmp_path)


def test_6_every_epoch_has_an_order_of_its_own(original: tuple[Path, Manifest]) -> None:
    keys = _keys(original[0], steps=4)
    epochs = [keys[start : start + 8] for start in range(0, 32, 8)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({frozenset(epoch) for epoch in epochs}) == 1


def test_7_a_rank_does_not_see_the_same_part_for_ever(original: tuple[Path, Manifest]) -> None:
    for rank in range(2):
        assert len(set(_keys(original[0], rank=rank, world=2, steps=6))) == 8


def test_8_no_variable_of_the_environment_changes_the_order(
    original: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _keys(original[0])
    for name in ("WDS_SEED", "WDS_EPOCH", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "3")
    assert _keys(original[0]) == before
    assert _keys(original[0], seed=1) != before


def test_9_more_ranks_and_threads_than_shards_leave_nobody_without_work(original: tuple[Path, Manifest]) -> None:
    folder, manifest = original
    assert len(manifest.shards) == 2
    shares = [_keys(folder, rank=rank, world=8, steps=1) for rank in range(8)]
    assert [len(share) for share in shares] == [1] * 8
    assert len({key for share in shares for key in share}) == 8
    assert verify(folder, workers=16).sound


def test_10_a_writer_that_dies_leaves_nothing_under_a_shard_s_name(tmp_path: Path) -> None:
    path = tmp_path / "train-000000.tar"
    writer = ShardWriter(path, best_checksum())
    arrays = {"actions": np.zeros((1, 2), np.float32), "features": np.zeros((2, 3, 4), np.float32)}
    writer.add("clip_0", arrays, b"{}")
    assert not path.exists()
    writer.discard()
    assert list(tmp_path.iterdir()) == []


FORGERIES: dict[str, Callable[[Path], Any]] = {
    "another shard under its name": lambda folder: shutil.copy(folder / "shards" / "train-000001.tar", _shard(folder)),
    "an index of another data set": lambda folder: shutil.copy(
        folder / "index" / "actions_offset.npy", folder / "index" / "features_offset.npy"
    ),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_parts_of_another_data_set_are_noticed(copy: Path, kind: str) -> None:
    FORGERIES[kind](copy)
    assert not verify(copy, level="crc").sound
