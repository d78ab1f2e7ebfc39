from __future__ import annotations

import multiprocessing
import pickle
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.sources.base import Source
from data_pipeline.sources.open import open_source

MODULE = """
import numpy as np

def clip(number):
    arrays = {"features": np.full((3, 2, 4), number, np.float32), "actions": np.zeros((2, 1), np.float32)}
    return f"clip_{number}", arrays, {"partition": "even" if number % 2 == 0 else "odd", "split": "train"}

def indexed():
    return [clip(number) for number in range(4)]

class Lazy:
    def __len__(self):
        return 4

    def __getitem__(self, number):
        return clip(number)

def lazy():
    return Lazy()

def iterable(count="4"):
    for number in range(int(count)):
        yield clip(number)

def failing():
    yield clip(0)
    raise OSError("no more disk")

def short():
    return [("a", {})]

def nothing():
    return None

def odd():
    key, arrays, meta = clip(1)
    return [
        clip(0),
        ("a.b", arrays, {}),
        ("list", {**arrays, "actions": [[0], [0]]}, {}),
        ("text", {**arrays, "actions": np.array([["x"], ["y"]])}, {}),
        ("field", {**arrays, "action": arrays["actions"]}, {}),
        ("meta", arrays, {"spilt": "train"}),
        ("number", arrays, {"split": 1}),
    ]
"""


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Source]]:
    (tmp_path / "my_clips.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)

    def opened(name: str, **options: str) -> Source:
        return open_source(f"my_clips:{name}", kind="callable", options=options)

    yield opened
    sys.modules.pop("my_clips", None)


@pytest.mark.parametrize("name", ["indexed", "lazy", "iterable"])
def test_clips_are_read_in_any_order_and_from_a_copy(opened: Callable[..., Source], tmp_path: Path, name: str) -> None:
    source = opened(name, **({"spool": str(tmp_path / "spool")} if name == "iterable" else {}))
    listing = source.listing()
    assert [(clip.key, clip.partition) for clip in listing.clips] == [
        ("clip_0", "even"), ("clip_1", "odd"), ("clip_2", "even"), ("clip_3", "odd"),
    ]  # fmt: skip
    for reader in (source, pickle.loads(pickle.dumps(source))):
        for clip in reversed(listing.clips):
            np.testing.assert_array_equal(reader.read(clip)["features"], np.full((3, 2, 4), int(clip.key[-1]), "f4"))
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as executor:
        assert executor.submit(source.read, listing.clips[3]).result(timeout=60)["features"][0, 0, 0] == 3
    assert opened(name, **({"spool": str(tmp_path / "other")} if name == "iterable" else {})).listing() == listing


def test_an_iterable_needs_a_folder_and_an_index_none(opened: Callable[..., Source], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"returns a generator, which can only be read in order.*name a folder"):
        opened("iterable").listing()
    with pytest.raises(DataError, match="clips that can be indexed are not written anywhere"):
        opened("indexed", spool=str(tmp_path)).listing()


def test_an_argument_is_passed_on(opened: Callable[..., Source], tmp_path: Path) -> None:
    assert len(opened("iterable", argument="2", spool=str(tmp_path / "s")).listing().clips) == 2
    with pytest.raises(DataError, match="it raised ValueError: invalid literal"):
        opened("iterable", argument="x", spool=str(tmp_path / "s")).listing()


def test_a_clip_that_differs_the_second_time_is_not_read(opened: Callable[..., Source]) -> None:
    source = opened("indexed")
    clip = source.listing().clips[1]
    other = pickle.loads(pickle.dumps(source))
    import my_clips  # pyright: ignore[reportMissingImports]

    my_clips.clip = lambda number: (
        "clip_1",
        {"features": np.ones((3, 2, 4), "f4") * 7, "actions": np.zeros((2, 1), "f4")},
        {},
    )
    with pytest.raises(DataError, match="its files have changed since it was listed"):
        other.read(clip)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", "my_clips has no function none"),
        ("failing", "it raised OSError: no more disk"),
        ("short", "clip 0 is not (key, arrays, meta)"),
        ("nothing", "it returned a NoneType, not clips"),
    ],
)
def test_a_function_that_does_not_do_its_part_is_named(
    opened: Callable[..., Source], tmp_path: Path, name: str, expected: str
) -> None:
    with pytest.raises(DataError) as caught:
        opened(name, **({"spool": str(tmp_path / "s")} if name == "failing" else {})).listing()
    assert expected in str(caught.value)
    assert f"my_clips:{name}" in str(caught.value)


def test_bad_clips_are_set_apart(opened: Callable[..., Source]) -> None:
    listing = opened("odd").listing()
    assert [clip.key for clip in listing.clips] == ["clip_0"]
    expected = {
        "a.b": "a_b would do",
        "list": "my_clips:odd[2], array actions: it is of type list, not a numpy array",
        "text": "its type '<U1' is refused: strings",
        "field": "unknown entry 'action': did you mean actions?",
        "meta": "unknown entry 'spilt': did you mean split?",
        "number": "must hold texts",
    }
    assert [bad.key for bad in listing.bad] == list(expected)
    for bad in listing.bad:
        assert expected[bad.key] in bad.reason


def test_code_runs_only_when_the_kind_is_named(opened: Callable[..., Source]) -> None:
    with pytest.raises(DataError, match="set kind=callable if it is a function"):
        open_source("my_clips:indexed")
    for text in ("os.system", "os:system:x", "../x:y", "a b:c"):
        with pytest.raises(DataError, match="must be module:function"):
            open_source(text, kind="callable").listing()
    with pytest.raises(DataError, match="no_such_module cannot be imported"):
        open_source("no_such_module:f", kind="callable").listing()
