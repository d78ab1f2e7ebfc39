from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.dataset.index import Index
from data_pipeline.dataset.manifest import load_manifest
from data_pipeline.dataset.use import check_use
from data_pipeline.dataset.view import View, open_view
from data_pipeline.errors import DataError
from data_pipeline.schema import DataConfig, Manifest
from tests.small_dataset import rewrite_manifest, write_dataset

LENGTHS = (3, 5, 9, 4)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder, clips=8, heldout=2, lengths=LENGTHS)
    return folder


def _view(folder: Path, **config: Any) -> View:
    settings = DataConfig.model_validate({"path": str(folder), **config})
    manifest = load_manifest(folder)
    check_use(manifest, settings, "train")
    return open_view(Index(folder, manifest), manifest, settings, "train")


def _keys(view: View) -> list[str]:
    return [view.key(row) for row in range(len(view))]


def test_without_settings_every_training_clip_is_in(dataset: Path) -> None:
    view = _view(dataset)
    assert _keys(view) == [f"{name}-train-{n:05d}" for name in ("base", "ice") for n in range(8)]
    assert view.lengths.tolist() == list(LENGTHS) * 4
    assert [view.partition(row) for row in range(16)] == ["base"] * 8 + ["ice"] * 8
    assert not view.windowed


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({"view": ["ice"]}, lambda key, length: key.startswith("ice")),
        ({"select": {"keys": "*-0000[13]"}}, lambda key, length: key[-1] in "13"),
        ({"select": {"first_key": "base-train-00006"}}, lambda key, length: key >= "base-train-00006"),
        ({"select": {"end_key": "ice-train-00002"}}, lambda key, length: key < "ice-train-00002"),
        ({"select": {"min_frames": 4}}, lambda key, length: length >= 4),
        ({"select": {"max_frames": 4}}, lambda key, length: length <= 4),
        ({"select": {"min_frames": 4, "max_frames": 5, "keys": "base*"}}, lambda k, n: k[0] == "b" and 4 <= n <= 5),
    ],
)
def test_selections_keep_what_they_say(dataset: Path, config: dict[str, Any], kept: Any) -> None:
    whole, part = _view(dataset), _view(dataset, **config)
    expected = [key for key, length in zip(_keys(whole), whole.lengths.tolist(), strict=True) if kept(key, length)]
    assert _keys(part) == expected
    assert 0 < len(expected) < 16
    assert part.digest != whole.digest


@settings(deadline=None, max_examples=30)
@given(frames=st.integers(2, 9), stride=st.integers(1, 6))
def test_windows_cover_each_clip_at_their_stride(dataset: Path, frames: int, stride: int) -> None:
    view = _view(dataset, window={"frames": frames, "stride": stride})
    expected = [
        f"{name}-train-{n:05d}@{start}"
        for name in ("base", "ice")
        for n in range(8)
        for start in range(0, LENGTHS[n % 4] - frames + 1, stride)
    ]
    assert [
        f"{view.index.key(int(clip))}@{start}" for clip, start in zip(view.clips, view.starts, strict=True)
    ] == expected
    assert set(view.lengths.tolist()) == {frames}
    assert len(set(view.uids.tolist())) == len(view)


def test_a_skip_list_leaves_clips_out(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "skip.txt").write_text("base-train-00003\nice-heldout-00000\n")
    view = _view(dataset, skip_list=str(tmp_path / "skip.txt"))
    assert set(_keys(_view(dataset))) - set(_keys(view)) == {"base-train-00003"}
    (tmp_path / "skip.txt").write_text("no-such-clip\n")
    with pytest.raises(DataError, match="no-such-clip"):
        _view(dataset, skip_list=str(tmp_path / "skip.txt"))
    with pytest.raises(DataError, match=r"data\.skip_list.*cannot be read"):
        _view(dataset, skip_list=str(tmp_path / "absent.txt"))


