from __future__ import annotations

import io
import os
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data_pipeline.shard.npy import MAX_HEADER
from data_pipeline.sources.npy_file import HEADER_BYTES, header_at, parse_header, read_npy, values_at
from data_pipeline.sources.stored import read_small

TAKEN = ("<f2", "<f4", "<f8", *(f"<{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)))
HEADER = "{'descr': '<f2', 'fortran_order': False, 'shape': (3, 2), }"


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version, allow_pickle=False)
    return buffer.getvalue()


def with_header(text: str, values: bytes = bytes(12), version: int = 1) -> bytes:
    raw = text.encode("latin1")
    length = len(raw).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + raw + values


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "array.npy"


def refusal(place: Path, content: bytes) -> str:
    place.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_npy(place)
    return str(caught.value)


@pytest.fixture(scope="module")
def module_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("npy") / "array.npy"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_what_numpy_writes_is_read_bit_for_bit(module_place: Path, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(TAKEN))
    array = data.draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)))
    array = data.draw(st.sampled_from((np.ascontiguousarray, np.asfortranarray)))(array)
    content = npy(array, data.draw(st.sampled_from((None, (1, 0), (2, 0), (3, 0)))))
    module_place.write_bytes(content)
    header, found = parse_header(content[:HEADER_BYTES]), read_npy(module_place)
    assert (header.dtype, header.shape) == (array.dtype.name, array.shape)
    assert found.dtype == array.dtype
    assert found.flags.c_contiguous
    assert found.tobytes() == array.tobytes()
    assert found.shape == array.shape


@pytest.mark.parametrize(
    "text",
    [
        '{"shape": (3L, 2L), "descr": "=f2", "fortran_order": False}',
        "{ 'shape' :(3 ,2,) ,\n'fortran_order': False ,'descr':'f2' }   \n",
    ],
)
def test_other_spellings_of_the_same_header_are_read(place: Path, text: str) -> None:
    place.write_bytes(with_header(text))
    assert read_npy(place).shape == (3, 2)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array(["a"]), "strings"),
        (np.array([b"a"]), "byte strings"),
        (np.zeros(2, np.complex64), "complex numbers"),
        (np.zeros(2, "M8[s]"), "dates"),
        (np.zeros(2, "m8[s]"), "time spans"),
        (np.zeros(2, bool), "truth values"),
        (np.zeros(2, [("x", "<f4")]), "structured type"),
        (np.zeros(2, "V8"), "structured type or raw bytes"),
        (np.zeros(2, ">f4"), "big-endian; store it with .astype('<f4')"),
        (np.zeros(2, ">i2"), "big-endian"),
        (np.zeros(2, np.longdouble), "other than of 16, 32 or 64 bits"),
    ],
)
def test_types_that_are_no_features_are_refused_by_name(place: Path, array: np.ndarray, expected: str) -> None:
    assert expected in refusal(place, npy(array))


def test_python_objects_are_refused_and_not_loaded(place: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return os.mkdir, (str(tmp_path / "canary"),)

    buffer = io.BytesIO()
    np.save(buffer, np.array([Evil()], dtype=object), allow_pickle=True)
    assert "Python objects, which could run code" in refusal(place, buffer.getvalue())
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "does not start like a .npy"),
        (b"\x93NUMPY\x01", "ends within the header"),
        (b"\x93NUMPY\x04\x00\x00\x00\x00\x00", "unknown .npy version"),
        (b"\x93NUMPY\x01\x00\xff\x00{", "ends within the header"),
        (with_header("x" * (MAX_HEADER + 1)), "more than 10000"),
        (with_header("x" * 20, version=2)[:12] + b"\xff\xff\xff\xff", "ends within the header"),
        (with_header("{}"), "lacks descr"),
        (with_header("[]"), "not a dictionary"),
        (with_header(HEADER + "; import os"), "cannot be read at '; import os'"),
        (with_header(HEADER + "{}"), "something follows the dictionary"),
        (with_header(HEADER.replace("'shape'", "'descr'")), "three different names"),
        (with_header(HEADER.replace("(3, 2)", "(3, -2)")), "cannot be read"),
        (with_header(HEADER.replace("(3, 2)", "(6)")), "not a tuple"),
        (with_header(HEADER.replace("(3, 2)", "[3, 2]")), "another form"),
        (with_header(HEADER.replace("(3, 2)", "(3, 2.0)")), "cannot be read"),
        (with_header(HEADER.replace("(3, 2)", "(" + "1, " * 9 + ")")), "at most 8 sizes"),
        (with_header(HEADER.replace("False", "None")), "cannot be read"),
        (with_header(HEADER.replace("False", "'no'")), "gives fortran_order another form"),
        (with_header(HEADER.replace("}", "'more': 1}")), "an entry 'more'"),
        (with_header(HEADER.replace("}", "'more': (((((1"), values=b""), "an entry 'more'"),
        (with_header(HEADER.replace("(3, 2)", "(1099511627776, 1099511627776)")), "it is truncated"),
        (with_header(HEADER.replace("(3, 2)", "(3, 9" + "9" * 30 + ")")), "not a tuple"),
        (with_header(HEADER, bytes(11)), "it is truncated: it holds 11 bytes of values"),
        (with_header(HEADER, bytes(13)), "something follows the values: it holds 13 bytes"),
    ],
)
def test_damaged_and_hostile_headers_are_refused_by_what_is_wrong(place: Path, content: bytes, expected: str) -> None:
    assert expected in refusal(place, content)


