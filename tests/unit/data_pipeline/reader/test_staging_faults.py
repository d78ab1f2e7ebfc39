from __future__ import annotations

import errno
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError
from data_pipeline.reader import node_folder
from data_pipeline.reader.fetching import FetchFailed, LocalFiles
from tests.staged_files import (
    SIZE,
    Files,
    Watched,
    copies,
    copy_of,
    eventually,
    fork,
    on_node,
    opened,
    read,
    start,
)

pytestmark = pytest.mark.usefixtures("no_pauses")


def test_what_a_process_killed_within_a_copy_left_is_cleared(files: Files, tmp_path: Path) -> None:
    within, never = fork.Event(), fork.Event()
    source = Watched(files.folder, tmp_path / "log", lambda: (within.set(), never.wait()))

    def copy() -> None:
        with opened(files, tmp_path, room=1, source=source) as store:
            store.expect([0, 1])
            store.open(0)

    (process,) = start(copy)
    assert within.wait(10)
    parts = list(copies(tmp_path).glob("*.part"))
    assert [part.stat().st_size for part in parts] == [SIZE]
    with opened(files, tmp_path, room=1) as store:
        # Its maker is alive: neither is the part taken for abandoned, nor its space for free.
        assert list(copies(tmp_path).glob("*.part")) == parts
        assert store.stats().cached_bytes == 0
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert read(store, 0) == files.path(0).read_bytes()
        assert list(copies(tmp_path).glob("*.part")) == []
        # What the dead process needed counts no longer.
        store.expect([1])
        assert read(store, 1) == files.path(1).read_bytes()
    readers = copies(tmp_path).parent / "readers"
    assert list(readers.iterdir()) == []


def test_whenever_a_process_is_killed_every_copy_is_whole(files: Files, tmp_path: Path) -> None:
    def use() -> None:
        with opened(files, tmp_path, room=2, ahead=1) as store:
            while True:
                order = random.sample(range(8), 8)
                store.expect(order)
                for shard in order:
                    os.close(store.open(shard))

    for delay in random.Random(7).sample(range(40), 8):
        (process,) = start(use)
        time.sleep(delay / 1000)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        for shard in on_node(files, tmp_path):
            assert copy_of(files, tmp_path, shard).read_bytes() == files.path(shard).read_bytes()
        with opened(files, tmp_path, room=2) as store:
            assert read(store, 0) == files.path(0).read_bytes()
            assert store.stats().cached_bytes <= 2 * SIZE
    assert list(copies(tmp_path).glob("*.part")) == []


def test_who_waits_for_a_copy_makes_it_when_its_maker_dies(files: Files, tmp_path: Path) -> None:
    within, never = fork.Event(), fork.Event()
    blocked = Watched(files.folder, tmp_path / "log", lambda: (within.set(), never.wait()))

    def copy() -> None:
        with opened(files, tmp_path, source=blocked) as store:
            store.open(0)

    (process,) = start(copy)
    assert within.wait(10)
    contents: list[bytes] = []
    with opened(files, tmp_path) as store:
        thread = threading.Thread(target=lambda: contents.append(read(store, 0)))
        thread.start()
        thread.join(0.2)
        assert contents == []
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        thread.join(10)
    assert contents == [files.path(0).read_bytes()]


def test_a_damaged_source_is_tried_three_times_and_leaves_nothing(files: Files, tmp_path: Path) -> None:
    files.damage(5)
    with opened(files, tmp_path, source=Watched(files.folder, tmp_path / "log")) as store:
        with pytest.raises(DataError) as caught:
            store.open(5)
        assert read(store, 4) == files.path(4).read_bytes()
    text = str(caught.value)
    assert "data.path: shard 5.tar" in text
    assert str(files.path(5)) in text
    assert f"the manifest says {files.manifest.shards[5].sha256} (3 tries)" in text
    assert (tmp_path / "log").read_text().split() == ["5.tar"] * 3 + ["4.tar"]
    assert on_node(files, tmp_path) == [4]
    assert list(copies(tmp_path).glob("*.part")) == []


def test_a_copy_of_another_size_than_listed_is_not_handed_out(files: Files, tmp_path: Path) -> None:
    first, second = files.manifest.shards[:2]
    shards = (first, replace(second, sha256=first.sha256, bytes=SIZE - 1))
    files.manifest = replace(files.manifest, shards=shards)
    with opened(files, tmp_path) as store:
        read(store, 0)
        with pytest.raises(DataError, match=r"shard 1\.tar"):
            store.open(1)
        assert read(store, 0) == files.path(0).read_bytes()


def test_a_source_that_fails_once_is_tried_again(files: Files, tmp_path: Path) -> None:
    class Flaky(LocalFiles):
        failures = 2

        def chunks(self, name: str, nbytes: int) -> Generator[memoryview, None, None]:
            if self.failures:
                self.failures -= 1
                raise FetchFailed("the server is busy")
            yield from super().chunks(name, nbytes)

    with opened(files, tmp_path, source=Flaky(files.folder)) as store:
        assert read(store, 1) == files.path(1).read_bytes()


