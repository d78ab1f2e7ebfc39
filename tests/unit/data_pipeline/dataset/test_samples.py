from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.dataset.index import Index
from data_pipeline.dataset.index_tars import index_tars
from data_pipeline.dataset.samples import Sample, samples, split_name
from data_pipeline.shard.walk import MAX_PADDING, BadTar, open_regular

BLOCK = 512
Entry = tuple[str, bytes, bytes]
"""Name, kind and content of a header and what follows it."""


def _header(name: str, kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def _tar(entries: Sequence[Entry], *, end: bytes = bytes(2 * BLOCK)) -> bytes:
    blocks = [_header(name, kind, len(text)) + text + bytes(-len(text) % BLOCK) for name, kind, text in entries]
    return b"".join(blocks) + end


def _samples(path: Path, content: bytes) -> list[Sample]:
    path.write_bytes(content)
    descriptor = open_regular(path)
    try:
        return list(samples(descriptor))
    finally:
        os.close(descriptor)


def _pax(**records: str) -> bytes:
    text = b""
    for name, value in records.items():
        record = f" {name.replace('__', '.')}={value}\n".encode()
        length = next(n for n in range(len(record), len(record) + 9) if len(str(n)) + len(record) == n)
        text += str(length).encode() + record
    return text


@pytest.mark.requires("webdataset")
@given(name=st.text(st.sampled_from("ab./_-XY0"), max_size=20))
def test_names_are_split_as_webdataset_splits_them(name: str) -> None:
    key, extension = pytest.importorskip("webdataset.tariterators").base_plus_ext(name)
    found = split_name(name)
    stem = name.rsplit("/", 1)[-1].split(".", 1)[0]
    if key is None or not stem:
        # What begins with a dot, after any folder, is hidden: a sample of no name.
        assert found is None
    else:
        assert found == (key.removeprefix("./"), extension.lower())


READABLE: dict[str, tuple[list[Entry], list[str]]] = {
    "folders between": ([("d/", b"5", b""), ("d/a.x", b"0", b"1"), ("e/", b"5", b"")], ["d/a"]),
    "an old folder": ([("d/", b"\0", b"")], []),
    "an old file": ([("a.x", b"\0", b"1")], ["a"]),
    "a time in pax": ([("p", b"x", _pax(mtime="1.5")), ("a.x", b"0", b"1")], ["a"]),
    "a name in pax": ([("p", b"x", _pax(path="long/a.x")), ("b.y", b"0", b"1")], ["long/a"]),
    "a size in pax": ([("p", b"x", _pax(size="1")), ("a.x", b"0", b"1")], ["a"]),
    "a comment for all": ([("g", b"g", _pax(comment="x path=y")), ("a.x", b"0", b"1")], ["a"]),
    "a long GNU name": ([("././@LongLink", b"L", b"n" * 150 + b"/a.x\0"), ("n", b"0", b"1")], [f"{'n' * 150}/a"]),
    "names without a key": ([("README", b"0", b"1"), (".hidden.x", b"0", b"1"), ("a.x", b"0", b"1")], ["a"]),
    "the current folder": ([("./a.x", b"0", b"1"), ("./a.y", b"0", b"1")], ["a"]),
    "a key again": ([("a.x", b"0", b""), ("b.x", b"0", b""), ("a.y", b"0", b"")], ["a", "b", "a"]),
}


@pytest.mark.parametrize("kind", READABLE)
def test_tars_of_many_tools_are_read(tmp_path: Path, kind: str) -> None:
    entries, keys = READABLE[kind]
    for end in (bytes(2 * BLOCK), bytes(10240), bytes(2 * BLOCK + MAX_PADDING)):
        assert [sample.key for sample in _samples(tmp_path / "x.tar", _tar(entries, end=end))] == keys


A = ("a.x", b"0", b"1")
REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "ends at byte 0"),
    "one empty block": (_tar([A], end=bytes(BLOCK)), "not followed by a second one"),
    "no end": (_tar([A], end=b""), "without the two empty blocks"),
    "a hole": (_tar([A], end=bytes(4 * BLOCK)) + _tar([A]), "data after the end"),
    "one empty block between": (_tar([A], end=bytes(BLOCK)) + _tar([A]), "not followed by a second one"),
    "too much padding": (_tar([A], end=bytes(3 * BLOCK + MAX_PADDING)), "follow the end of the tar"),
    "a header for nobody": (_tar([A, ("p", b"x", _pax(mtime="1"))]), "announces another member"),
    "hidden by a global one": (
        _tar([("p", b"x", _pax(mtime="1")), ("g", b"g", _pax(comment="c"))]),
        "announces another",
    ),
    "two names in pax": (_tar([("p", b"x", _pax(path="b.x") + _pax(path="c.x")), A]), "a second time"),
    "two headers with names": (
        _tar([("p", b"x", _pax(path="b.x")), ("././@LongLink", b"L", b"c.x\0"), A]),
        "a second time",
    ),
    "two sizes": (_tar([("p", b"x", _pax(size="1") + _pax(size="2")), A]), "or a second one"),
    "a size that is no number": (_tar([("p", b"x", _pax(size="-1")), A]), "claims the size"),
    "a size of everything": (_tar([("p", b"x", _pax(size="9" * 18)), A]), "the file ends at byte"),
    "a name for all": (_tar([("g", b"g", _pax(path="b.x")), A]), "changes every member"),
    "a sparse file": (_tar([("p", b"x", _pax(GNU__sparse__major="1")), A]), "sparse"),
    "sparse files all": (_tar([("g", b"g", _pax(GNU__sparse__size="1")), A]), "changes every member"),
    "a record without its end": (_tar([("p", b"x", b"9 path=ab"), A]), "damaged"),
    "a record too long": (_tar([("p", b"x", b"99 path=b\n"), A]), "damaged"),
    "an empty long name": (_tar([("././@LongLink", b"L", b"\0"), A]), "not one inside a folder"),
    "a long name beyond its size": (
        _header("././@LongLink", b"L", 3) + b"b.x.and.more".ljust(BLOCK, b"\0") + _tar([A]),
        "and is longer",
    ),
    "a header too long": (_header("p", b"x", (1 << 20) + 1) + bytes(2 << 20), "claims 1048577 bytes"),
    "one name twice": (_tar([A, A]), "two members a.x"),
    "a name that is not UTF-8": (_tar([A]).replace(b"a.x", b"\xff.x", 1), "checksum does not fit"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_two_readers_could_read_in_two_ways_is_refused(tmp_path: Path, kind: str) -> None:
    content, expected = REFUSED[kind]
    with pytest.raises(BadTar, match=expected):
        _samples(tmp_path / "x.tar", content)


def test_fields_of_a_header_that_tarfile_stops_at_are_refused(tmp_path: Path) -> None:
    for start, end in ((100, 108), (108, 116), (116, 124), (136, 148), (329, 337), (337, 345)):
        content = bytearray(_tar([A]))
        content[start:end] = b"zz".ljust(end - start, b"\0")
        content[148:156] = b" " * 8
        content[148:156] = b"%06o\0 " % sum(content[:BLOCK])
        with pytest.raises(BadTar, match="is no number"):
            _samples(tmp_path / "x.tar", bytes(content))


@pytest.mark.requires("webdataset")
def test_webdataset_and_the_index_find_the_same_samples(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    draw, expected = np.random.default_rng(0), {}
    for name, form in (("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT), ("ustar", tarfile.USTAR_FORMAT)):
        with tarfile.open(tmp_path / f"{name}.tar", "w", format=form) as tar:
            for number in range(3):
                key = f"{name}/clip_{number}"
                expected[key] = {
                    "actions": draw.normal(size=(2, 2)).astype(np.float32),
                    "features": draw.normal(size=(3, 4, 8)).astype(np.float16),
                }
                for field, array in expected[key].items():
                    content = io.BytesIO()
                    np.save(content, array)
                    info = tarfile.TarInfo(f"{key}.{field}.npy")
                    info.size, info.mtime = content.tell(), 1.25
                    content.seek(0)
                    tar.addfile(info, content)
    manifest = index_tars(tmp_path)
    urls = [str(tmp_path / entry.name) for entry in manifest.shards]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    ours = list(Index(tmp_path, manifest).rows())
    assert [sample["__key__"] for sample in theirs] == [row.key for row in ours]
    for row, sample in zip(ours, theirs, strict=True):
        content = (tmp_path / manifest.shards[row.shard].name).read_bytes()
        for field, payload in row.payloads.items():
            np.testing.assert_array_equal(sample[f"{field}.npy"], expected[row.key][field])
            assert content[payload.offset : payload.offset + payload.nbytes] == sample[f"{field}.npy"].tobytes()
