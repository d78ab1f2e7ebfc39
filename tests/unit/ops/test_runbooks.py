"""Every alert has a page that can be followed: its links lead somewhere, its commands, settings and metrics exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

from hopescale.checkpoint.resume import CURVE_FIELDS, CURVE_SECTIONS
from hopescale.cli import app
from hopescale.config.schema import Config
from hopescale.metrics.catalog import CATALOG
from tests.user_process import REPO_ROOT

OPS = REPO_ROOT / "ops"
PAGES = sorted((OPS / "runbooks").glob("Hopescale*.md"))
DOCUMENTS = [*PAGES, *sorted(OPS.rglob("README.md"))]
RULES = [
    rule
    for path in sorted((OPS / "prometheus" / "rules").glob("*.yml"))
    for group in yaml.safe_load(path.read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
each_document = pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: str(path.relative_to(OPS)))


def queries(page: Path) -> list[str]:
    blocks = re.findall(r"```promql\n(.*?)```", page.read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_every_alert_has_a_page_and_every_page_an_alert() -> None:
    assert sorted(ALERTS) == [page.stem for page in PAGES]


def test_the_list_of_pages_names_each_with_its_severity() -> None:
    text = (OPS / "runbooks" / "README.md").read_text()
    listed = re.findall(r"^\| \[(\w+)\]\((\w+)\.md\) \| (\w+) \|", text, flags=re.MULTILINE)
    assert sorted(listed) == sorted((name, name, rule["labels"]["severity"]) for name, rule in ALERTS.items())


@each_page
def test_a_page_says_what_it_is_where_to_look_what_to_do_and_when_it_ends(page: Path) -> None:
    text = page.read_text()
    headings = re.findall(r"^(#+ .*?)(?:, by the class that grew)?$", text, flags=re.MULTILINE)
    assert headings == [f"# {page.stem}", "## Look", "## Causes, and what to do", "## It ends"]
    assert queries(page)
    assert len(text.splitlines()) <= 55


@each_document
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@each_document
def test_metrics_exist(page: Path) -> None:
    known = {metric.name for metric in CATALOG} | {rule["record"] for rule in RULES if "record" in rule}
    # A name that ends in an underscore stands for several.
    named = set(re.findall(r"(?:\brun:)?\bhopescale_[a-z_]*[a-z](?![a-z_])(?::\w+)?", page.read_text()))
    assert named - known == set()


@each_document
def test_settings_exist(page: Path) -> None:
    inside = "|".join(Config.model_fields)
    named = set(re.findall(rf"(?<![\w/.])(?:{inside})(?:\.[a-z_]+)+(?![\w./])", page.read_text()))
    assert [name for name in named if not is_setting(name)] == []


OF_THE_ORDER = "view|select|window|frames|skip_list|action_alignment|order|order_shards|mixture|mixture_block|tail"
FIXED = re.compile(rf"`(?:(?:{'|'.join(CURVE_SECTIONS)})\.|data\.(?:{OF_THE_ORDER})\b|{'|'.join(CURVE_FIELDS)})")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_run_folder_is_bound_to_is_changed_in_a_new_run_only(page: Path) -> None:
    remedies = [line.strip("|\n ").split("|")[-1] for line in page.read_text().splitlines() if line.startswith("| ")]
    assert [remedy for remedy in remedies if FIXED.search(remedy) and "new run" not in remedy] == []


def is_setting(name: str) -> bool:
    section: type[BaseModel] = Config
    *path, last = name.split(".")
    for part in path:
        field = section.model_fields.get(part)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return False
        section = field.annotation
    return last in section.model_fields


@each_document
def test_commands_exist(page: Path) -> None:
    for command in set(re.findall(r"(?:^|`)hopescale ((?:data )?[a-z-]+)", page.read_text(), flags=re.MULTILINE)):
        asked = CliRunner().invoke(app, [*command.split(), "--help"])
        assert asked.exit_code == 0, command


@pytest.mark.requires("prometheus-server")
def test_queries_are_promql(tmp_path: Path) -> None:
    rules = [
        {"record": "query", "expr": query, "labels": {"page": page.stem}} for page in PAGES for query in queries(page)
    ]
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "pages", "rules": rules}]}))
    command = ["promtool", "check", "rules", "--lint=none", str(tmp_path / "queries.yml")]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stderr
    assert f"{len(rules)} rules found" in checked.stdout


# ------------------------------------------------------------------------------------------------------- Alertmanager
@pytest.mark.requires("alertmanager")
def test_amtool_finds_nothing_wrong() -> None:
    command = ["amtool", "check-config", str(OPS / "alerts" / "alertmanager.yml")]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_alerts_that_hold_others_back_exist() -> None:
    config = yaml.safe_load((OPS / "alerts" / "alertmanager.yml").read_text())
    matchers = [text for rule in config["inhibit_rules"] for text in rule["source_matchers"] + rule["target_matchers"]]
    assert set(re.findall(r"Hopescale\w+", " ".join(matchers))) <= set(ALERTS)
    run = yaml.safe_load((OPS / "prometheus" / "settings.yml").read_text())["run"].split(", ")
    assert [rule["equal"] for rule in config["inhibit_rules"]] == [run] * len(config["inhibit_rules"])