def test_the_digest_is_that_of_the_samples_however_they_are_named(dataset: Path, tmp_path: Path) -> None:
    assert _view(dataset, view=["ice", "base"]).digest == _view(dataset).digest
    assert _view(dataset, select={"keys": "base*"}).digest == _view(dataset, view=["base"]).digest
    assert _view(dataset, frames=3).digest != _view(dataset).digest
    write_dataset(tmp_path, clips=8, heldout=2, lengths=LENGTHS, clips_per_shard=5)
    assert _view(tmp_path).digest == _view(dataset).digest


def test_an_empty_selection_is_an_error(dataset: Path) -> None:
    with pytest.raises(DataError, match="leaves no train clip of 20"):
        _view(dataset, select={"keys": "nothing*"})


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"view": ["base", "base"]}, "must name each partition once"),
        ({"view": ["bsae"]}, "did you mean base"),
        ({"order_shards": 4}, r"data\.order_shards=4: has no effect"),
        ({"mixture_block": 7}, r"data\.mixture_block=7: has no effect"),
        ({"staging": {"max_bytes": 5}}, r"data\.staging\.max_bytes=5: has no effect"),
        ({"reader": {"max_bad_fraction": 0.5}}, r"data\.reader\.max_bad_fraction=0\.5: has no effect"),
        (
            {"mixture": [{"view": ["base"], "weight": 1.0}, {"view": ["base"], "weight": 2.0}]},
            r"data\.mixture\.1\.view=\['base'\]: another part draws from the same clips.*weight 3",
        ),
        ({"mixture": [{"view": ["bace"], "weight": 1.0}]}, r"data\.mixture\.0\.view=bace.*did you mean base"),
        ({"view": ["base"], "mixture": [{"view": ["ice"], "weight": 1.0}]}, r"data\.mixture\.0\.view=ice"),
        (
            {"mixture": [{"view": ["base"], "weight": 1.0}, {"view": ["ice"], "weight": 0.001}]},
            r"data\.mixture_block=100.*without a clip",
        ),
        ({"mixture": [{"view": ["base"], "weight": 1.0}], "tail": "drop"}, r"data\.tail=drop"),
        ({"frames": 10}, r"data\.frames=10.*9 frames"),
        ({"window": {"frames": 4}, "frames": 5}, r"data\.frames=5.*a window has 4"),
        ({"window": {"frames": 10}}, r"data\.window\.frames=10"),
        ({"window": {"frames": 4}, "action_alignment": "row1-to-row0"}, r"data\.window=4.*row1-to-row0"),
    ],
)
def test_settings_that_do_not_fit_are_named(dataset: Path, config: dict[str, Any], named: str) -> None:
    with pytest.raises(DataError, match=named):
        _view(dataset, **config)


def _changed(manifest: Manifest, tmp_path: Path, **provenance: Any) -> Path:
    write_dataset(tmp_path, clips=8, heldout=2, lengths=LENGTHS)
    entries = vars(manifest.provenance) | provenance
    rewrite_manifest(tmp_path, provenance=entries | {"grid": list(entries["grid"])})
    return tmp_path


def test_windows_of_features_that_know_other_frames_are_refused(dataset: Path, tmp_path: Path) -> None:
    folder = _changed(load_manifest(dataset), tmp_path, encode_mode="prefix")
    with pytest.raises(DataError, match=r"data\.window=4.*encode_mode prefix"):
        _view(folder, window={"frames": 4})
    assert len(_view(folder)) == 16


@pytest.mark.parametrize("mode", ["clip", "unknown"])
def test_leaky_features_must_be_allowed(dataset: Path, tmp_path: Path, mode: str) -> None:
    folder = _changed(load_manifest(dataset), tmp_path, encode_mode=mode)
    with pytest.raises(DataError, match=r"data\.allow_leaky_features=False"):
        _view(folder)
    assert len(_view(folder, allow_leaky_features=True)) == 16


def test_all_problems_are_named_at_once(dataset: Path) -> None:
    with pytest.raises(DataError) as caught:
        _view(dataset, view=["bsae"], frames=10, order_shards=3)
    assert len(caught.value.problems) >= 3


def test_shards_follow_the_index(dataset: Path) -> None:
    view = _view(dataset, view=["ice"])
    assert view.shards.tolist() == np.load(dataset / "index" / "shard.npy")[view.clips].tolist()
