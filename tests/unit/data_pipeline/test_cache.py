from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.cache import cached_folder, content_key, write_json
from data_pipeline.pixels.simulate import SimulationSpec


def test_key_changes_with_every_part_and_not_otherwise() -> None:
    key = content_key("a", 1, SimulationSpec(), {"x": 1, "y": 2})
    assert len(key) == 12
    assert int(key, 16) >= 0
    assert key == content_key("a", 1, SimulationSpec(), {"y": 2, "x": 1})
    others = {content_key("a", 2), content_key("a1"), content_key("a", 1), content_key("a", 1, SimulationSpec(seed=1))}
    assert len(others | {key}) == 5
    with pytest.raises(TypeError, match="no canonical JSON form"):
        content_key({1, 2})


def test_folder_is_built_once(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "file").write_text("content")

    folder, found = cached_folder(tmp_path / "cache", "features", "abc", build)
    assert not found
    assert (folder / "file").read_text() == "content"
    assert folder.name == "features-abc"
    assert cached_folder(tmp_path / "cache", "features", "abc", build) == (folder, True)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["features-abc"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "file").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached_folder(tmp_path, "features", "abc", build)
    assert list(tmp_path.iterdir()) == []


def test_losing_a_race_returns_the_winner(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        winner = tmp_path / "features-abc"
        winner.mkdir()
        (winner / "file").write_text("first")

    folder, _ = cached_folder(tmp_path, "features", "abc", build)
    assert (folder / "file").read_text() == "first"


def test_json_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert path.read_text() == '{\n "a": 2\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
