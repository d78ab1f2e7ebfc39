"""`ops/compose.yaml` by the schema of the Compose specification, and by what it promises. Nothing is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.user_process import REPO_ROOT

COMPOSE = REPO_ROOT / "ops" / "compose.yaml"
TREE: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
SERVICES: dict[str, dict[str, Any]] = TREE["services"]


def complaints(file: Path) -> str:
    """What the schema of the Compose specification has against a file."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if ended.returncode == 0 else ended.stdout + ended.stderr


def test_the_schema_of_the_specification_accepts_it() -> None:
    assert complaints(COMPOSE) == ""


def test_the_schema_finds_a_word_it_does_not_know(tmp_path: Path) -> None:
    file = tmp_path / "compose.yaml"
    file.write_text(COMPOSE.read_text().replace("    tmpfs:", "    tmpfss:", 1))
    assert "tmpfss" in complaints(file)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_can_do_no_more_than_it_must(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "devices", "pid", "ipc"} & set(service)


def test_nothing_listens_beyond_this_machine() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_foreign_images_are_named_by_version() -> None:
    foreign = [service["image"] for name, service in SERVICES.items() if name != "trainer"]
    assert [image for image in foreign if ":" not in image or image.endswith(":latest")] == []


def test_what_it_mounts_of_the_repository_is_there() -> None:
    mounted = [volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])]
    of_the_repository = [path for path in mounted if path.startswith("./")]
    assert [path for path in of_the_repository if not (COMPOSE.parent / path).exists()] == []


def test_prometheus_finds_target_and_token_where_its_configuration_looks() -> None:
    prometheus = SERVICES["prometheus"]
    (scrape,) = yaml.safe_load((REPO_ROOT / "ops/prometheus/prometheus.yml").read_text())["scrape_configs"]
    (pattern,) = scrape["file_sd_configs"][0]["files"]
    # Of the run, which writes its entry where Prometheus reads it.
    (told,) = [word for word in SERVICES["trainer"]["command"] if word.startswith("metrics.discovery=")]
    inside = {volume.split(":")[1]: volume.split(":")[0] for volume in SERVICES["trainer"]["volumes"]}
    written = told.removeprefix("metrics.discovery=").replace("/runs", inside["/runs"], 1)
    assert f"{written}:{Path(pattern).parent}:ro" in prometheus["volumes"]
    assert [secret["target"] for secret in prometheus["secrets"]] == [scrape["authorization"]["credentials_file"]]


def test_grafana_knows_how_often_prometheus_scrapes() -> None:
    config = yaml.safe_load((REPO_ROOT / "ops/prometheus/prometheus.yml").read_text())
    provisioned = REPO_ROOT / "ops/grafana/provisioning/datasources/prometheus.yaml"
    (source,) = yaml.safe_load(provisioned.read_text())["datasources"]
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


def test_the_trainer_serves_the_network_with_the_token_that_prometheus_sends() -> None:
    trainer = SERVICES["trainer"]
    assert "metrics.listen=node" in trainer["command"]
    assert [f"metrics.token_file=/run/secrets/{secret}" in trainer["command"] for secret in trainer["secrets"]] == [
        True
    ]
    assert {secret["source"] for secret in SERVICES["prometheus"]["secrets"]} == set(trainer["secrets"])
