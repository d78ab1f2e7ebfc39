from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import stat
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from data_pipeline.checksum import best_checksum
from data_pipeline.dataset.findings import Findings
from data_pipeline.dataset.index import Index
from data_pipeline.dataset.index_tars import index_tars
from data_pipeline.dataset.manifest import load_manifest
from data_pipeline.dataset.places import ClipPlaces
from data_pipeline.dataset.samples import samples, split_name
from data_pipeline.dataset.shard_checks import Level, ShardCheck
from data_pipeline.dataset.spans import SpanReader
from data_pipeline.dataset.tar_clips import Unusable
from data_pipeline.dataset.tar_listing import IndexSettings, list_tars
from data_pipeline.dataset.tar_pass import IndexedTar, TarPass
from data_pipeline.dataset.verify import verify
from data_pipeline.errors import DataError
from data_pipeline.shard.walk import BadTar, open_regular
from tests.hostile import allocating_at_most, limited, require_reason
from tests.small_dataset import write_dataset

MUTANTS = 10_000
BLOCK = 512
ROOM = 3 << 20
"""What a check may allocate beside the file's own size: one read, one extended header, a clip's bookkeeping."""

Mutation = Callable[[bytearray, random.Random], None]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Return a folder in memory, where thousands of small files cost no disk."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    with TemporaryDirectory(prefix="hostile-shards-", dir=memory if usable else None) as name:
        yield Path(name)


@dataclass
class Shard:
    """A shard of a data set of its own, whose file is overwritten by each mutant."""

    path: Path
    original: bytes
    places: ClipPlaces

    def write(self, content: bytes | bytearray) -> None:
        self.path.write_bytes(content)

    def verify(self, level: Level) -> Findings:
        return ShardCheck(self.places, 0, SpanReader(), lambda clips: None).run(level).findings

    def index(self) -> IndexedTar:
        """Index the tar as `index_tars` does, but for the files it writes."""
        settings = IndexSettings(encode_mode=None)
        listed = list_tars(self.path.parent, settings)
        one = TarPass(self.path.parent, listed.layout, listed.like, len(listed.partitions), 1, best_checksum())
        ((name, clips),) = listed.listed()
        return one.run(name, 0, clips, SpanReader(), lambda clips: None)


@pytest.fixture(scope="module")
def own(place: Path) -> Shard:
    """Return a shard as this project writes them."""
    folder = place / "own"
    manifest = write_dataset(folder, clips=3, heldout=0, partitions=("base",), frames=2, tokens=2, channels=4)
    path = folder / "shards" / manifest.shards[0].name
    return Shard(path, path.read_bytes(), ClipPlaces(folder, manifest, Index(folder, manifest)))


def _foreign_tar(form: int) -> bytes:
    values = np.random.default_rng(1)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, pax_headers={"comment": "made by somebody"}) as tar:
        for number in range(3):
            for name, shape in (("actions.npy", (1, 2)), ("features.npy", (2, 2, 4)), (f"{'note' * 30}.npy", (1,))):
                content = io.BytesIO()
                np.save(content, values.normal(size=shape).astype(np.float32))
                info = tarfile.TarInfo(f"a/clip_{number}.{name}")
                info.size = content.tell()
                info.mtime = 1.5
                content.seek(0)
                tar.addfile(info, content)
    return buffer.getvalue()


def _foreign(place: Path, name: str, content: bytes) -> Shard:
    folder = place / name
    folder.mkdir()
    (folder / "x.tar").write_bytes(content)
    manifest = index_tars(folder)
    return Shard(folder / "x.tar", content, ClipPlaces(folder, manifest, Index(folder, manifest)))


@pytest.fixture(scope="module")
def shards(place: Path, own: Shard) -> list[Shard]:
    """Return our own shard, and tars with pax headers and GNU's long names, each indexed where it lies."""
    return [
        own,
        _foreign(place, "pax", _foreign_tar(tarfile.PAX_FORMAT)),
        _foreign(place, "gnu", _foreign_tar(tarfile.GNU_FORMAT)),
    ]


def _flip(content: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 1, 1, 3, 40))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


def _flip_in_header(content: bytearray, draw: random.Random) -> None:
    start = draw.choice(_headers(content))
    content[start + draw.randrange(350)] ^= 1 << draw.randrange(8)
    if draw.random() < 0.7:
        _fix_checksum(content, start)


