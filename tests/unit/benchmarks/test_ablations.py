from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hopescale.config.compose import load_config
from tests.benchmarks import ablation_report, ablations
from tests.benchmarks.ablation_results import Spread, Trained, equal_time, keep, load_group, spread
from tests.benchmarks.ablation_rows import DATA, ROWS

STEPS = [10, 20, 30, 40]


def figures(rise: float = 0.01, **changes: Any) -> dict[str, Any]:
    """Figures of a run whose skills grow by `rise` a step."""
    curve: dict[str, list[Any]] = {"step": STEPS, "train_seconds": STEPS}
    skills = ("skill_one_step", "skill_far", "skill_jump", "skill_context")
    curve |= {skill: [rise * s for s in STEPS] for skill in skills}
    ratios = ("writes_off_ratio_one_step", "writes_off_ratio_far", "writes_off_ratio_context", "no_past_ratio_context")
    result = {skill: curve[skill][-1] for skill in skills} | dict.fromkeys(ratios, 1.25)
    return {"ranks": 2, "parameters": 1234, "curve": curve, "result": result} | changes


def trained(step_seconds: float | None, *runs: dict[str, Any]) -> Trained:
    return Trained("demo", "default", runs, step_seconds)


def test_rows_have_names_of_their_own_and_every_one_composes() -> None:
    assert len({row.label for row in ROWS}) == len(ROWS)
    for row in ROWS:
        config = load_config(row.settings)
        assert config.model.frames == DATA[row.data].frames


def test_a_row_says_what_it_changes_and_one_that_changes_nothing_is_not_trained_again() -> None:
    rows = {row.label: row for row in ROWS}
    assert rows["optimizer/k1-lr0.012"].differences() == {}
    own = rows["demo/default"].differences()
    assert own.keys() == {"optimizer.lr", "optimizer.levels"}
    assert rows["demo/meta-grad-fo"].differences() == own | {"model.memory.meta_grad": "fo"}
    assert rows["demo/T-H-T"].differences() == own | {"model.block_pattern": ["T", "H", "T"]}
    some = [rows[name] for name in ("demo/default", "demo/eta-max-150", "hidden/S-H-S", "length/S-H-S-15")]
    assert list(ablations.unusable(some)) == [(rows["demo/eta-max-150"], "is demo/default itself")]


def test_rows_are_chosen_by_name_or_pattern() -> None:
    assert [row.label for row in ablations.chosen_rows(["hidden/T-?-T", "demo/default"])] == [
        "demo/default",
        "hidden/T-T-T",
        "hidden/T-H-T",
    ]
    with pytest.raises(SystemExit, match="no row"):
        ablations.chosen_rows(["demo/defualt"])


