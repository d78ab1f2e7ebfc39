from __future__ import annotations

import io
import random
from collections.abc import Callable

import numpy as np
import pytest

from data_pipeline.shard.npy import DESCRS, MAGIC, MAX_HEADER, npy_header, parse_npy_header
from tests.hostile import limited, require_reason

MUTANTS = 10_000
TOKENS = [b"'", b"{", b"}", b"(", b")", b",", b" ", b"\n", b"\0", b":", b"L", b"-1", b"0", b"9" * 30, b"True", b"|O"]
TEXTS = (
    "{'descr': '<f2', 'fortran_order': False, 'shape': (3), }",
    "{'descr': '<f2', 'fortran_order': False, 'shape': (03,), }",
    "{'descr': '<f2', 'fortran_order': False, 'shape': (1_0,), }",
    "{'descr': '<f2', 'fortran_order': False, 'shape': (2,), 'shape': (3,), }",
    "{'descr': '<f2', 'fortran_order': False, 'shape': (2,), 'more': 1, }",
    "{'descr': '<f2', 'fortran_order': False, }",
    "{'descr': '<f2', 'fortran_order': True, 'shape': (2, 3), }",
    "{'descr': '<f2', 'fortran_order': 0, 'shape': (2, 3), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (2,), }",
    "{'descr': '>f2', 'fortran_order': False, 'shape': (2,), }",
    "{'descr': [('a', '<f2')], 'fortran_order': False, 'shape': (2,), }",
    "{'descr': '<f2', 'fortran_order': False, 'shape': (-1,), }",
    "{'descr': '<f2', 'fortran_order': False, 'shape': (99999999999999999999,), }",
    "{'descr': '<f2', 'fortran_order': False, 'shape': (2,), }; __import__('os')",
    "__import__('os').system('true')",
    "{'descr': '<f2', 'fortran_order': False, 'shape': " + "(" * 5000 + ")" * 3000 + "}",
    "{'descr': '<f2', 'fortran_order': False, 'shape': (" + "1, " * 2000 + "), }",
    "{" + "'descr': '<f2', " * 500 + "}",
    "",
    "{}",
    "[]",
)


def _with_text(text: str, version: int = 1) -> bytes:
    raw = text.encode("latin1")
    return MAGIC + bytes([version, 0]) + len(raw).to_bytes(2 if version == 1 else 4, "little") + raw


def _originals() -> list[bytes]:
    shapes = [(), (1,), (7,), (3, 4), (2, 6, 16), (2, 2, 3, 16), (0,), (1 << 40,)]
    headers = [npy_header(descr, shape) for descr in DESCRS for shape in shapes]
    headers += [npy_header("<f2", (2, 6, 16), start=512)]
    headers += [_with_text(header[10:].decode("latin1"), version) for header in headers[:6] for version in (2, 3)]
    return headers


def _mutant(draw: random.Random, originals: list[bytes]) -> bytes:
    content = bytearray(draw.choice(originals))
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        place = draw.randrange(len(content) + 1) if content else 0
        # Most of a padded header is spaces; what is before them decides.
        place = min(place, draw.randrange(90)) if draw.random() < 0.7 else place
        kind = draw.randrange(5)
        if kind == 0 and place < len(content):
            content[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            content[place:place] = draw.choice(TOKENS)
        elif kind == 2:
            del content[place : place + draw.randrange(1, 12)]
        elif kind == 3:
            content[place : place + 4] = draw.randbytes(4)
        else:
            other = draw.choice(originals)
            content[place:] = other[draw.randrange(len(other)) :]
    return bytes(content)


def _numpy_reads(content: bytes) -> tuple[str, tuple[int, ...], int]:
    """Return type, shape and length of a header as numpy's own reader has them."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    # Versions 2 and 3 differ in the encoding of names, of which our types have none.
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    assert not fortran
    return dtype.str, shape, stream.tell()


def _check(content: bytes) -> bool:
    """Return whether a header is accepted, and check that it is so for a reason."""
    try:
        header = parse_npy_header(content)
    except ValueError as error:
        require_reason(error)
        return False
    assert tuple(header) == _numpy_reads(content)
    assert header.descr in DESCRS
    assert header.nbytes <= MAX_HEADER + 12
    return True


@pytest.mark.filterwarnings("error")
def test_ten_thousand_mutated_headers_are_refused_or_read_as_numpy_reads_them() -> None:
    draw, originals = random.Random(20), _originals()
    assert all(map(_check, originals))
    accepted = 0
    with limited(seconds=10):
        for number in range(MUTANTS):
            content = _mutant(draw, originals)
            try:
                accepted += _check(content)
            except BaseException as error:
                raise AssertionError(f"mutant {number}: {content!r}") from error
    assert 100 < accepted < MUTANTS / 2


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("version", [1, 2, 3])
def test_headers_of_another_form_are_refused_at_once(text: str, version: int) -> None:
    with limited(seconds=1), pytest.raises(ValueError):
        parse_npy_header(_with_text(text, version))


@pytest.mark.parametrize(
    "damage",
    [
        lambda header: header[:9],
        lambda header: header[:40],
        lambda header: b"\x93NUMPX" + header[6:],
        lambda header: header[:6] + b"\x04\x00" + header[8:],
        lambda header: header[:6] + b"\x01\x01" + header[8:],
        lambda header: header[:8] + b"\xff\xff" + header[10:],
        lambda header: b"PK\x03\x04" + header,
        lambda header: b"",
    ],
)
def test_what_is_no_whole_header_is_refused(damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(ValueError):
        parse_npy_header(damage(npy_header("<f2", (2, 6, 16))))


def test_a_header_longer_than_numpy_trusts_is_refused() -> None:
    text = "{'descr': '<f2', 'fortran_order': False, 'shape': (2,), }"
    assert parse_npy_header(_with_text(text.ljust(MAX_HEADER))).shape == (2,)
    with pytest.raises(ValueError, match="more than 10000"):
        parse_npy_header(_with_text(text.ljust(MAX_HEADER + 1)))
