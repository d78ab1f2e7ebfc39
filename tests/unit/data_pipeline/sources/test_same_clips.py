"""The same clips from every layout give the same arrays, here and in another process."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.sources.base import Source
from data_pipeline.sources.open import open_source
from tests.source_layouts import LAYOUTS, Clips, make_clips

CLIPS = make_clips()
NAMES = [
    pytest.param(name, marks=[pytest.mark.requires("zarr")] if name.startswith("zarr") else []) for name in LAYOUTS
]


def same(arrays: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return arrays.keys() == expected.keys() and all(
        arrays[name].dtype == array.dtype
        and arrays[name].shape == array.shape
        and arrays[name].flags.c_contiguous
        and arrays[name].tobytes() == array.tobytes()
        for name, array in expected.items()
    )


def written(name: str, root: Path, clips: Clips = CLIPS) -> Source:
    path, kwargs = LAYOUTS[name](root, clips)
    return open_source(path, **kwargs)


@pytest.fixture(scope="module")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    return cache(lambda name: written(name, tmp_path_factory.mktemp("source") / "clips"))


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_gives_equal_arrays_of_the_listed_types_and_shapes(
    source_of: Callable[[str], Source], name: str
) -> None:
    source = source_of(name)
    listing = source.listing()
    assert not listing.bad
    assert [clip.key for clip in listing.clips] == list(CLIPS)
    assert {clip.partition for clip in listing.clips} == {"all"}
    for clip in listing.clips:
        arrays = source.read(clip)
        assert same(arrays, dict(CLIPS[clip.key]))
        assert {field: (spec.dtype, spec.shape) for field, spec in clip.arrays.items()} == {
            field: (array.dtype.name, array.shape) for field, array in arrays.items()
        }


@pytest.mark.requires("zarr")
def test_every_source_reads_the_same_in_another_process(source_of: Callable[[str], Source]) -> None:
    # A fresh interpreter shares nothing with this one; one for all, because starting it takes longest.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        for name in LAYOUTS:
            source = source_of(name)
            clip = source.listing().clips[3]
            assert same(executor.submit(source.read, clip).result(timeout=60), dict(CLIPS[clip.key]))


@pytest.mark.requires("zarr")
def test_zarr_reads_in_a_forked_process_too(source_of: Callable[[str], Source]) -> None:
    source = source_of("zarr v3, sharded")
    clip = source.listing().clips[1]
    assert same(source.read(clip), dict(CLIPS[clip.key]))
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as executor:
        assert same(executor.submit(source.read, clip).result(timeout=60), dict(CLIPS[clip.key]))


@pytest.mark.parametrize("name", NAMES)
def test_a_source_is_small_when_pickled_and_lists_the_same_again(source_of: Callable[[str], Source], name: str) -> None:
    source = source_of(name)
    listing = source.listing()
    source.read(listing.clips[0])
    packed = pickle.dumps(source)
    assert len(packed) < 2_000
    assert pickle.loads(packed).listing() == listing


@pytest.mark.parametrize("name", [name for name in NAMES if name.values != ("features folder",)])
def test_a_clip_whose_files_changed_since_the_listing_is_not_read(tmp_path: Path, name: str) -> None:
    source = written(name, tmp_path / "clips")
    clip = source.listing().clips[2]
    changed = {key: {field: array + 1 for field, array in arrays.items()} for key, arrays in CLIPS.items()}
    shutil.rmtree(tmp_path / "clips")
    written(name, tmp_path / "clips", changed)
    for path in (tmp_path / "clips").rglob("*"):
        # Two writes within one tick of the file system's clock look alike.
        os.utime(path, ns=(0, 10**18))
    with pytest.raises(DataError, match=f"clip {clip.key}: its files have changed since it was listed"):
        pickle.loads(pickle.dumps(source)).read(clip)


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_whose_file_is_gone_is_named(tmp_path: Path, name: str) -> None:
    source = written(name, tmp_path / "clips")
    clip = source.listing().clips[2]
    for path in (tmp_path / "clips").rglob("*"):
        if path.is_file() and path.suffix not in (".jsonl", ".csv"):
            path.unlink()
    with pytest.raises(DataError, match=r"is missing|is gone|holds no") as caught:
        source.read(clip)
    assert str(tmp_path / "clips") in str(caught.value)
