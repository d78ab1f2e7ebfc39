from __future__ import annotations

import os
import random
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.reader.node_folder import NodeFolder
from tests.staged_files import (
    NUM_SHARDS,
    SIZE,
    Files,
    Watched,
    copies,
    copy_of,
    eventually,
    finish,
    fork,
    make_files,
    on_node,
    opened,
    read,
    start,
)

pytestmark = pytest.mark.usefixtures("no_pauses")


def test_a_second_use_and_a_second_run_find_the_copy(files: Files, tmp_path: Path) -> None:
    source = Watched(files.folder, tmp_path / "log")
    for expected in ((1, 1), (2, 0)):
        with opened(files, tmp_path, source=source) as store:
            assert read(store, 3) == read(store, 3) == files.path(3).read_bytes()
            assert (store.stats().hits, store.stats().misses) == expected
    assert (tmp_path / "log").read_text() == "3.tar\n"
    assert on_node(files, tmp_path) == [3]


def test_two_processes_that_need_a_shard_copy_it_once(files: Files, tmp_path: Path) -> None:
    barrier = fork.Barrier(2)
    source = Watched(files.folder, tmp_path / "log", lambda: time.sleep(0.1))

    def need() -> None:
        with opened(files, tmp_path, source=source) as store:
            barrier.wait(10)
            for shard in (0, 1):
                assert read(store, shard) == files.path(shard).read_bytes()

    finish(start(need, need))
    assert sorted((tmp_path / "log").read_text().split()) == ["0.tar", "1.tar"]