def test_the_curve_joins_evaluations_with_the_training_time_of_their_step(tmp_path: Path) -> None:
    lines = [
        {"kind": "train", "step": 1, "loss": 9.0, "train_seconds_total": 0.5},
        {"kind": "eval", "step": 2, "skill_one_step": 0.1, "skill_far": 0.2, "skill_jump": None},
        {"kind": "train", "step": 2, "loss": 8.0, "train_seconds_total": 1.23456789},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ablations.curve(tmp_path / "metrics.jsonl") == {
        "step": [2],
        "train_seconds": [1.23457],
        "loss": [8.0],
        "skill_one_step": [0.1],
        "skill_far": [0.2],
        "skill_jump": [None],
        "skill_context": [None],
    }


def test_what_is_kept_is_not_trained_again_and_other_settings_are_refused(tmp_path: Path) -> None:
    row = ROWS[0]
    path = ablations.result_path(tmp_path, row, 1)
    settings = ablations.common_settings(row, 1, 400, 25)
    assert {"train.seed=1", "train.steps=400", "metrics.every=25"} <= set(settings)
    assert not ablations.stored(path, settings)
    keep(path, {"settings": settings})
    assert ablations.stored(path, settings)
    assert [file.name for file in path.parent.iterdir()] == ["default-seed1.json"]
    with pytest.raises(SystemExit, match=r"train\.steps=400, train\.steps=500"):
        ablations.stored(path, ablations.common_settings(row, 1, 500, 25))


def test_spread_is_mean_and_half_range_and_needs_every_seed() -> None:
    assert spread([0.25, 0.5, 1.5]) == Spread(mean=0.75, half_range=0.625, count=3)
    assert str(spread([0.1, 0.3])) == "0.200 ± 0.100"
    assert str(spread([0.25])) == "0.250"
    assert spread([0.1, None]) is None


def test_a_skill_at_equal_time_is_read_between_two_evaluations() -> None:
    fast, slow = trained(1.0, figures()), trained(2.0, figures(rise=0.02))
    assert equal_time([fast, slow]) == 40
    assert fast.at_time("skill_far", 40) == Spread(mean=0.4, half_range=0, count=1)
    found = slow.at_time("skill_far", 50)
    assert found is not None
    assert found.mean == pytest.approx(0.5)
    assert slow.at_time("skill_far", 19) is None, "nothing was measured before the first evaluation"
    with pytest.raises(ValueError, match=r"no seconds of demo/default: run step_cost\.py"):
        equal_time([fast, trained(None, figures())])


def test_runs_of_different_length_or_ranks_are_not_compared(tmp_path: Path) -> None:
    keep(tmp_path / "demo" / "default-seed0.json", figures())
    keep(tmp_path / "demo" / "heads-1-seed0.json", figures(ranks=1))
    assert [row.name for row in load_group(tmp_path, "demo", ["default"])] == ["default"]
    with pytest.raises(ValueError, match="heads-1-seed0"):
        load_group(tmp_path, "demo", ["default", "heads-1"])


def test_the_table_has_a_row_for_each_configuration_and_dashes_for_what_is_missing(tmp_path: Path) -> None:
    for seed, rise in enumerate((0.01, 0.012)):
        keep(tmp_path / "demo" / f"default-seed{seed}.json", figures(rise=rise))
    other = figures()
    other["result"]["skill_jump"] = None
    keep(tmp_path / "demo" / "T-T-T-seed0.json", other)
    keep(tmp_path / "step_cost.json", {"threads": 1, "demo": {"default": 1.0, "T-T-T": 2.0}})
    rows = load_group(tmp_path, "demo", ablation_report.names_of("demo"))
    header, _, default, attention = ablation_report.group_table(rows).splitlines()
    assert "far in 40 s" in header
    assert default.startswith("| default | 2 | 1,234 | 1.00 | 0.440 ± 0.040 |")
    assert attention.startswith("| T-T-T | 1 | 1,234 | 2.00 | 0.400 | 0.400 | – | 0.200 | 0.200 | 1.250 | 1.250 |")


def test_the_report_holds_tables_picture_and_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    for group, name in (("demo", "default"), ("hidden", "S-H-S"), ("hidden", "T-T-T"), ("length", "T-T-T-15")):
        keep(tmp_path / "results" / group / f"{name}-seed0.json", figures())
    seconds = {"demo": {"default": 1.0}, "hidden": {"S-H-S": 1.0, "T-T-T": 1.0}}
    keep(tmp_path / "results" / "step_cost.json", seconds)
    costs = [
        {"transitions": t, "patches": patches, "seconds_ratio": ratio, "flops_ratio": 2 * ratio}
        for t in (7, 15)
        for patches, ratio in ((16, 1.5), (64, 2.5))
    ]
    keep(tmp_path / "results" / "clip_cost.json", {"rows": costs})
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- ablations -->\nold\n<!-- /ablations -->\nbelow\n")
    places = {"--results": tmp_path / "results", "--out": tmp_path, "--readme": readme}
    monkeypatch.setattr("sys.argv", ["report", *(str(part) for item in places.items() for part in item)])
    ablation_report.main()
    page = (tmp_path / "ABLATIONS.md").read_text()
    assert "| 7 | 1.50 | 3.00 | 2.50 | 5.00 | 0.400 | 0.400 | 0.400 | 0.400 |" in page
    assert "| 15 | 1.50 | 3.00 | 2.50 | 5.00 | – | 0.400 | – | 0.400 |" in page
    assert (tmp_path / "ablations.png").read_bytes().startswith(b"\x89PNG")
    shown = readme.read_text()
    assert shown.startswith("above\n<!-- ablations -->\n\nThe demo, ")
    assert shown.endswith("|\n<!-- /ablations -->\nbelow\n")
    assert "old" not in shown
    assert "| default | 1.00 | 0.400 | 0.400 | 0.400 | 0.400 | 1.250 |" in shown
    assert "|  | time a step | after four true frames | " in shown

    readme.write_text("no marks")
    with pytest.raises(ValueError, match="no place for the tables"):
        ablation_report.main()
