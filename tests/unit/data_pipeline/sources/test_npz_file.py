from __future__ import annotations

import io
import os
import random
import struct
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.sources.npy_file import HEADER_BYTES
from data_pipeline.sources.npz_file import MAX_READ, Npz

ARRAYS = {"features": np.arange(600, dtype=np.float16).reshape(3, 20, 10), "actions": np.ones((2, 2), np.float32)}


def archive(*, deflated: bool = False) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if deflated else np.savez)(buffer, **ARRAYS)
    return buffer.getvalue()


def npy_of(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def zipped(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in members:
            file.writestr(name, content)
    return buffer.getvalue()


@contextmanager
def npz(place: Path, content: bytes, start: int = 0) -> Iterator[Npz]:
    place.write_bytes(content)
    descriptor = os.open(place, os.O_RDONLY)
    try:
        yield Npz(descriptor, start, len(content) - start)
    finally:
        os.close(descriptor)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "clip.npz"


def refusal(place: Path, content: bytes) -> str:
    with pytest.raises(ValueError) as caught, npz(place, content) as opened:
        opened.read("features")
    return str(caught.value)


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("start", [0, 777])
def test_what_numpy_saves_is_read_bit_for_bit(place: Path, deflated: bool, start: int) -> None:
    with npz(place, bytes(start) + archive(deflated=deflated), start) as opened:
        assert opened.names == tuple(ARRAYS)
        for name, array in ARRAYS.items():
            assert opened.header(name).shape == array.shape
            np.testing.assert_array_equal(opened.read(name), array, strict=True)


def test_an_array_longer_than_a_piece_whose_header_is_longest_is_read(place: Path) -> None:
    values = np.arange(300_000, dtype=np.int16)
    text = "{'descr': '<i2', 'fortran_order': False, 'shape': (300000,), }".ljust(HEADER_BYTES - 12)
    content = b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text.encode() + values.tobytes()
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with npz(place, zipped([("features.npy", content)], method)) as opened:
            np.testing.assert_array_equal(opened.read("features"), values)


def changed(content: bytes, offset: int, layout: str, value: int) -> bytes:
    """Change a number of the first entry of the archive's directory."""
    at = content.index(b"PK\x01\x02") + offset
    raw = struct.pack(layout, value)
    return content[:at] + raw + content[at + len(raw) :]


FLAGS, METHOD, COMPRESSED, SIZE = 8, 10, 20, 24


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not a .npz"),
        (b"PK\x03\x04" + bytes(100), "not a .npz"),
        (archive()[:-30], "not a .npz"),
        (zipped([("other.npy", npy_of(np.zeros(2)))]), "no such array, only other"),
        (zipped([("features.npy", npy_of(np.zeros(2))), ("features", b"")]), "the same name"),
        (zipped([("features.npy", npy_of(np.array(["a"])))]), "strings"),
        (zipped([("features.npy", npy_of(np.zeros(9))[:-1])]), "it is truncated"),
        (zipped([("features.npy", npy_of(np.zeros(9)) + b"x")], zipfile.ZIP_DEFLATED), "something follows"),
        (zipped([("features.npy", npy_of(np.zeros(9)))], zipfile.ZIP_BZIP2), "compressed by method 12"),
        (zipped([("features.npy", npy_of(np.zeros(9)))], zipfile.ZIP_LZMA), "compressed by method 14"),
        (changed(archive(), FLAGS, "<H", 1), "encrypted"),
        (changed(archive(), SIZE, "<L", 0xFFFFFFF0), "at most"),
        (changed(archive(deflated=True), SIZE, "<L", 0xFFFFFFF0), "at most"),
        (changed(archive(), COMPRESSED, "<L", 0xFFFFFFF0), "claims 4294967280 bytes of an archive of"),
        (changed(archive(), METHOD, "<H", 8), "its bytes are damaged"),
    ],
)
def test_hostile_and_damaged_archives_are_refused_by_what_is_wrong(place: Path, content: bytes, expected: str) -> None:
    assert expected in refusal(place, content)


def test_a_directory_of_many_names_is_not_read(place: Path) -> None:
    content = zipped([("x" * 500 + str(number), b"") for number in range(MAX_READ // 500)])
    assert "its directory claims" in refusal(place, content)


@pytest.mark.parametrize("deflated", [False, True])
def test_every_flipped_bit_of_the_values_is_found(place: Path, deflated: bool) -> None:
    content = archive(deflated=deflated)
    start, end = (0, content.index(b"PK\x03\x04", 4)) if deflated else (content.index(b"\x93NUMPY"), 1200)
    draw = random.Random(3)
    for at in draw.sample(range(start + 60, end), 60):
        flipped = bytearray(content)
        flipped[at] ^= 1 << draw.randrange(8)
        refusal(place, bytes(flipped))


def mutated(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        # Most mutations hit the directory at the end.
        at = len(changed) - 1 - int(draw.random() ** 2 * len(changed))
        if draw.random() < 0.7:
            changed[at] = draw.choice((0, 1, 255, draw.randrange(256)))
        else:
            del changed[at : at + draw.randint(1, 8)]
    return bytes(changed)


def test_mutated_archives_give_the_array_or_a_value_error_and_no_large_allocation(place: Path) -> None:
    draw = random.Random(5)
    originals = [archive(), archive(deflated=True)]
    contents = [mutated(draw.choice(originals), draw) for _ in range(3_000)]
    place.write_bytes(b"".join(contents))
    descriptor, start, read = os.open(place, os.O_RDONLY), 0, 0
    tracemalloc.start()
    try:
        for content in contents:
            start, begin = start + len(content), start
            try:
                array = Npz(descriptor, begin, len(content)).read("features")
            except ValueError:
                continue
            read += 1
            assert array.tobytes() == ARRAYS["features"].tobytes()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        os.close(descriptor)
    assert 100 < read < 2_900
    assert peak < 4 << 20
