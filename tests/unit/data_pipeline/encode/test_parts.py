from __future__ import annotations

import json
import os
import resource
import signal
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.encode import journal
from data_pipeline.encode.journal import Part
from data_pipeline.encode.run import encode
from data_pipeline.errors import DataError
from tests.unit.data_pipeline.encode.small_inputs import (
    ENCODED,
    PATCH_MEANS,
    contents,
    random_frames,
    save_vjepa2,
    write_pixels,
)

LENGTHS = [3, 2, 4, 3, 6, 2, 2, 5, 3]
SETTINGS: dict[str, Any] = {"encoder": PATCH_MEANS, "batch_frames": 5}


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pixels(tmp_path_factory.mktemp("pixels") / "p", LENGTHS)


@pytest.fixture(scope="module")
def whole(pixels: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process that is never stopped writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    encode(pixels, out, **SETTINGS)
    return contents(out)


def _fork(work: Callable[[], object]) -> int:
    """Run something in a forked process; its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _ended(child: int) -> int:
    """Exit status of a forked process, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _killed_at_rename(number: int, work: Callable[[], object]) -> Callable[[], None]:
    """Work that is killed when it is about to give a file its final name for the n-th time."""

    def run() -> None:
        rename, left = os.rename, number

        def counted(*names: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*names)

        os.rename = counted
        work()

    return run


def test_a_killed_run_goes_on_to_the_same_bytes(
    pixels: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_FLUSH_CLIPS", 2)
    kills, repeated = 0, []
    for number in range(1, 100):
        out = tmp_path / str(number)
        status = _ended(_fork(_killed_at_rename(number, partial(encode, pixels, out, **SETTINGS))))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        assert not (out / "features.json").exists()
        ENCODED.clear()
        encode(pixels, out, **SETTINGS)
        assert contents(out) == whole
        kills += 1
        repeated.append(sum(ENCODED))
    # The plan, the journal, each clip, the part and features.json have each been cut short once.
    assert kills == len(LENGTHS) + 4
    assert repeated[0] == sum(LENGTHS)
    assert repeated[-2:] == [0, 0]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_parts_in_any_order_make_the_same_folder(
    pixels: Path, whole: dict[str, bytes], tmp_path: Path, order: tuple[int, ...]
) -> None:
    for index in order[:-1]:
        own = encode(pixels, tmp_path / "out", **SETTINGS, part=(index, 3))
        assert "digest" not in own
        assert own["part"] == f"{index}-of-3"
        assert not (tmp_path / "out/features.json").exists()
    last = encode(pixels, tmp_path / "out", **SETTINGS, part=(order[-1], 3))
    assert [clip["key"] for clip in last["clips"]] == [f"clip_{index}" for index in range(len(LENGTHS))]
    assert contents(tmp_path / "out") == whole
    ENCODED.clear()
    assert encode(pixels, tmp_path / "out", **SETTINGS, part=(0, 3)) == last
    assert ENCODED == []


def test_parts_at_the_same_time_make_the_same_folder(pixels: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    works = [partial(encode, pixels, tmp_path / "out", **SETTINGS, part=(index, 4)) for index in range(4)]
    children = [_fork(work) for work in works]
    assert [_ended(child) for child in children] == [0] * 4
    assert contents(tmp_path / "out") == whole


def test_another_number_of_parts_takes_over_what_is_done(pixels: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    encode(pixels, tmp_path / "out", **SETTINGS, part=(1, 2))
    ENCODED.clear()
    encode(pixels, tmp_path / "out", **SETTINGS)
    assert 0 < sum(ENCODED) < sum(LENGTHS)
    assert contents(tmp_path / "out") == whole


def test_a_damaged_clip_of_a_half_done_folder_is_encoded_again(
    pixels: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    encode(pixels, out, **SETTINGS, part=(0, 2))
    cut = next(out.glob("base/*.npz"))
    cut.write_bytes(cut.read_bytes()[:100])
    with next(out.glob("parts/*.journal")).open("a") as file:
        file.write('{"key": "clip_8", "part')
    encode(pixels, out, **SETTINGS, part=(0, 2))
    encode(pixels, out, **SETTINGS, part=(1, 2))
    assert contents(out) == whole


def test_one_process_at_a_time_has_a_part(pixels: Path, tmp_path: Path) -> None:
    encode(pixels, tmp_path / "out", **SETTINGS, part=(0, 2))
    with Part(tmp_path / "out", 1, 2), pytest.raises(DataError, match="another process is encoding part 1-of-2"):
        encode(pixels, tmp_path / "out", **SETTINGS, part=(1, 2))
    encode(pixels, tmp_path / "out", **SETTINGS, part=(1, 2))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"mode": "clip"}, "encode_mode=clip: .* begun with encode_mode=per-frame"),
        ({"dtype": "float32"}, "dtype=float32"),
        ({"size": 16}, "preprocessing=.*begun with preprocessing=x / 255"),
        ({"batch_frames": 6}, "batch_frames=6: .* begun with batch_frames=5"),
    ],
)
def test_other_settings_are_refused_by_name(
    pixels: Path, tmp_path: Path, parts: int, changed: dict, expected: str
) -> None:
    encode(pixels, tmp_path / "out", **SETTINGS, part=(0, parts))
    with pytest.raises(DataError, match=expected):
        encode(pixels, tmp_path / "out", **{**SETTINGS, **changed}, part=(0, parts))


def test_other_clips_and_other_weights_are_refused(pixels: Path, tmp_path: Path) -> None:
    encode(pixels, tmp_path / "out", **SETTINGS, part=(0, 2))
    other = write_pixels(tmp_path / "other", LENGTHS, clip_2=random_frames(99, 4))
    with pytest.raises(DataError, match=r"input=.*the clips have changed since"):
        encode(other, tmp_path / "out", **SETTINGS, part=(0, 2))


@pytest.mark.requires("encode")
def test_changed_weights_are_refused(pixels: Path, tmp_path: Path) -> None:
    save_vjepa2(tmp_path / "weights")
    settings: dict[str, Any] = {"encoder": "vjepa2", "weights": str(tmp_path / "weights")}
    encode(pixels, tmp_path / "out", **settings, part=(0, 2))
    save_vjepa2(tmp_path / "weights", seed=1)
    with pytest.raises(DataError, match="weights_sha256="):
        encode(pixels, tmp_path / "out", **settings, part=(1, 2))


def test_a_folder_with_something_else_is_refused_untouched(pixels: Path, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(DataError, match="must be new or empty"):
        encode(pixels, tmp_path, **SETTINGS)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["parts", "thesis.tex"]


def test_a_full_disk_is_named_and_nothing_is_lost(pixels: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    def fill() -> None:
        # No file may get longer than this: the plan and the short clips fit.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
        with pytest.raises(DataError, match=r"out=.*cannot be written \(File too large\).*it goes on where it was"):
            encode(pixels, tmp_path / "out", **SETTINGS)
        assert not list((tmp_path / "out").rglob("*.tmp"))

    assert _ended(_fork(fill)) == 0
    assert list((tmp_path / "out").glob("base/*.npz"))
    encode(pixels, tmp_path / "out", **SETTINGS)
    assert contents(tmp_path / "out") == whole


def test_the_document_of_a_part_says_what_is_done(pixels: Path, tmp_path: Path) -> None:
    encode(pixels, tmp_path / "out", **SETTINGS, part=(1, 2))
    document = json.loads((tmp_path / "out/parts/1-of-2.json").read_text())
    lines = (tmp_path / "out/parts/1-of-2.journal").read_text().splitlines()
    assert [json.loads(line) for line in lines] == document["clips"]
    for record in document["clips"]:
        path = tmp_path / "out/base" / f"{record['key']}.npz"
        assert path.stat().st_size == record["bytes"]