def _truncate(content: bytearray, draw: random.Random) -> None:
    del content[draw.randrange(len(content)) :]


def _truncate_at_block(content: bytearray, draw: random.Random) -> None:
    del content[BLOCK * draw.randrange(len(content) // BLOCK) :]


def _truncate_and_end(content: bytearray, draw: random.Random) -> None:
    _truncate_at_block(content, draw)
    content += bytes(2 * BLOCK)


def _zero_blocks(content: bytearray, draw: random.Random) -> None:
    start = BLOCK * draw.randrange(len(content) // BLOCK)
    end = min(start + BLOCK * draw.choice((1, 2, 16)), len(content))
    content[start:end] = bytes(end - start)


def _swap_blocks(content: bytearray, draw: random.Random) -> None:
    blocks = len(content) // BLOCK
    one, other = (BLOCK * draw.randrange(blocks) for _ in range(2))
    content[one : one + BLOCK], content[other : other + BLOCK] = (
        content[other : other + BLOCK],
        content[one : one + BLOCK],
    )


def _repeat_blocks(content: bytearray, draw: random.Random) -> None:
    start = BLOCK * draw.randrange(len(content) // BLOCK)
    size = BLOCK * draw.choice((1, 2, 8))
    content[start:start] = content[start : start + size]


def _set_size(content: bytearray, draw: random.Random) -> None:
    start = draw.choice(_headers(content))
    sizes = (0, 1, 511, 513, 5000, len(content), 1 << 30, (1 << 33) - 1)
    value = b"%011o\0" % draw.choice(sizes)
    if draw.random() < 0.4:
        value = bytes([draw.choice((0x80, 0xFF))]) + draw.choice((1 << 40, 1 << 62, (1 << 88) - 1, 700)).to_bytes(
            11, "big"
        )
    content[start + 124 : start + 136] = value
    _fix_checksum(content, start)


def _set_kind(content: bytearray, draw: random.Random) -> None:
    start = draw.choice(_headers(content))
    content[start + 156 : start + 157] = draw.choice(list(b"1234567xgLKSVNDAMX\0")).to_bytes(1, "big")
    _fix_checksum(content, start)


def _set_name(content: bytearray, draw: random.Random) -> None:
    start = draw.choice(_headers(content))
    names = (
        b"",
        b"/etc/passwd",
        b"../../x.features.npy",
        b"a/../b.features.npy",
        b"x.y.features.npy",
        b"a.b/c.actions.npy",
    )
    more = (b"clip_0.features.npy", b"noextension", b".features.npy", b"\xff.npy", b"a\nb.actions.npy", b"d/")
    content[start : start + 100] = draw.choice(names + more).ljust(100, b"\0")
    _fix_checksum(content, start)


def _insert_header(content: bytearray, draw: random.Random) -> None:
    start = draw.choice(_headers(content))
    texts = (
        b"19 path=../../evil\n",
        b"22 size=1099511627776\n",
        b"11 size=-1\n",
        b"9999999 path=x\n",
        b"0 path=x\n",
        b"12 path=a.b\n",
        b"30 GNU.sparse.realsize=100000\n",
        b"x" * 600,
        b"27 path=clip_0.actions.npy\n",
    )
    text = draw.choice(texts)
    claimed = draw.choice((len(text), len(text), len(text), 8 << 30, (1 << 20) + 1))
    info = tarfile.TarInfo("pax")
    info.type, info.size = draw.choice((b"x", b"g", b"L", b"K")), claimed
    content[start:start] = info.tobuf(tarfile.GNU_FORMAT) + text.ljust(-(-len(text) // BLOCK) * BLOCK, b"\0")


MUTATIONS: tuple[Mutation, ...] = (
    _flip,
    _flip_in_header,
    _truncate,
    _truncate_at_block,
    _truncate_and_end,
    _zero_blocks,
    _swap_blocks,
    _repeat_blocks,
    _set_size,
    _set_kind,
    _set_name,
    _insert_header,
)


def _headers(content: bytes | bytearray) -> list[int]:
    starts = [at for at in range(0, len(content) - BLOCK, BLOCK) if content[at + 257 : at + 262] == b"ustar"]
    return starts or [0]


def _fix_checksum(content: bytearray, start: int) -> None:
    content[start + 148 : start + 156] = b" " * 8
    content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + BLOCK])


def _members_of_tarfile(content: bytes) -> list[tuple[str, str, bytes]]:
    """Return what Python's own reader finds: key, rest of the name, and content of each member of a sample."""
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            return [
                (*parts, content[member.offset_data : member.offset_data + member.size])
                for member in tar
                if member.isreg() and (parts := split_name(member.name)) is not None
            ]
    except tarfile.ReadError:
        return []


def _check_walk(shard: Shard, content: bytes) -> None:
    descriptor = open_regular(shard.path)
    try:
        found = [
            (sample.key, rest, content[member.offset : member.offset + member.size])
            for sample in samples(descriptor)
            for rest, member in sample.members.items()
        ]
    except BadTar as error:
        require_reason(error)
        return
    finally:
        os.close(descriptor)
    assert found == _members_of_tarfile(content)


def _check_index(shard: Shard, content: bytes) -> None:
    try:
        indexed = shard.index()
    except (DataError, Unusable, BadTar) as error:
        require_reason(error)
        return
    expected = {(key, rest): member for key, rest, member in _members_of_tarfile(content)}
    assert [row.key for row in indexed.rows] == list(dict.fromkeys(key for key, _ in expected))
    for row in indexed.rows:
        for field, payload in row.payloads.items():
            array = np.load(io.BytesIO(expected[row.key, f"{field}.npy"]), allow_pickle=False)
            assert array.tobytes() == content[payload.offset : payload.offset + payload.nbytes]
            assert np.isfinite(array).all()


def _check_verify(shard: Shard, content: bytes) -> None:
    full, fields = shard.verify("full"), shard.verify("crc")
    assert (full.count == 0) == (content == shard.original)
    same = len(content) == len(shard.original)
    for row in shard.places.rows(0):
        damaged = any(
            content[span.offset : span.end] != shard.original[span.offset : span.end]
            for _, span in shard.places.pieces(row)
        )
        assert damaged == (row in fields.rows)
        same &= not damaged
    assert same == (fields.count == 0)


def test_ten_thousand_mutated_shards_end_in_a_named_error_or_the_whole_truth(shards: list[Shard]) -> None:
    draw = random.Random(5)
    for number in range(MUTANTS):
        shard, mutation = draw.choice(shards), MUTATIONS[number % len(MUTATIONS)]
        content = bytearray(shard.original)
        mutation(content, draw)
        if draw.random() < 0.1 and len(content) > 4 * BLOCK:
            draw.choice(MUTATIONS)(content, draw)
        shard.write(content)
        try:
            with limited(seconds=1):
                _check_walk(shard, bytes(content))
                _check_index(shard, bytes(content))
                _check_verify(shard, bytes(content))
        except BaseException as error:
            raise AssertionError(f"mutant {number}, {mutation.__name__}") from error


def test_checking_mutated_shards_allocates_no_more_than_a_few_reads(shards: list[Shard]) -> None:
    draw = random.Random(6)
    for number in range(0, 40 * len(MUTATIONS)):
        shard, mutation = draw.choice(shards), MUTATIONS[number % len(MUTATIONS)]
        content = bytearray(shard.original)
        mutation(content, draw)
        shard.write(content)
        with allocating_at_most(ROOM), limited(seconds=5):
            with suppress(DataError, Unusable, BadTar):
                shard.index()
            shard.verify("full")


def test_a_tar_cut_anywhere_is_never_read_as_a_shorter_one(own: Shard) -> None:
    draw = random.Random(7)
    ends = {*range(0, len(own.original), BLOCK), *(draw.randrange(len(own.original)) for _ in range(200))}
    for end in sorted(ends):
        own.write(own.original[:end])
        with pytest.raises(DataError, match=r"Fix: "), limited(seconds=1):
            own.index()
        assert own.verify("quick").count


@pytest.mark.parametrize("number", range(3))
def test_whole_runs_over_mutated_shards_end_in_a_named_error_or_a_sound_data_set(
    shards: list[Shard], number: int, tmp_path: Path
) -> None:
    draw, shard = random.Random(number), shards[number]
    for mutation in MUTATIONS * 2:
        content = bytearray(shard.original)
        mutation(content, draw)
        shard.write(content)
        folder = shard.places.folder if shard.path.parent.name != "shards" else shard.places.folder.parent
        report = verify(folder, level="full")
        assert report.sound == (content == shard.original)
        again = tmp_path / "again"
        again.mkdir(exist_ok=True)
        (again / "x.tar").write_bytes(content)
        try:
            manifest = index_tars(again, replace=True)
        except DataError as error:
            require_reason(error)
        else:
            assert load_manifest(again) == manifest
            assert verify(again, level="full").sound


def _compressed(content: bytes) -> Iterator[tuple[str, bytes]]:
    yield "gzip", gzip.compress(content)
    yield "bzip2", bz2.compress(content)
    yield "xz", lzma.compress(content)
    yield "zstd", b"\x28\xb5\x2f\xfd" + bytes(2000)


def test_compressed_tars_are_named_and_never_unpacked(own: Shard) -> None:
    # A tar of zeros packs a thousandfold: what would be unpacked could be of any size.
    for name, content in _compressed(own.original + bytes(10 << 20)):
        own.write(content)
        with allocating_at_most(ROOM), limited(seconds=1):
            with pytest.raises(DataError, match=rf"compressed \({name}\)"):
                own.index()
            assert own.verify("full").count


def test_a_sparse_file_of_any_size_ends_at_once(own: Shard) -> None:
    own.write(own.original)
    os.truncate(own.path, 1 << 40)
    with allocating_at_most(ROOM), limited(seconds=1), pytest.raises(DataError, match="follow the end of the tar"):
        own.index()
    assert [finding.text for finding in own.verify("crc").listed] == ["it has another size"]


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link": lambda path: path.symlink_to("/etc/passwd"),
    "a link to a pipe": lambda path: (os.mkfifo(path.with_name("pipe")), path.symlink_to("pipe")),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a device": lambda path: os.mknod(path, 0o644 | stat.S_IFCHR, os.makedev(1, 5)),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_named_like_a_shard_and_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.tar"
    try:
        SPECIAL[kind](path)
    except PermissionError:
        pytest.skip("may not make devices here")
    with limited(seconds=1), pytest.raises(DataError, match=r"not a regular file|is a link|no \.tar file"):
        index_tars(tmp_path)


MEMBERS: dict[str, tuple[Callable[[], tarfile.TarInfo], str]] = {
    "a hard link": (lambda: _info("clip_9.features.npy", b"1", link="clip_0.features.npy"), "is a hard link"),
    "a symbolic link": (lambda: _info("clip_9.features.npy", b"2", link="/etc/passwd"), "is a symbolic link"),
    "a character device": (lambda: _info("clip_9.features.npy", b"3"), "is a device"),
    "a block device": (lambda: _info("clip_9.features.npy", b"4"), "is a device"),
    "a pipe": (lambda: _info("clip_9.features.npy", b"6"), "is a pipe"),
    "a sparse file": (lambda: _info("clip_9.features.npy", b"S"), "is not a regular file"),
    "a name out of the folder": (lambda: _info("../../x.features.npy"), "not one inside a folder"),
    "a name back out of the folder": (lambda: _info("a/../../x.features.npy"), "not one inside a folder"),
    "an absolute name": (lambda: _info("/etc/x.features.npy"), "not one inside a folder"),
    "a name with a line break": (lambda: _info("a\nb.features.npy"), "not one inside a folder"),
    "an escape sequence": (lambda: _info("\x1b[2Jb.features.npy"), "not one inside a folder"),
    "a dot in the key": (lambda: _info("ep0.5_clip1.features.npy"), "a key ends at its first dot"),
    "a dot in the folder": (lambda: _info("run.1/clip_9.features.npy"), "no dots"),
    "a key too long": (lambda: _info(f"{'k' * 81}.features.npy"), "at most 80 bytes"),
    "half a sample": (lambda: _info("clip_9.features.npy"), "there is no member clip_9.actions.npy"),
}


def _info(name: str, kind: bytes = b"0", link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize("kind", MEMBERS)
def test_members_that_no_shard_has_are_named(tmp_path: Path, kind: str) -> None:
    make, expected = MEMBERS[kind]
    path = tmp_path / "x.tar"
    path.write_bytes(_foreign_tar(tarfile.GNU_FORMAT))
    with tarfile.open(path, "a") as tar:
        tar.addfile(make())
    with limited(seconds=1), pytest.raises(DataError, match=expected) as caught:
        index_tars(tmp_path)
    assert "x.tar" in str(caught.value)
    assert str(caught.value).isprintable()
