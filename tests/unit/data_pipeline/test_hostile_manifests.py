from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from data_pipeline.dataset.manifest import MAX_MANIFEST, load_manifest, manifest_digest
from data_pipeline.errors import DataError
from data_pipeline.schema import Manifest
from tests.hostile import allocating_at_most, limited, require_reason
from tests.small_dataset import write_dataset

MUTANTS = 2_000


@pytest.fixture(scope="module")
def dataset() -> Iterator[tuple[Path, Manifest]]:
    """Return a small data set in memory, and its manifest; whoever changes a file puts it back."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    with TemporaryDirectory(prefix="hostile-manifests-", dir=memory if usable else None) as name:
        folder = Path(name)
        yield folder, write_dataset(folder, clips=2, heldout=1, tokens=4, channels=4, state_dim=2, dtype="int8")


def _mutant(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        place, kind = draw.randrange(len(changed) or 1), draw.randrange(6)
        if kind == 0 and changed:
            changed[place % len(changed)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[place:place] = draw.choice((b"0", b"9" * 25, b'"', b"[", b"NaN", b"null", b"\\ud800", b"{" * 999))
        elif kind == 2:
            del changed[place : place + draw.randrange(1, 40)]
        elif kind == 3:
            changed[place : place + 3] = draw.randbytes(3)
        elif kind == 4:
            del changed[place:]
        else:
            changed[place:place] = changed[draw.randrange(len(changed) or 1) :][:60]
    return bytes(changed)


def _changed_values(document: Any, draw: random.Random) -> Any:
    """Return JSON with some values replaced by others, as nobody but a person would."""
    if isinstance(document, dict):
        chosen = draw.choice(list(document)) if document else None
        return {key: _changed_values(value, draw) if key == chosen else value for key, value in document.items()}
    if isinstance(document, list) and document:
        place = draw.randrange(len(document))
        return [_changed_values(value, draw) if n == place else value for n, value in enumerate(document)]
    options: list[Any] = [None, True, -1, 0, 1 << 80, 1.5, "", "../../x", "x" * 1000, [], {}, "\x1b[2J", document]
    return draw.choice([option for option in options if option != document])


def _outcome(folder: Path) -> Manifest | None:
    try:
        with limited(seconds=1):
            return load_manifest(folder)
    except DataError as error:
        require_reason(error)
        return None


def test_mutated_manifests_and_indexes_are_refused_or_the_same(dataset: tuple[Path, Manifest]) -> None:
    folder, manifest = dataset
    draw = random.Random(11)
    others = sorted(manifest.files)
    for number in range(MUTANTS):
        path = folder / ("manifest.json" if number % 2 else draw.choice(others))
        content = path.read_bytes()
        mutant = _mutant(content, draw)
        path.write_bytes(mutant)
        try:
            found = _outcome(folder)
            assert found == manifest if mutant == content else found in (None, manifest)
        except BaseException as error:
            raise AssertionError(f"mutant {number} of {path.name}: {mutant[:3000]!r}") from error
        finally:
            path.write_bytes(content)


def test_values_changed_on_purpose_are_refused_as_long_as_the_digest_is_not_changed_too(
    dataset: tuple[Path, Manifest],
) -> None:
    folder, manifest = dataset
    draw, path = random.Random(12), folder / "manifest.json"
    content = path.read_bytes()
    try:
        for _ in range(300):
            document = _changed_values(json.loads(content), draw)
            path.write_text(json.dumps(document))
            assert _outcome(folder) is None or document["digest"] is None
            # Whoever changes the digest too gets what the rules let through, and nothing else than an error.
            if isinstance(document, dict):
                document["digest"] = manifest_digest({k: v for k, v in document.items() if k != "digest"})
            path.write_text(json.dumps(document))
            found = _outcome(folder)
            assert found is None or (found.tokens, found.dtypes) == (manifest.tokens, manifest.dtypes)
    finally:
        path.write_bytes(content)


LARGE: dict[str, Callable[[Path], object]] = {
    "a manifest of a terabyte": lambda folder: os.truncate(folder / "manifest.json", 1 << 40),
    "keys of a terabyte": lambda folder: os.truncate(folder / "keys.txt", 1 << 40),
    "a column of a terabyte": lambda folder: os.truncate(folder / "index" / "uid.npy", 1 << 40),
    "statistics of a terabyte": lambda folder: os.truncate(folder / "stats.npz", 1 << 40),
    "a deep manifest": lambda folder: (folder / "manifest.json").write_bytes(b"[" * 100_000),
    "a long number": lambda folder: (folder / "manifest.json").write_bytes(b'{"format": ' + b"9" * 100_000 + b"}"),
    "a pipe": lambda folder: (
        (folder / "manifest.json").unlink(),
        os.mkfifo(folder / "manifest.json"),
    ),
    "a pipe of keys": lambda folder: ((folder / "keys.txt").unlink(), os.mkfifo(folder / "keys.txt")),
}


@pytest.mark.parametrize("kind", LARGE)
def test_what_is_large_deep_or_no_file_is_refused_before_it_is_read(
    dataset: tuple[Path, Manifest], tmp_path: Path, kind: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset[0], copy)
    LARGE[kind](copy)
    with limited(seconds=1), allocating_at_most(8 << 20), pytest.raises(DataError):
        load_manifest(copy)


def test_the_largest_manifest_is_named_as_the_limit(dataset: tuple[Path, Manifest], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset[0], copy)
    os.truncate(copy / "manifest.json", MAX_MANIFEST + 1)
    with pytest.raises(DataError, match=f"at most {MAX_MANIFEST} bytes"):
        load_manifest(copy)
