"""`hopescale data shard` and `hopescale data merge`, up to their settings and what they print."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from data_pipeline.dataset.inspect import InspectedDataset
from data_pipeline.dataset.manifest import load_manifest
from data_pipeline.errors import DataError
from hopescale.cli import app
from hopescale.errors import ConfigError
from hopescale.shard_commands import merge_shards, shard_clips


def _bar(label: str) -> Callable[[int, int], None]:
    return lambda done, total: None


def test_settings_reach_the_sharder(features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["clips_per_shard=5", "dtype=int8", "seed=3", "statistics=sample", "max_error=0.1", "workers=1"]
    result = shard_clips(str(features), tmp_path / "out", settings, _bar)
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.dtypes["features"], manifest.seed, manifest.statistics_share) == ("int8", 3, 0.125)
    assert result["clips"] == 28
    assert result["fingerprint"] == manifest.fingerprint
    assert result["conversion"]["from_dtype"] == "float16"
    assert [shard["num_clips"] for shard in result["shards"]] == [5, 5, 4, 5, 5, 4]
    output = capsys.readouterr()
    assert "features: float16 was stored as int8; relative error" in output.out
    assert "shard: 28 clips in 6 shards" in output.err


def test_parts_are_completed_by_a_merge(features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in range(3):
        result = shard_clips(str(features), tmp_path, ["clips_per_shard=5", f"part={part}/3"], _bar)
        assert result["part"] == f"{part}/3"
        assert f"part {part}/3 is done; `hopescale data merge {tmp_path}`" in capsys.readouterr().out
    assert merge_shards(tmp_path)["clips"] == merge_shards(tmp_path)["clips"] == 28


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = shard_clips(str(features), tmp_path / "out", ["dry_run=true", "dtype=int8", "clips_per_shard=4"], _bar)
    assert not (tmp_path / "out").exists()
    text = capsys.readouterr().out
    assert "28 clips of up to 5 frames, 8 shards" in text
    assert "features: int8 [..., 6, 16] from float16" in text
    assert "partition base: 7 train, 7 heldout" in text
    assert result["settings"]["clips_per_shard"] == 4
    manifest = shard_clips(str(features), tmp_path / "out", ["dtype=int8", "clips_per_shard=4"], _bar)
    assert [shard["num_clips"] for shard in manifest["shards"]] == [shard["num_clips"] for shard in result["shards"]]


def test_settings_of_the_source_have_its_name_in_front(tmp_path: Path) -> None:
    source, random = tmp_path / "source", np.random.default_rng(0)
    for number in range(8):
        for name, shape in (("features", (24, 16)), ("actions", (3, 2))):
            path = source / f"clip_{number:05d}.{name}.npy"
            path.parent.mkdir(exist_ok=True)
            np.save(path, random.normal(size=shape).astype(np.float32))
    settings = [
        "kind=npy",
        "source.tokens=6",
        "provenance.encode_mode=per-frame",
        "provenance.grid=2x3",
        "partitions=[low=0..4,high=4..]",
        "split=heldout_last=0.25",
    ]
    shard_clips(str(source), tmp_path / "out", settings, _bar)
    manifest = load_manifest(tmp_path / "out")
    assert manifest.partitions == {"low": {"train": 3, "heldout": 1}, "high": {"train": 3, "heldout": 1}}
    assert (manifest.provenance.encode_mode, manifest.provenance.grid) == ("per-frame", (2, 3))
    one_rule = ["source.tokens=6", "partitions=some=0..8"]
    assert shard_clips(str(source), tmp_path / "one", one_rule, _bar)["clips"] == 8


def test_what_was_assumed_of_a_source_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        for folder, name, shape in (("feature_maps", "f", (4, 6, 8)), ("actions_states", "actions", (4, 2))):
            path = tmp_path / "tree" / f"clip_{number:05d}" / folder / f"{name}.npy"
            path.parent.mkdir(parents=True)
            np.save(path, np.ones(shape, np.float32))
    shard_clips(str(tmp_path / "tree"), tmp_path / "out", [], _bar)
    said = capsys.readouterr().err
    assert "provenance.action_alignment names other rules" in said
    assert "with provenance.encode_mode=per-frame, prefix or clip" in said
    shard_clips(str(tmp_path / "tree"), tmp_path / "parts", ["part=0/2"], _bar)
    assert "provenance.action_alignment names other rules" in capsys.readouterr().err
    told = ["provenance.action_alignment=row1-to-row0", "provenance.encode_mode=per-frame", "dry_run=true"]
    shard_clips(str(tmp_path / "tree"), tmp_path / "other", told, _bar)
    assert "provenance." not in capsys.readouterr().err
    with pytest.raises(DataError, match="rows x columns of a frame's tokens, such as 1x6"):
        shard_clips(str(tmp_path / "tree"), tmp_path / "other", [*told, "provenance.grid=5x5"], _bar)


def test_arrays_in_fortran_order_are_stored_in_c_order_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.random.default_rng(0).normal(size=(2, 4, 6, 8)).astype(np.float32)
    (tmp_path / "flat").mkdir()
    for number, order in enumerate((np.asfortranarray, np.ascontiguousarray)):
        np.save(tmp_path / "flat" / f"clip_{number}.features.npy", order(values[number]))
        np.save(tmp_path / "flat" / f"clip_{number}.actions.npy", np.ones((3, 2), np.float32))
    result = shard_clips(str(tmp_path / "flat"), tmp_path / "out", ["provenance.encode_mode=per-frame"], _bar)
    assert result["notes"] == ["features: 1 clips have it in Fortran order; it was stored in C order"]
    opened = InspectedDataset(tmp_path / "out")
    for number in range(2):
        np.testing.assert_array_equal(opened.values(opened.row(f"clip_{number}"), "features"), values[number])
    assert "Fortran order" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--dry-run=true"], "--dry-run=true: is no option of this command, and settings are written without dashes"),
        (
            ["--dtype", "int8"],
            "and settings are written without dashes. Fix: write dtype=int8",
        ),
        (["--provenance.encode_mode=clip"], "Fix: write provenance.encode_mode=clip"),
    ],
)
def test_settings_written_as_options_make_nothing(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(Path.cwd().iterdir())
    for command in (["shard", str(features), "out"], ["shard", str(features)], ["simulate"], ["index"]):
        ended = CliRunner().invoke(app, ["data", *command, *arguments])
        assert isinstance(ended.exception, ConfigError)
        assert expected in str(ended.exception)
    assert sorted(Path.cwd().iterdir()) == before


@pytest.mark.parametrize(
    ("setting", "error", "expected"),
    [
        ("clip_per_shard=3", ConfigError, "did you mean clips_per_shard?"),
        ("encode_mode=prefix", ConfigError, "write provenance.encode_mode=prefix"),
        ("seed=a", ConfigError, "must be of type int"),
        ("source.token=6", DataError, "source.token=6: the kind features has no such option; did you mean tokens?"),
        ("dtype=int4", DataError, "did you mean int8?"),
        ("on_error=ignore", DataError, "on_error=ignore: unknown"),
        ("max_error=1.5", DataError, "max_error=1.5: must be at least 0 and below 1"),
        ("workers=0", DataError, "workers=0: must be at least 1"),
        ("part=4/4", DataError, "part=4/4: must be i/n"),
        ("kind=feature", DataError, "did you mean features?"),
        ("split=0.1", DataError, "Fix: write e.g. heldout=0.1"),
    ],
)
def test_unknown_settings_and_values_are_refused(
    features: Path, tmp_path: Path, setting: str, error: type[Exception], expected: str
) -> None:
    with pytest.raises(error) as caught:
        shard_clips(str(features), tmp_path / "out", [setting], _bar)
    assert expected.replace("; did", ". Fix: did") in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_last_line_is_json_when_wanted(features: Path, tmp_path: Path) -> None:
    arguments = ["data", "shard", str(features), str(tmp_path), "--format", "tar", "--part", "0/1", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["clips"] == 28
    again = CliRunner().invoke(app, ["data", "merge", str(tmp_path)])
    assert f"{tmp_path}: 28 clips" in again.stdout


@pytest.mark.parametrize("setting", ["part=0/1", "workers=2", "paranoid=true", "metrics_file=x.prom"])
def test_a_dry_run_refuses_what_it_has_no_use_for(features: Path, tmp_path: Path, setting: str) -> None:
    with pytest.raises(ConfigError, match=rf"{setting.partition('=')[0]}=.*has no effect with dry_run=true"):
        shard_clips(str(features), tmp_path / "out", ["dry_run=true", setting], _bar)
