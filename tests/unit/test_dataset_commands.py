from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from data_pipeline.errors import DataError
from hopescale.cli import app
from hopescale.errors import ConfigError
from tests.small_dataset import write_dataset


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    write_dataset(folder, lengths=(2, 20), tokens=6, state_dim=2)
    return folder


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "copy")


def _run(*arguments: object, code: int = 0) -> tuple[str, dict[str, Any]]:
    """Run a command with --json and return what it prints, and the object in its last line."""
    result = CliRunner().invoke(app, ["data", *map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == code
    return result.stdout, json.loads(result.stdout.splitlines()[-1])


def _flip(folder: Path, row: int) -> str:
    """Change a bit of a clip's features, and return its key."""
    offset = int(np.load(folder / "index" / "features_offset.npy")[row])
    path = folder / "shards" / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    return (folder / "keys.txt").read_text().split()[row]


@pytest.mark.parametrize("level", ["quick", "crc", "full"])
def test_verify_says_sound_with_code_0(original: Path, level: str) -> None:
    text, report = _run("verify", original, f"level={level}", "--workers", 2)
    assert "sound" in text
    assert (report["state"], report["level"], report["findings"]) == ("sound", level, [])


def test_verify_lists_damage_with_code_1_and_writes_the_skip_list(copy: Path, tmp_path: Path) -> None:
    key, skip = _flip(copy, 1), tmp_path / "skip.txt"
    text, report = _run("verify", copy, "--quarantine", skip, code=1)
    assert "damaged: 1 findings" in text
    assert key in text
    assert report["state"] == "damaged"
    assert report["damaged_clips"] == [key]
    assert {"kind", "text", "shard", "clip", "field", "offset", "expected", "actual"} == report["findings"][0].keys()
    assert skip.read_text() == f"{key}\n"
    text, report = _run("verify", copy, "--repair", code=1)
    assert "train-000000.tar: not made again" in text
    assert list(report["not_repaired"]) == ["train-000000.tar"]


def test_verify_says_what_is_no_data_set_with_code_2(tmp_path: Path) -> None:
    text, report = _run("verify", tmp_path, code=2)
    assert "error: dataset=" in text
    assert report["state"] == "unusable"
    assert report["problems"][0].keys() == {"field", "value", "rule", "fix"}


@pytest.mark.parametrize("command", ["verify", "inspect", "index"])
def test_unknown_settings_are_refused_with_the_nearest_name(original: Path, command: str) -> None:
    with pytest.raises(ConfigError, match="is not a setting of this command"):
        _run(command, original, "levle=crc")


def test_index_makes_a_data_set_of_tars(copy: Path) -> None:
    folder = copy / "shards"
    text, result = _run("index", folder, "workers=2", "statistics=all")
    assert "manifest.json" in {path.name for path in folder.iterdir()}
    assert (result["out"], result["clips"]) == (str(folder), 16)
    assert result["encode_mode"] == "per-frame"
    assert _run("verify", folder, "level=full")[1]["state"] == "sound"
    with pytest.raises(DataError, match="replace=true"):
        _run("index", folder)
    assert _run("index", folder, "replace=true")[1]["fingerprint"] == result["fingerprint"]
    with pytest.raises(DataError, match="leave the rules out"):
        _run("index", folder, "replace=true", "partitions=base=*")
    assert text


def test_inspect_describes_the_data_set_and_one_clip(original: Path) -> None:
    result = CliRunner().invoke(app, ["data", "inspect", str(original)], catch_exceptions=False)
    for expected in ("16 in 4 tar shards", "per-frame", "crc32", "heldout", "as-is", "float16"):
        assert expected in result.stdout
    _, found = _run("inspect", original)
    assert found["partitions"]["ice"] == {"train": 6, "heldout": 2, "frames": 88}
    key = (original / "keys.txt").read_text().split()[3]
    result = CliRunner().invoke(app, ["data", "inspect", str(original), f"key={key}"], catch_exceptions=False)
    assert key in result.stdout
    _, found = _run("inspect", original, f"key={key}")
    assert found["fields"]["features"]["shape"] == [20, 6, 16]
    with pytest.raises(DataError, match="no clip has this key"):
        _run("inspect", original, "key=x")


@pytest.mark.requires("demo")
def test_inspect_draws_a_tile_for_each_frame(original: Path, tmp_path: Path) -> None:
    from PIL import Image

    from hopescale.report.clip_strip import MAX_FRAMES, clip_strip

    _, found = _run("inspect", original, "--png", tmp_path / "all.png")
    with Image.open(found["png"]) as picture:
        assert picture.width > picture.height
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20
    clips = [np.random.default_rng(0).normal(size=(frames, 6, 16)) for frames in (2, 40)]
    figure = clip_strip(clips, ["short", "long"], (2, 3))
    assert len(figure.axes) == 2 + MAX_FRAMES
    assert {axes.get_title(loc="center") for axes in figure.axes} >= {"frame 0", "frame 1", "frame 39"}
    with pytest.raises(ConfigError, match="cannot be written"):
        _run("inspect", original, "--png", tmp_path / "nowhere" / "x.png")


@pytest.mark.requires("demo")
def test_equal_features_have_equal_colours_in_every_tile(original: Path) -> None:
    from hopescale.report.clip_strip import clip_strip

    draw = np.random.default_rng(0)
    one, other = draw.normal(size=(2, 6, 16)), draw.normal(size=(2, 6, 16))
    other[1] = one[0]
    tiles = [axes.images[0].get_array() for axes in clip_strip([one, other], ["a", "b"], (2, 3)).axes]
    images = [tile for tile in tiles if tile is not None]
    assert len(images) == 4
    np.testing.assert_array_equal(images[0], images[3])
    assert not np.array_equal(images[0], images[1])


def test_a_quarantine_list_survives_a_check_that_could_not_be_made(copy: Path, tmp_path: Path) -> None:
    _flip(copy, 1)
    skip = tmp_path / "skip.txt"
    _run("verify", copy, "--quarantine", skip, code=1)
    before = skip.read_bytes()
    column = np.load(copy / "index" / "shard.npy")
    np.save(copy / "index" / "shard.npy", column + 100)
    text, _ = _run("verify", copy, "--quarantine", skip, code=1)
    assert "not written, for the clips were not checked" in text
    assert skip.read_bytes() == before != b""


def test_a_quarantine_list_in_no_folder_is_refused_before_the_work(original: Path, tmp_path: Path) -> None:
    for path, rule in ((tmp_path / "nowhere" / "x", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(ConfigError, match=f"--quarantine=.*{rule}"):
            _run("verify", original, "--quarantine", path)


@pytest.mark.parametrize("command", ["verify", "inspect", "index"])
def test_paths_that_cannot_be_looked_at_are_explained(command: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        _run(command, "x" * 5000)


def test_settings_that_yaml_cannot_read_are_texts_or_refused(original: Path) -> None:
    for key in ("@x", "*x", "["):
        with pytest.raises(DataError, match="no clip has this key"):
            _run("inspect", original, f"key={key}")
    with pytest.raises(ConfigError, match="must be of type tuple"):
        _run("index", original, "partitions=[@x")
    with pytest.raises(DataError, match="a rule is a text"):
        _run("index", original / "shards", "partitions=[1,2]")