def _rewrite(path: Path, content: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(content)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100] ^= 4
    _rewrite(path, bytes(content))


STAGED_DAMAGE: dict[str, Callable[[Path], object]] = {
    "bit": _flip,
    "cut": lambda path: os.truncate(path, 512),
    "longer": lambda path: _rewrite(path, path.read_bytes() + b"x"),
    "gone": lambda path: path.unlink(),
    "a link": lambda path: (path.rename(path.with_name("x.tar")), path.symlink_to(path.with_name("x.tar"))),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "no record": lambda path: (path.with_suffix(".json").unlink(), _flip(path)),
    "odd record": lambda path: (path.with_suffix(".json").write_text("[" * 3000), _flip(path)),
}


@pytest.mark.parametrize("name", STAGED_DAMAGE)
@pytest.mark.parametrize("same_process", [True, False])
def test_a_damaged_copy_is_replaced(files: Files, tmp_path: Path, name: str, same_process: bool) -> None:
    with opened(files, tmp_path) as store:
        read(store, 6)
        STAGED_DAMAGE[name](copy_of(files, tmp_path, 6))
        if same_process:
            assert read(store, 6) == files.path(6).read_bytes()
    with opened(files, tmp_path) as store:
        assert read(store, 6) == files.path(6).read_bytes()
        assert store.stats().hits == int(same_process)


def _flip_unseen(path: Path) -> None:
    found = path.stat()
    _flip(path)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def test_a_copy_is_hashed_again_when_it_is_doubted(files: Files, tmp_path: Path) -> None:
    with opened(files, tmp_path) as store, opened(files, tmp_path) as other:
        read(store, 6)
        _flip_unseen(copy_of(files, tmp_path, 6))
        # Size, time and inode are those of the record: nobody hashes without a reason.
        assert read(other, 6) == read(store, 6) != files.path(6).read_bytes()
        store.recheck(6)
        assert read(store, 6) == files.path(6).read_bytes()
        assert read(other, 6) == files.path(6).read_bytes()


def test_a_copy_is_hashed_again_after_a_restart_of_the_node(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot = tmp_path / "boot"
    monkeypatch.setattr(node_folder, "_BOOT_ID", boot)
    boot.write_text("first")
    with opened(files, tmp_path) as store:
        read(store, 6)
        # As a power cut leaves it: the size is there, the content is not.
        _flip_unseen(copy_of(files, tmp_path, 6))
    boot.write_text("second")
    with opened(files, tmp_path) as store:
        assert read(store, 6) == files.path(6).read_bytes()
    boot.unlink()
    with opened(files, tmp_path) as store:
        _flip_unseen(copy_of(files, tmp_path, 6))
        assert read(store, 6) == files.path(6).read_bytes()


def test_a_sound_copy_without_a_record_is_kept(files: Files, tmp_path: Path) -> None:
    with opened(files, tmp_path) as store:
        read(store, 6)
    copy_of(files, tmp_path, 6).with_suffix(".json").unlink()
    with opened(files, tmp_path) as store:
        assert read(store, 6) == files.path(6).read_bytes()
        assert store.stats().fetched_bytes == 0
    assert json.loads(copy_of(files, tmp_path, 6).with_suffix(".json").read_text())["nbytes"] == SIZE


@contextmanager
def full_after(monkeypatch: pytest.MonkeyPatch, function: str, node: Path, shards: int) -> Iterator[None]:
    """A disk that has space for some shards."""
    real = getattr(os, function)

    def limited(descriptor: int, *arguments: Any) -> Any:
        if len(list(copies(node).glob("*.tar"))) >= shards:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, limited)
        yield


@pytest.mark.parametrize("function", ["posix_fallocate", "write"])
def test_a_full_disk_makes_room_by_evicting(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    with opened(files, tmp_path) as store, full_after(monkeypatch, function, tmp_path, 2):
        store.expect([0, 1, 2, 3])
        read(store, 0)
        read(store, 1)
        store.expect([2, 0, 3, 1])
        assert read(store, 2) == files.path(2).read_bytes()
        assert on_node(files, tmp_path) == [0, 2]


@pytest.mark.parametrize("function", ["posix_fallocate", "write"])
def test_a_disk_that_stays_full_is_named(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    full = full_after(monkeypatch, function, tmp_path, 0)
    with opened(files, tmp_path) as store, full, pytest.raises(DataError) as caught:
        store.open(0)
    text = str(caught.value)
    assert text.startswith("data.staging.folder=")
    assert "shard 0.tar, 5000 bytes" in text
    assert "Fix: free space there" in text
    assert list(copies(tmp_path).iterdir()) == []


def test_a_full_disk_does_not_cost_a_copy_that_is_needed_sooner(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(files, tmp_path, ahead=1) as store, full_after(monkeypatch, "posix_fallocate", tmp_path, 2):
        store.expect([4, 5, 6, 7])
        eventually(lambda: on_node(files, tmp_path) == [4, 5])
        store.expect([4, 5, 7, 6])
        store.expect([5, 4, 6, 7])
        assert read(store, 4) == files.path(4).read_bytes()
        assert on_node(files, tmp_path) == [4, 5]
