from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hopescale.report import tables


@pytest.fixture
def result() -> dict[str, Any]:
    keys = [key for key, _ in tables.COLUMNS]
    row = dict(zip(keys, np.linspace(0.1, 0.7, len(keys)).tolist(), strict=True))
    return row | {"partitions": {"base": row | {"skill_far": None}, "[red]a|b`": row | {"skill_jump": float("nan")}}}


def test_the_last_row_is_the_mean_and_missing_numbers_are_dashes(result: dict[str, Any]) -> None:
    header, base, hostile, mean = tables.result_table(result)
    assert len(header) == len(base) == 8
    assert mean == ["mean", "0.100", "0.200", "0.300", "0.400", "0.500", "0.600", "0.700"]
    assert base[2] == hostile[3] == "–"


def test_markdown_has_one_cell_per_column_whatever_the_names(result: dict[str, Any]) -> None:
    lines = tables.markdown_table(result).splitlines()
    assert len(lines) == 5
    assert "\\[red\\]a\\|b\\`" in lines[3]
    assert {line.replace("\\|", "").count("|") for line in lines} == {9}


def test_console_table_prints_names_that_look_like_markup(
    result: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    tables.print_result(result)
    printed = capsys.readouterr().out
    assert "[red]a|b`" in printed
    assert "writes" in printed
    assert "0.700" in printed
    assert "…" not in printed


def test_figures_after_true_frames_stand_under_the_table_where_they_were_measured(
    result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    tables.print_result(result | {"skill_context": None})
    assert "true ones" not in capsys.readouterr().out
    tables.print_result(result | {"skill_context": 0.25, "no_past_ratio_context": 1.5})
    assert "skill 0.250; newest frame alone 1.500" in " ".join(capsys.readouterr().out.split())