def test_threads_that_need_a_shard_copy_it_once(files: Files, tmp_path: Path) -> None:
    source = Watched(files.folder, tmp_path / "log", lambda: time.sleep(0.05))
    contents: list[bytes] = []
    with opened(files, tmp_path, source=source) as store:
        threads = [threading.Thread(target=lambda: contents.append(read(store, 2))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert store.stats().hits + store.stats().misses == 4
        assert store.stats().fetched_bytes == SIZE
    assert contents == [files.path(2).read_bytes()] * 4


def test_the_copy_needed_last_makes_room(files: Files, tmp_path: Path) -> None:
    with opened(files, tmp_path, room=3) as store:
        store.expect([0, 1, 2, 3, 4])
        for shard in (0, 1, 2):
            read(store, shard)
        store.expect([3, 1, 4, 0, 2])
        read(store, 3)
        assert on_node(files, tmp_path) == [0, 1, 3]
        store.expect([4, 3, 0])
        read(store, 4)
        assert on_node(files, tmp_path) == [0, 3, 4]
        assert store.stats().evictions == 2
        assert store.stats().cached_bytes == 3 * SIZE


def test_copies_nobody_expects_go_first_and_the_oldest_of_them(files: Files, tmp_path: Path) -> None:
    with opened(files, tmp_path, room=3) as store:
        for shard in (0, 1, 2, 0):
            read(store, shard)
        store.expect([3, 4, 2])
        read(store, 3)
        assert on_node(files, tmp_path) == [0, 2, 3]
        read(store, 4)
        assert on_node(files, tmp_path) == [2, 3, 4]


def test_what_another_process_needs_soon_stays(files: Files, tmp_path: Path) -> None:
    with opened(files, tmp_path, room=2) as one, opened(files, tmp_path, room=2) as other:
        one.expect([0, 5, 6, 7, 1])
        other.expect([1, 5, 6, 7])
        read(one, 0)
        read(one, 1)
        one.expect([5, 0, 6, 7, 1])
        # 1 is the last one here, and the next one there.
        read(one, 5)
        assert on_node(files, tmp_path) == [1, 5]


def test_an_evicted_copy_stays_readable_for_who_has_it_open(files: Files, tmp_path: Path) -> None:
    with opened(files, tmp_path, room=1) as store:
        descriptor = store.open(0)
        read(store, 1)
        assert on_node(files, tmp_path) == [1]
        assert os.pread(descriptor, SIZE + 1, 0) == files.path(0).read_bytes()
        os.close(descriptor)


def _belady(uses: Sequence[int], room: int) -> int:
    """Copies made by the best eviction there is."""
    held: set[int] = set()
    made = 0
    for at, shard in enumerate(uses):
        if shard in held:
            continue
        made += 1
        if len(held) == room:
            later = list(uses[at + 1 :])
            held.remove(max(held, key=lambda other: later.index(other) if other in later else len(uses)))
        held.add(shard)
    return made


@settings(max_examples=15, deadline=None)
@given(uses=st.lists(st.integers(0, NUM_SHARDS - 1), min_size=1, max_size=20), room=st.integers(1, 6))
def test_no_order_of_eviction_would_copy_less(uses: list[int], room: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        files, node = make_files(Path(name) / "source"), Path(name)
        with opened(files, node, room=room) as store:
            for at, shard in enumerate(uses):
                store.expect(list(dict.fromkeys(uses[at:])))
                assert read(store, shard) == files.path(shard).read_bytes()
                assert store.stats().cached_bytes <= room * SIZE
            assert store.stats().fetched_bytes == _belady(uses, room) * SIZE


def test_two_processes_together_keep_the_bound(files: Files, tmp_path: Path) -> None:
    def use(seed: int) -> None:
        with opened(files, tmp_path, room=3, ahead=1) as store:
            for turn in range(3):
                order = random.Random(seed + turn).sample(range(8), 8)
                for at, shard in enumerate(order):
                    store.expect(order[at:])
                    assert read(store, shard) == files.path(shard).read_bytes()
                    with store._node.accounts():
                        assert sum(path.stat().st_size for path in copies(tmp_path).glob("*.[tp]ar*")) <= 3 * SIZE

    finish(start(lambda: use(10), lambda: use(20)))
    assert len(on_node(files, tmp_path)) <= 3


def test_expected_shards_are_copied_ahead_as_far_as_there_is_room(files: Files, tmp_path: Path) -> None:
    with opened(files, tmp_path, room=3, ahead=2) as store:
        store.expect([5, 2, 7, 0, 1])
        eventually(lambda: on_node(files, tmp_path) == [2, 5, 7])
        assert read(store, 5) == files.path(5).read_bytes()
        store.expect([2, 7, 0, 1, 5])
        eventually(lambda: on_node(files, tmp_path) == [0, 2, 7])
        for shard in (2, 7, 0):
            read(store, shard)
        assert store.stats().misses == 0
        assert store.stats().evictions == 1
        assert store.stats().fetched_bytes == 4 * SIZE


def test_two_shards_are_copied_ahead_at_once(files: Files, tmp_path: Path) -> None:
    go = threading.Event()
    source = Watched(files.folder, tmp_path / "log", lambda: go.wait(10))
    with opened(files, tmp_path, ahead=2, source=source) as store:
        store.expect([3, 1, 2])
        eventually(lambda: len(list(copies(tmp_path).glob("*.part"))) == 2)
        go.set()
        eventually(lambda: on_node(files, tmp_path) == [1, 2, 3])
    assert sorted((tmp_path / "log").read_text().split()[:2]) == ["1.tar", "3.tar"]


def test_a_failure_ahead_is_told_when_the_shard_is_opened(files: Files, tmp_path: Path) -> None:
    files.damage(1)
    with opened(files, tmp_path, ahead=1, source=Watched(files.folder, tmp_path / "log")) as store:
        store.expect([0, 1, 2])
        eventually(lambda: (tmp_path / "log").exists() and "1.tar" in (tmp_path / "log").read_text())
        with pytest.raises(DataError, match=r"shard 1\.tar"):
            store.open(1)
        store.expect([2])
        eventually(lambda: on_node(files, tmp_path) == [0, 2])


def test_who_waits_is_sent_away_when_the_store_closes(files: Files, tmp_path: Path) -> None:
    failures: list[BaseException] = []
    entry = files.manifest.shards[0]
    holder = NodeFolder(tmp_path, None)
    with opened(files, tmp_path) as store, holder.exclusive(entry.sha256, threading.Event()):

        def wait() -> None:
            try:
                store.open(0)
            except RuntimeError as error:
                failures.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        eventually(lambda: store.stats().misses == 1)
        store.close()
        thread.join(10)
        with pytest.raises(RuntimeError, match="closed"):
            store.open(1)
    assert len(failures) == 1


def _link(folder: Path) -> None:
    (folder / "elsewhere").mkdir(parents=True)
    (folder / f"hopescale-{os.getuid()}").symlink_to(folder / "elsewhere")


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (lambda folder: folder.write_text(""), "cannot be used"),
        (lambda folder: (folder / f"hopescale-{os.getuid()}").mkdir(mode=0o755, parents=True), "only you can read"),
        (_link, "only you can read"),
    ],
    ids=["a file", "open to others", "a link"],
)
def test_a_folder_that_others_may_change_is_refused(tmp_path: Path, prepare: Any, expected: str) -> None:
    prepare(tmp_path / "node")
    with pytest.raises(DataError, match=rf"data\.staging\.folder=.*{expected}"):
        NodeFolder(tmp_path / "node", None)


def test_nobody_else_can_read_the_copies(files: Files, tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        with opened(files, tmp_path) as store:
            read(store, 0)
    finally:
        os.umask(umask)
    own = copies(tmp_path).parent
    assert [path for path in (own, *own.rglob("*")) if path.stat().st_mode & 0o077 and path.is_dir()] == []
    assert copy_of(files, tmp_path, 0).stat().st_mode & 0o777 == 0o400
