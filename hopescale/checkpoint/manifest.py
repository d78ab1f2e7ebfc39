"""The manifest: a checkpoint exists when its MANIFEST.json does, and is whole when every hash in it agrees.

Imports no torch, so that a verifier runs anywhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipeline.cache import file_sha256, write_json
from hopescale.errors import CheckpointError, Problem

MANIFEST_FILE = "MANIFEST.json"
FORMAT = 1


def describe(path: Path) -> list[Any]:
    """[bytes, sha256] of a file."""
    return [path.stat().st_size, file_sha256(path)]


def write_manifest(folder: Path, files: dict[str, list[Any]], content: dict[str, Any]) -> None:
    """Commit a checkpoint: write the manifest last, durably.

    Args:
        folder: holds exactly the listed files.
        files: name to [bytes, sha256].
        content: everything else a resume needs to know, as JSON values.
    """
    write_json(folder / MANIFEST_FILE, {"format": FORMAT, **content, "files": dict(sorted(files.items()))})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a committed checkpoint.

    Raises:
        CheckpointError: there is none, or it is not ours.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise _broken(folder, f"has no {MANIFEST_FILE}: it was never committed")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise _broken(folder, f"has a {MANIFEST_FILE} that is not JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _broken(folder, f"is not of format {FORMAT}")
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest and return the manifest.

    Raises:
        CheckpointError: a file is missing, is no regular file, or has another size or hash; or an unlisted file lies
            beside them.
    """
    manifest = read_manifest(folder)
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(f, list) and len(f) == 2 for f in files.values()):
        raise _broken(folder, f"has a {MANIFEST_FILE} that lists no files with their bytes and sha256")
    extra = {p.name for p in folder.iterdir()} - {MANIFEST_FILE, *files}
    if extra:
        raise _broken(folder, f"holds files the manifest does not list: {', '.join(sorted(extra))}")
    for name, (size, sha256) in files.items():
        path = folder / name
        if name != Path(name).name or path.is_symlink() or not path.is_file():
            raise _broken(folder, f"lacks the file {name}")
        if path.stat().st_size != size:
            raise _broken(folder, f"has {path.stat().st_size} bytes in {name}, the manifest says {size}")
        if file_sha256(path) != sha256:
            raise _broken(folder, f"has another sha256 in {name} than the manifest says")
    return manifest


def _broken(folder: Path, rule: str) -> CheckpointError:
    return CheckpointError(Problem("checkpoint", folder, rule, "resume from another checkpoint, or delete this one"))
