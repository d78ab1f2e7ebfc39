from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hopescale.cli import app
from hopescale.data_commands import encode_pixels
from hopescale.errors import UserError
from tests.unit.data_pipeline.encode.small_inputs import PATCH_MEANS, contents, write_pixels

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pixels(tmp_path_factory.mktemp("pixels") / "p", [4, 4, 4])


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def _no_bar(label: str) -> Callable[[int, int], None]:
    return lambda done, total: None


def test_settings_and_options_mean_the_same(pixels: Path, tmp_path: Path) -> None:
    shared = ["weights=2", "mode=prefix", "dtype=float32", "batch_frames=8", "size=16", "alignment=pair-mean"]
    written = CliRunner().invoke(
        app, ["data", "encode", str(pixels), str(tmp_path / "a"), f"encoder={PATCH_MEANS}", *shared, "--json"]
    )
    assert written.exit_code == 0
    result = json.loads(written.output.splitlines()[-1])
    assert (result["clips"], result["skipped"], result["part"]) == (3, [], [0, 1])
    options = ["--encoder", PATCH_MEANS, "--weights", "2"]
    again = CliRunner().invoke(
        app, ["data", "encode", str(pixels), str(tmp_path / "b"), *options, *shared[1:], "--json"]
    )
    assert json.loads(again.output.splitlines()[-1])["digest"] == result["digest"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["frames=many"], "frames=many: must be of type int. Fix: write it like frames=16"),
        (["fps=[4]"], "fps=[4]: must be of type float"),
        (["weight=x"], "did you mean weights?"),
        (["progress=1"], "is not a setting of this command"),
        (["dtype=float32", "dtype=float16"], "is given twice"),
        (["part=3"], "part=3: must be i/n with i from 0 to n - 1"),
        (["part=2/2"], "part=2/2: must be i/n"),
        (["fps=4"], "fps=4.0: is for videos"),
    ],
)
def test_mistyped_settings_are_explained(pixels: Path, tmp_path: Path, settings: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        encode_pixels(pixels, tmp_path / "out", settings, _no_bar)
    assert expected in str(caught.value)


def test_each_rank_of_a_launch_encodes_a_part(pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [f"encoder={PATCH_MEANS}", "batch_frames=4"]
    encode_pixels(pixels, tmp_path / "alone", settings, _no_bar)
    labels: list[str] = []

    def bar(label: str) -> Callable[[int, int], None]:
        labels.append(label)
        return _no_bar(label)

    for rank in range(2):
        for name, value in zip(LAUNCHER, (rank, rank, 2, 2), strict=True):
            monkeypatch.setenv(name, str(value))
        result = encode_pixels(pixels, tmp_path / "out", settings, bar)
        assert result["part"] == [rank, 2]
        assert (result["digest"] is None) == (rank == 0)
    assert labels == ["encode"]
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    with pytest.raises(UserError, match="the launcher has started 2 ranks"):
        encode_pixels(pixels, tmp_path / "out", [*settings, "part=0/2"], bar)


def test_the_command_says_that_other_parts_are_missing(pixels: Path, tmp_path: Path) -> None:
    arguments = ["data", "encode", str(pixels), str(tmp_path / "out"), f"encoder={PATCH_MEANS}", "part=0/2"]
    first = CliRunner().invoke(app, arguments)
    assert "part 0 of 2 is done" in first.output


def test_ranks_of_a_launch_do_not_share_a_gpu(pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(LAUNCHER, (1, 1, 2, 2), strict=True):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="device=cuda:0: the launcher has started 2 ranks"):
        encode_pixels(pixels, tmp_path / "out", ["device=cuda:0"], _no_bar)
