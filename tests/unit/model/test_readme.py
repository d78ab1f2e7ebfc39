from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).resolve().parents[3] / "hopescale" / "model" / "README.md"


def test_the_examples_of_the_readme_run_and_print_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    for example in examples:
        exec(example, names)
    shown = [line.split("  # ")[1] for line in "".join(examples).splitlines() if line.startswith("print(")]
    assert shown
    assert capsys.readouterr().out.splitlines() == shown
    assert names["predictor"](names["features"], names["actions"]).frames.isfinite().all()
