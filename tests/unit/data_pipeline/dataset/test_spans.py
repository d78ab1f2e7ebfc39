from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.dataset import spans as module
from data_pipeline.dataset.spans import READ_BYTES, Span, SpanReader


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    content = np.random.default_rng(0).bytes(5 * READ_BYTES + 777)
    path = tmp_path_factory.mktemp("spans") / "file"
    path.write_bytes(content)
    return path, content


@st.composite
def _layouts(draw: st.DrawFn, size: int) -> list[Span]:
    lengths = st.one_of(st.integers(0, 3000), st.integers(0, 2 * READ_BYTES))
    spans, at = [], 0
    for _ in range(draw(st.integers(0, 12))):
        at += draw(lengths)
        nbytes = max(draw(lengths), 1)
        if at + nbytes > size:
            break
        spans.append(Span(at, nbytes))
        at += nbytes
    return spans


@settings(max_examples=60, deadline=None)
@given(data=st.data(), whole=st.booleans())
def test_every_span_is_read_once_and_in_order(file: tuple[Path, bytes], data: st.DataObject, whole: bool) -> None:
    path, content = file
    spans = data.draw(_layouts(len(content)))
    digest = hashlib.sha256() if whole else None
    seen = []
    with _opened(path) as descriptor:
        for number, piece in SpanReader().read(descriptor, spans, size=len(content), digest=digest):
            assert piece is not None
            assert piece.tobytes() == content[spans[number].offset : spans[number].end]
            seen.append(number)
    assert seen == list(range(len(spans)))
    if digest is not None:
        assert digest.digest() == hashlib.sha256(content).digest()


def test_one_buffer_as_long_as_the_longest_span_serves_all(file: tuple[Path, bytes]) -> None:
    path, content = file
    reader, bases = SpanReader(), set()
    spans = [Span(at, 100_000) for at in range(0, len(content) - 100_000, 100_000)]
    with _opened(path) as descriptor:
        for _ in range(2):
            for _, piece in reader.read(descriptor, spans, size=len(content)):
                assert piece is not None
                bases.add(id(piece.base))
    assert len(bases) == 1


def test_bytes_the_disk_does_not_give_spoil_no_other_span(
    file: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, content = file
    bad, real = 250_000, os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset <= bad < offset + len(buffers[0]):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(module.os, "preadv", preadv)
    spans = [Span(at, 1000) for at in range(0, 400_000, 1000)]
    with _opened(path) as descriptor:
        for number, piece in SpanReader().read(descriptor, spans, size=len(content)):
            if number == bad // 1000:
                assert piece is None
            else:
                assert piece is not None
                assert piece.tobytes() == content[spans[number].offset : spans[number].end]
        with pytest.raises(OSError, match="Input/output"):
            list(SpanReader().read(descriptor, spans, size=len(content), digest=hashlib.sha256()))


def test_a_file_that_becomes_shorter_is_noticed(file: tuple[Path, bytes], tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(file[1][:1000])
    with _opened(path) as descriptor:
        found = dict(SpanReader().read(descriptor, [Span(0, 500), Span(900, 200)], size=1100))
        assert found[0] is not None
        assert found[1] is None
        with pytest.raises(OSError, match="ends at byte 1000"):
            list(SpanReader().read(descriptor, [Span(0, 500)], size=1100, digest=hashlib.sha256()))
