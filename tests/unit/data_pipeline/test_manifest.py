from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from data_pipeline.dataset.manifest import load_manifest
from data_pipeline.dataset.use import check_use
from data_pipeline.errors import DataError
from data_pipeline.reader.clips import ClipReader
from data_pipeline.schema import DataConfig
from data_pipeline.shard.run import shard


def _edit(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        document = json.loads((folder / "manifest.json").read_text())
        change(document)
        (folder / "manifest.json").write_text(json.dumps(document))

    return apply


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "does not exist"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"),
    "half a manifest": (lambda folder: (folder / "manifest.json").write_text('{"format": 1'), "not readable as JSON"),
    "a list": (lambda folder: (folder / "manifest.json").write_text("[]"), "format=None"),
    "newer format": (_edit(lambda m: m.update(format=9)), "reads format 2"),
    "no fingerprint": (_edit(lambda m: m.pop("fingerprint")), "Field required"),
    "odd mode": (_edit(lambda m: m["provenance"].update(encode_mode="joint")), "encode_mode"),
    "shard gone": (lambda folder: (folder / "shards" / "train-000001.tar").unlink(), "the shard is missing"),
    "shard cut": (
        lambda folder: (folder / "shards" / "train-000001.tar").write_bytes(b"x" * 512),
        "has 512 bytes, the manifest says",
    ),
    "shard elsewhere": (_edit(lambda m: m["shards"][0].update(name="../../x.tar")), "not a shard's file name"),
    "index elsewhere": (_edit(lambda m: m["files"].update({"../x.npy": "0"})), "not a file of a data set"),
    "index not listed": (_edit(lambda m: m["files"].pop("index/uid.npy")), "does not list"),
    "index changed": (lambda folder: (folder / "index" / "uid.npy").write_bytes(b"x"), "sha256 differs"),
    "keys gone": (lambda folder: (folder / "keys.txt").unlink(), "the file is missing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_with_field_rule_and_fix(dataset: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    damage, expected = DAMAGE[name]
    damage(copy)
    with pytest.raises(DataError) as caught:
        load_manifest(copy)
    text = str(caught.value)
    assert expected in text
    assert "data.path" in text
    assert "Fix: " in text
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"view": ["bse"]}, "did you mean base?"),
        ({"view": []}, "must name each partition once"),
        ({"view": ["ice", "ice"]}, "must name each partition once"),
        ({"frames": 6}, "the longest clip has 5 frames"),
    ],
)
def test_settings_that_do_not_fit_are_refused(dataset: Path, settings: dict, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        ClipReader(DataConfig(path=str(dataset), **settings), split="train", seed=0)
    assert expected in str(caught.value)


def test_an_empty_partition_in_the_view_is_refused(dataset: Path) -> None:
    manifest = load_manifest(dataset)
    manifest.partitions["ice"]["heldout"] = 0
    check_use(manifest, DataConfig(view=("ice",)), "train")
    with pytest.raises(DataError, match="no heldout clips"):
        check_use(manifest, DataConfig(view=("ice",)), "heldout")
    check_use(manifest, DataConfig(), "heldout")


@pytest.mark.parametrize("mode", ["clip", "unknown"])
def test_leaky_features_need_permission(features_writer: Callable[..., Path], tmp_path: Path, mode: str) -> None:
    manifest = shard(features_writer(tmp_path / "features", per_split=1, mode=mode), tmp_path / "out")
    with pytest.raises(DataError, match=r"data\.allow_leaky_features=true"):
        check_use(manifest, DataConfig(), "train")
    check_use(manifest, DataConfig(allow_leaky_features=True), "train")


def test_unknown_or_mistyped_settings_are_refused() -> None:
    for settings in ({"pth": "x"}, {"allow_leaky_features": "yes"}, {"frames": 1}, {"view": "base"}):
        with pytest.raises(ValidationError):
            DataConfig(**settings)  # pyright: ignore[reportArgumentType]
    assert all(field.description for field in DataConfig.model_fields.values())