def test_a_zip_archive_under_the_name_of_a_npy_is_not_opened(place: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, np.zeros(3))
    assert "this is an npz" in refusal(place, buffer.getvalue())


def test_a_file_cut_anywhere_is_refused(place: Path) -> None:
    content = npy(np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    for length in range(len(content)):
        refusal(place, content[:length])


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "real.npy", np.zeros(3))
    (tmp_path / "link.npy").symlink_to(tmp_path / "real.npy")
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(OSError):
        read_npy(tmp_path / "link.npy")
    for name in ("pipe.npy", "folder.npy"):
        with pytest.raises(ValueError, match="not a regular file"):
            read_npy(tmp_path / name)
    with pytest.raises(ValueError, match="not a regular file"):
        read_npy(Path("/dev/zero"))


PIECES = (
    "'descr'",
    "'shape'",
    "True",
    "(",
    ")",
    "{",
    "}",
    ",",
    " ",
    "'<f8'",
    "'|O'",
    "'>f4'",
    "9" * 11,
    "3L",
    "[",
    "\\",
)


def mutated(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randint(1, 2)):
        at = draw.randrange(min(len(changed), 76) or 1)
        kind = draw.randrange(7)
        if kind == 0 and changed:
            changed[at % len(changed)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del changed[at : at + draw.randint(1, 5)]
        elif kind == 2:
            changed[at:at] = draw.choice(PIECES).encode()
        elif kind == 3:
            changed[at : at + 4] = draw.randbytes(4)
        elif kind == 4:
            changed[at : at + 1] = draw.choice("0123456789 ,'").encode()
        elif kind == 5:
            changed[at:at] = changed[at // 2 : at]
        else:
            changed[at:at] = b" " * draw.randint(1, 3)
    return bytes(changed)


def mutations(count: int) -> list[bytes]:
    """Files with bytes changed, removed, doubled or put in: anywhere, or in a header whose length is then corrected."""
    draw = random.Random(11)
    arrays = [np.zeros((3, 2), "<f2"), np.zeros((2, 2, 2), "<f4"), np.zeros(5, "<i8"), np.asfortranarray(np.eye(2))]
    contents = []
    for number in range(count):
        array = draw.choice(arrays)
        if number % 2:
            contents.append(mutated(npy(array, draw.choice(((1, 0), (2, 0), (3, 0)))), draw))
            continue
        order = array.flags.f_contiguous
        text = f"{{'descr': '{array.dtype.str}', 'fortran_order': {order}, 'shape': {array.shape}, }}"
        changed = mutated(text.encode(), draw).decode("latin1")
        contents.append(with_header(changed, array.tobytes(), draw.choice((1, 2, 3))))
    return contents


def test_ten_thousand_mutated_headers_raise_only_value_errors_and_allocate_no_more_than_the_file(place: Path) -> None:
    contents = mutations(10_000)
    place.write_bytes(b"".join(contents))
    descriptor, start, accepted, largest = os.open(place, os.O_RDONLY), 0, 0, 0
    tracemalloc.start()
    try:
        for content in contents:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                array = values_at(descriptor, start, header_at(descriptor, start, len(content)))
            except ValueError:
                array = None
            largest = max(largest, tracemalloc.get_traced_memory()[1] - before)
            start += len(content)
            if array is not None:
                accepted += 1
                expected = np.load(io.BytesIO(content), allow_pickle=False)
                assert (array.dtype, array.shape) == (expected.dtype.newbyteorder("="), expected.shape)
                assert array.tobytes() == expected.tobytes()
    finally:
        tracemalloc.stop()
        os.close(descriptor)
    # Some mutations leave a header as good as it was.
    assert 100 < accepted < 3_000
    # The header is read whole and once decoded; its pieces are small.
    assert largest < 4 * HEADER_BYTES


def test_small_files_are_read_whole_however_little_comes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(content := bytes(range(100)))
    pread = os.pread
    monkeypatch.setattr("os.pread", lambda file, size, at: pread(file, min(size, 7), at))
    assert read_small(tmp_path / "a.jsonl", 100) == content
    assert read_small(tmp_path / "a.jsonl", 100, 10, 50) == content[10:60]
