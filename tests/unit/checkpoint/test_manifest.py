from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hopescale.checkpoint.manifest import (
    FORMAT,
    MANIFEST_FILE,
    describe,
    file_sha256,
    read_manifest,
    verify,
    write_json,
    write_manifest,
)
from hopescale.errors import CheckpointError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A committed folder of two files."""
    folder = tmp_path / "step-000000001"
    folder.mkdir()
    for name, content in (("rank-00000.bin", bytes(range(256))), ("tensors.json", b"{}")):
        (folder / name).write_bytes(content)
    write_manifest(folder, {p.name: describe(p) for p in folder.iterdir()}, {"state": {"step": 1}})
    return folder


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / "rank-00000.bin").read_bytes())
    content[100] ^= 1
    (folder / "rank-00000.bin").write_bytes(content)


def link_to_the_same_bytes(folder: Path) -> None:
    moved = folder.parent / "elsewhere.bin"
    (folder / "rank-00000.bin").rename(moved)
    (folder / "rank-00000.bin").symlink_to(moved)


def replace_by_a_folder(folder: Path) -> None:
    (folder / "rank-00000.bin").unlink()
    (folder / "rank-00000.bin").mkdir()


def edit(folder: Path, change: Callable[[dict], None]) -> None:
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    change(manifest)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


def outside(folder: Path) -> None:
    path = folder.parent / "outside.bin"
    path.write_bytes(b"x")
    edit(folder, lambda manifest: manifest["files"].update({"../outside.bin": describe(path)}))


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (flip_a_byte, "another sha256 in rank-00000.bin"),
    (lambda f: (f / "rank-00000.bin").unlink(), "lacks the file rank-00000.bin"),
    (replace_by_a_folder, "lacks the file rank-00000.bin"),
    (link_to_the_same_bytes, "lacks the file rank-00000.bin"),
    (lambda f: (f / "extra.bin").write_bytes(b""), "does not list: extra.bin"),
    (lambda f: (f / "tensors.json").write_bytes(b"{} "), "has 3 bytes in tensors.json, the manifest says 2"),
    (lambda f: os.truncate(f / "rank-00000.bin", 10), "has 10 bytes in rank-00000.bin"),
    (lambda f: (f / MANIFEST_FILE).unlink(), "never committed"),
    (lambda f: (f / MANIFEST_FILE).write_text("{"), "not JSON"),
    (lambda f: (f / MANIFEST_FILE).write_bytes(b"\xff\xfe"), "not JSON"),
    (lambda f: (f / MANIFEST_FILE).write_text("[]"), f"not of format {FORMAT}"),
    (lambda f: edit(f, lambda m: m.update(format=99)), f"not of format {FORMAT}"),
    (outside, "lacks the file ../outside.bin"),
]


def test_a_whole_checkpoint_verifies(checkpoint: Path) -> None:
    manifest = verify(checkpoint)
    assert manifest["format"] == FORMAT
    assert manifest["state"] == {"step": 1}
    assert manifest["files"]["tensors.json"] == [2, hashlib.sha256(b"{}").hexdigest()]


@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_damage_is_found_and_named(checkpoint: Path, damage: Callable[[Path], object], words: str) -> None:
    damage(checkpoint)
    with pytest.raises(CheckpointError) as caught:
        verify(checkpoint)
    (problem,) = caught.value.problems
    assert words in problem.rule
    assert str(checkpoint) in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("files"),
        lambda m: m.update(files=["rank-00000.bin", "tensors.json"]),
        lambda m: m["files"].update({"tensors.json": [2]}),
        lambda m: m["files"].update({"tensors.json": None}),
    ],
    ids=["no files", "files without hashes", "a size without a hash", "neither size nor hash"],
)
def test_a_manifest_of_another_structure_is_damage_too(checkpoint: Path, change: Callable[[dict], None]) -> None:
    edit(checkpoint, change)
    with pytest.raises(CheckpointError):
        verify(checkpoint)


def test_a_file_is_hashed_whole(tmp_path: Path) -> None:
    path = tmp_path / "big"
    content = b"hopescale" * 300_000
    path.write_bytes(content)
    assert file_sha256(path) == hashlib.sha256(content).hexdigest()


def test_json_is_replaced_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status.json"
    write_json(path, {"step": 1})
    write_json(path, {"step": 2})
    assert json.loads(path.read_text()) == {"step": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]

    def full(handle: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_json(path, {"step": 3})
    assert json.loads(path.read_text()) == {"step": 2}


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    write_json(path, {"step": 1})
    with pytest.raises(TypeError):
        write_json(path, {"step": object()})
    assert json.loads(path.read_text()) == {"step": 1}


def test_the_manifest_is_durable_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("sync"), fsync(handle))[1])
    monkeypatch.setattr(Path, "rename", lambda self, target: (events.append("rename"), rename(self, target))[1])
    write_json(tmp_path / "a.json", {})
    assert events == ["sync", "rename", "sync"]


def test_reading_a_manifest_does_not_verify_it(checkpoint: Path) -> None:
    flip_a_byte(checkpoint)
    assert read_manifest(checkpoint)["state"] == {"step": 1}
