"""What panels show of a run that goes on from an earlier checkpoint, as a Prometheus computes it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from hopescale.dashboards.generated import rate
from hopescale.dashboards.recipes import events, over
from hopescale.metrics.catalog import by_key

pytestmark = pytest.mark.requires("prometheus-server")

CLIPS = by_key("clips_total")
SKIPPED = events("Skipped", "", "nonfinite_steps_total").queries[0].promql
WINDOWS = {"$__rate_interval": "4m", "$__range": "40m", "$__interval": "1m"}
RESUMED = "31m"
"""A sample a minute; from minute 30 on, clips and skipped steps count on from what they were in minute 20 or before."""
SERIES = {
    'hopescale_clips_total{cluster="a", run="b"}': "0+600x29 12000+600x40",
    'hopescale_nonfinite_steps_total{cluster="a", run="b"}': "1+0x9 4+0x19 1+0x10 3+0x30",
    'hopescale_goodput_seconds_total{cluster="a", run="b", kind="step"}': "0+60x70",
}


@pytest.mark.parametrize(
    ("promql", "moment", "value"),
    [
        (rate(CLIPS), "28m", 10),
        (rate(CLIPS), RESUMED, None),
        (rate(CLIPS), "40m", 10),
        (over("clips_total", "goodput_seconds_total"), "28m", 10),
        (over("clips_total", "goodput_seconds_total"), RESUMED, None),
        (over("clips_total", "goodput_seconds_total"), "40m", 10),
        (SKIPPED, "28m", 3),
        (SKIPPED, RESUMED, 3),
        (SKIPPED, "45m", 5),
    ],
)
def test_what_a_resume_sets_back_is_no_new_count(promql: str, moment: str, value: float | None, tmp_path: Path) -> None:
    for variable, length in WINDOWS.items():
        promql = promql.replace(variable, length)
    expected: list[dict[str, Any]] = [] if value is None else [{"labels": "{}", "value": value}]
    # Windows reach beyond their first and last sample, by less than one of them.
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in SERIES.items()],
            "promql_expr_test": [{"expr": f"sum(round({promql}))", "eval_time": moment, "exp_samples": expected}],
        }
    ]
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump({"tests": tests}))
    tested = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stdout + tested.stderr
