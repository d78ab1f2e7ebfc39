"""The rules are those of the templates and settings, Prometheus reads them, and their unit tests tell good from bad."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from hopescale.metrics.catalog import CATALOG
from tests.user_process import REPO_ROOT

PROMETHEUS = REPO_ROOT / "ops" / "prometheus"
RULES = PROMETHEUS / "rules"
TESTS = PROMETHEUS / "tests"

needs_prometheus = pytest.mark.requires("prometheus-server")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


def rules_py(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, PROMETHEUS / "rules.py", *arguments)


@cache
def content(path: Path) -> Any:
    """Of a YAML file, which nobody changes."""
    return yaml.safe_load(path.read_text())


def committed() -> dict[str, list[dict[str, Any]]]:
    """The committed rules by file, in their order."""
    files = {path.name: content(path) for path in sorted(RULES.glob("*.yml"))}
    return {name: [dict(rule) for group in file["groups"] for rule in group["rules"]] for name, file in files.items()}


def alerts() -> list[dict[str, Any]]:
    return [rule for rules in committed().values() for rule in rules if "alert" in rule]


# ------------------------------------------------------------------------------------------------------ the generator
def test_the_committed_rules_are_those_of_templates_and_settings() -> None:
    checked = rules_py("--check")
    assert checked.returncode == 0, checked.stderr
    templates = {path.name for path in (PROMETHEUS / "templates").iterdir()}
    assert templates == {path.name for path in RULES.iterdir()}


def changed_settings(folder: Path, **changes: object) -> Path:
    settings = content(PROMETHEUS / "settings.yml") | changes
    path = folder / "settings.yml"
    path.write_text(yaml.safe_dump({name: value for name, value in settings.items() if value is not None}))
    return path


def test_other_settings_give_other_rules(tmp_path: Path) -> None:
    path = changed_settings(tmp_path, stall_least="90s", rank_for="7m")
    out = tmp_path / "rules"
    assert rules_py("--settings", path, "--check").returncode == 1
    assert rules_py("--settings", path, "--output", out).returncode == 0
    text = (out / "progress.yml").read_text()
    assert "    90, 3600\n" in text
    assert text.count("for: 7m\n") == 2
    assert (out / "training.yml").read_text() == (RULES / "training.yml").read_text()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stall_least": 600}, "stall_least=600 must be a length of time"),
        ({"stall_least": "ten minutes"}, "stall_least='ten minutes' must be a length of time"),
        ({"stall_for": None}, "not given: stall_for"),
        ({"stall_four": "1m"}, "no template asks for stall_four"),
        ({"stall_factor": [2]}, "stall_factor=[2] must be a number"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, object], reason: str, tmp_path: Path) -> None:
    refused = rules_py("--settings", changed_settings(tmp_path, **changes), "--output", tmp_path / "rules")
    assert refused.returncode == 2
    assert reason in refused.stderr
    assert not (tmp_path / "rules").exists()


# ---------------------------------------------------------------------------------------- what rules and alerts name
def test_rules_use_metrics_of_the_catalog_and_what_is_recorded() -> None:
    rules = [rule for rules in committed().values() for rule in rules]
    recorded = {rule["record"] for rule in rules if "record" in rule}
    names = {name for rule in rules for name in re.findall(r"(?:run:)?hopescale_[\w:]+", rule["expr"])}
    known = {metric.name for metric in CATALOG} | recorded
    assert names - known == set()
    assert recorded - names == set(), "recorded, and no rule uses it"


def test_label_values_in_rules_are_those_of_the_catalog() -> None:
    by_name = {metric.name: metric for metric in CATALOG}
    for rules in committed().values():
        for rule in rules:
            for name, label, value in re.findall(r'(hopescale_\w+)\{(\w+)="(\w+)"\}', rule["expr"]):
                assert label in by_name[name].labels
                assert value in by_name[name].label_values


def test_every_alert_says_how_bad_it_is_and_links_to_its_page() -> None:
    base = content(PROMETHEUS / "settings.yml")["runbooks"]
    for alert in alerts():
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
        assert "{{ $labels.run }}" in alert["annotations"]["summary"]
        assert alert["annotations"]["runbook_url"] == f"{base}/{alert['alert']}.md"


@pytest.mark.parametrize("name", [alert["alert"] for alert in alerts()])
def test_an_alert_is_tested_with_its_annotations(name: str) -> None:
    tested = [
        entry
        for path in TESTS.glob("*.yml")
        for scenario in content(path)["tests"]
        for entry in scenario.get("alert_rule_test", ())
    ]
    assert [entry for entry in tested if entry["alertname"] == name and entry["exp_alerts"]]


# --------------------------------------------------------------------------------------------------- Prometheus' word
@needs_prometheus
def test_promtool_finds_nothing_wrong(tmp_path: Path) -> None:
    checked = run("promtool", "check", "rules", "--lint-fatal", *RULES.glob("*.yml"))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = run("promtool", "test", "rules", *TESTS.glob("*.yml"))
    assert tested.returncode == 0, tested.stdout + tested.stderr
    for name in ("prometheus.yml", "prometheus.local.yml"):
        # As on a site that has done what the comments ask for.
        text = (PROMETHEUS / name).read_text().replace("/etc/prometheus", str(tmp_path))
        (tmp_path / "hopescale.token").write_text("secret")
        (tmp_path / name).write_text(text.replace("rules/*.yml", f"{RULES}/*.yml"))
        checked = run("promtool", "check", "config", "--lint-fatal", tmp_path / name)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "3 rule files found" in run("promtool", "check", "config", tmp_path / "prometheus.yml").stdout


def test_rules_are_evaluated_as_often_as_numbers_come() -> None:
    settings = content(PROMETHEUS / "settings.yml")
    config = content(PROMETHEUS / "prometheus.yml")
    assert settings["evaluate"] == config["global"]["scrape_interval"] == config["global"]["evaluation_interval"]
    assert [job["job_name"] for job in config["scrape_configs"]] == ["hopescale"]


# --------------------------------------------------------------------------- the unit tests of rules, on broken rules
def without(pattern: str) -> Callable[[str], str]:
    return lambda expr: re.sub(pattern, "", expr)


NEWEST, JOIN, STARTS = "goes by the newest value", "is not joined with up", "fires while a run starts"
NAMES, JOBS, AT_ONCE = "takes runs of one name for one", "takes jobs of one run for one", "fires at once"

CHANGES: dict[str, Callable[[str], str]] = {
    NEWEST: lambda expr: re.sub(r"last_over_time\((\S+?)\[\w+\]\)", r"\1", expr),
    JOIN: without(r'\n\s*and on \([^)]*\) up\{job="hopescale"\}'),
    STARTS: without(r"\n\s*unless on \([^)]*\) run:hopescale_starting_nodes:count"),
    NAMES: lambda expr: expr.replace("cluster, run, slurm_job_id", "run"),
    JOBS: lambda expr: expr.replace("cluster, run, slurm_job_id", "cluster, run"),
}
"""What may happen to the expression of any rule."""


@dataclass(frozen=True)
class Mutation:
    """A way to break a rule, and the scenario of which file of tests notices.

    Attributes:
        rule: its alert or record.
        change: one of `CHANGES`, `AT_ONCE`, or `old -> new` in its expression.
        noticed_by: start of the scenario's name.
    """

    rule: str
    change: str
    noticed_by: str

    def as_parameter(self) -> Any:
        """Of a test; the two mistakes that are easiest to make are tried each time, the others with `--full`."""
        marks = () if self.change in (NEWEST, JOIN) else pytest.mark.slow
        return pytest.param(self, marks=marks, id=f"{self.rule} {self.change}")

    def apply(self, rules: list[dict[str, Any]]) -> None:
        """Break the rule; everything else stays."""
        (rule,) = [rule for rule in rules if self.rule in (rule.get("alert"), rule.get("record"))]
        before = dict(rule)
        if self.change == AT_ONCE:
            rule.pop("for", None)
        elif self.change in CHANGES:
            rule["expr"] = CHANGES[self.change](rule["expr"])
        else:
            old, new = self.change.split(" -> ")
            rule["expr"] = rule["expr"].replace(old, new)
        assert rule != before, f"{self} changes nothing"


LATER = "all ranks stop, and later"
GONE = "the whole job is stopped"
ENDED = "a run that ends in good order"
AGAIN = "a run that waits two hours for its turn"

MUTATIONS = [
    Mutation("HopescaleStepStalled", NEWEST, GONE),
    Mutation("HopescaleStepStalled", JOIN, ENDED),
    Mutation("HopescaleStepStalled", STARTS, AGAIN),
    Mutation("HopescaleStepStalled", AT_ONCE, "while no pause is known"),
    Mutation("run:hopescale_last_step_timestamp_seconds:max", NAMES, "of runs of the same name"),
    Mutation("run:hopescale_last_step_timestamp_seconds:max", JOBS, "of runs of the same name"),
    Mutation("run:hopescale_last_step_timestamp_seconds:max", "max by -> min by", "a node cannot be seen"),
    Mutation("run:hopescale_log_pause_seconds", "> 0 -> >= 0", "while no pause is known"),
    Mutation("run:hopescale_stall_threshold_seconds", "2 * -> 1 *", "a run that logs every 20 minutes"),
    Mutation("run:hopescale_stall_threshold_seconds", "600, 3600 -> 600, 36000", "all ranks stop while"),
    Mutation("run:hopescale_stall_threshold_seconds", "600, 3600 -> 60, 3600", "a first evaluation"),
    Mutation("run:hopescale_stall_threshold_seconds", "+ 3600 -> + 600", "while no pause is known"),
    Mutation("run:hopescale_stall_threshold_seconds", NEWEST, "a job that is gone after"),
    Mutation("run:hopescale_starting_nodes:count", " == 1 -> >= 0", GONE),
    Mutation("run:hopescale_starting_nodes:count", "2m -> 15s", "a job that has waited"),
    Mutation("run:hopescale_starting_nodes:count", "max_over_time -> min_over_time", "a run that never steps"),
    Mutation("run:hopescale_starting_nodes:count", JOIN, "a run that never steps"),
    Mutation(
        "run:hopescale_starting_nodes:count",
        "last_over_time(hopescale_last_step_timestamp_seconds[2m]) -> hopescale_last_step_timestamp_seconds",
        LATER,
    ),
    Mutation("HopescaleNotStarted", AT_ONCE, "a run that does not get to its first step"),
    Mutation("HopescaleExporterDown", AT_ONCE, GONE),
    Mutation("HopescaleRankMissing", NEWEST, GONE),
    Mutation("HopescaleRankMissing", JOIN, ENDED),
    Mutation("HopescaleRankMissing", STARTS, AGAIN),
    Mutation("HopescaleRankMissing", AT_ONCE, "a node cannot be seen"),
    Mutation("run:hopescale_reporting_ranks:count", "_job_id, rank) -> _job_id, rank, instance)", "a node is listed"),
    Mutation("HopescaleRankBehind", AT_ONCE, "a node cannot be seen"),
    Mutation("HopescaleLossSpike", JOIN, "the loss triples for good"),
    Mutation("HopescaleLossSpike", AT_ONCE, "a spike of two minutes"),
    Mutation("HopescaleLossSpike", "unless changes -> and changes", "the loss triples and"),
    Mutation("HopescaleLossSpike", "> 0 -> > 9", "a loss that falls"),
    Mutation("HopescaleNonFiniteSteps", NEWEST, "a run that skipped steps dies"),
    Mutation("HopescaleNonFiniteSteps", JOIN, "a run that skipped steps ends"),
    Mutation("HopescaleNonFiniteSteps", "min_over -> max_over", "two steps are skipped"),
    Mutation("run:hopescale_data_wait_ratio", JOIN, "the first batches"),
    Mutation("run:hopescale_data_wait_ratio", STARTS, "data comes slowly, the job crashes"),
    Mutation(
        "run:hopescale_data_wait_ratio", "or last_over_time -> or 0 * last_over_time", "data comes slowly to a run that"
    ),
    Mutation("HopescaleDataWait", AT_ONCE, "the first batches"),
    Mutation("run:hopescale_reader_wait_seconds_total:avg", "hopescale_ranks -> up", "data comes slowly for"),
    Mutation("HopescaleGoodputLow", NEWEST, "half of the time"),
    Mutation("HopescaleGoodputLow", JOIN, "half of the time"),
    Mutation("HopescaleGoodputLow", AT_ONCE, "half of the time"),
    Mutation("HopescaleGoodputLow", "> 3600 -> > 0", "the first twenty minutes"),
    Mutation("run:hopescale_goodput_seconds:sum", "sum by -> max by", "half of the time"),
    Mutation("HopescaleCheckpointOld", NEWEST, "ranks stop, then the exporter"),
    Mutation("HopescaleCheckpointOld", JOIN, "ranks stop, then the exporter"),
    Mutation("HopescaleCheckpointOld", STARTS, "a run that is late"),
    Mutation("HopescaleCheckpointOld", AT_ONCE, "a run without a checkpoint"),
    Mutation("run:hopescale_unsaved_seconds", "train_seconds_total -> step", "a run without a checkpoint"),
    Mutation("run:hopescale_checkpoint_interval_seconds", "> 0 -> >= 0", "a run without a second"),
    Mutation("run:hopescale_checkpoint_threshold_seconds", "3 * -> 1 *", "checkpoints each hour"),
    Mutation("run:hopescale_checkpoint_threshold_seconds", "1800, -> 60,", "checkpoints each five minutes"),
    Mutation("run:hopescale_checkpoint_threshold_seconds", "+ 14400 -> + 3600", "a run without a checkpoint"),
    Mutation("run:hopescale_checkpoint_threshold_seconds", NEWEST, "a run without a second"),
    Mutation("HopescaleCheckpointFailing", NEWEST, "of two failed checkpoints"),
    Mutation("HopescaleCheckpointFailing", JOIN, "a run whose checkpoints failed"),
    Mutation("HopescaleDiskFilling", NEWEST, "a small run fills its disk"),
    Mutation("HopescaleDiskFilling", JOIN, "a small run fills its disk"),
    Mutation("HopescaleDiskFilling", AT_ONCE, "a disk has room"),
    Mutation("HopescaleDiskFilling", "and run:hopescale_disk_free_bytes:min offset 6h -> ", "the first checkpoints"),
    Mutation("HopescaleDiskFilling", "and run:hopescale_disk_free_bytes:min offset 2h -> ", "a run that has waited"),
    Mutation("HopescaleDiskFilling", "< 0 -> < -1e15", "logs eat"),
    Mutation("run:hopescale_disk_needed_bytes", NEWEST, "a small run fills its disk"),
    Mutation("run:hopescale_disk_needed_bytes", "3 * -> 1 *", "a disk has room"),
]


def scenarios() -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(TESTS.glob("*.yml")):
        for scenario in content(path)["tests"]:
            yield path, scenario


@needs_prometheus
@pytest.mark.parametrize("mutation", [m.as_parameter() for m in MUTATIONS])
def test_a_broken_rule_is_noticed(mutation: Mutation, tmp_path: Path) -> None:
    for name, rules in committed().items():
        if any(mutation.rule in (rule.get("alert"), rule.get("record")) for rule in rules):
            mutation.apply(rules)
        else:
            # Of other files a scenario needs what they record; their alerts only take time.
            rules = [rule for rule in rules if "record" in rule]
        (tmp_path / name).write_text(yaml.safe_dump({"groups": [{"name": name, "rules": rules}]}))
    ((path, scenario),) = [found for found in scenarios() if found[1]["name"].startswith(mutation.noticed_by)]
    document = content(path)
    used = [tmp_path / Path(name).name for name in document["rule_files"]]
    (tmp_path / "test.yml").write_text(
        yaml.safe_dump({**document, "rule_files": [str(path) for path in used], "tests": [scenario]}, sort_keys=False)
    )
    checked = run("promtool", "check", "rules", *used)
    assert checked.returncode == 0, f"broken beyond being a rule\n{checked.stderr}"
    tested = run("promtool", "test", "rules", tmp_path / "test.yml")
    assert tested.returncode != 0, "the scenario passes all the same"
    assert "FAILED" in tested.stderr + tested.stdout


def test_whatever_every_alert_could_lack_is_among_the_broken_rules() -> None:
    for alert in alerts():
        could_lack = {change for change in (NEWEST, JOIN, STARTS) if CHANGES[change](alert["expr"]) != alert["expr"]}
        could_lack |= {AT_ONCE} if "for" in alert else set()
        assert could_lack <= {m.change for m in MUTATIONS if m.rule == alert["alert"]}, alert["alert"]
