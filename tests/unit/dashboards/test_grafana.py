from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import MissingExtra, UserError
from hopescale.dashboards.__main__ import main
from hopescale.dashboards.grafana import write_dashboards
from tests.dashboard_lint import DASHBOARDS, FOLDER, panels_of

Document = dict[str, Any]
Again = Callable[[Document], Document]


@pytest.fixture
def again() -> Again:
    """Grafana's models, with those of its panels and data sources."""
    pytest.importorskip("grafana_foundation_sdk")
    from grafana_foundation_sdk.cog import encoder, plugins
    from grafana_foundation_sdk.models import dashboard

    plugins.register_default_plugins()

    def parsed_and_written(document: Document) -> Document:
        """From JSON to typed models and back; what they do not know is lost on the way."""
        return json.loads(encoder.JSONEncoder().encode(dashboard.Dashboard.from_json(document)))

    return parsed_and_written


@pytest.mark.requires("grafana-sdk")
def test_the_committed_files_are_what_the_catalog_gives(tmp_path: Path) -> None:
    names = sorted(path.name for path in write_dashboards(tmp_path))
    assert names == sorted(path.name for path in FOLDER.iterdir()), "run python -m hopescale.dashboards"
    for name in names:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), "run python -m hopescale.dashboards"


def test_without_the_sdk_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grafana_foundation_sdk.cog", None)
    with pytest.raises(MissingExtra, match=r"pip install 'hopescale\[dev\]'"):
        write_dashboards(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="must be an existing folder"):
        write_dashboards(tmp_path / "none")
    assert main([str(tmp_path / "none")]) == 2
    assert "must be an existing folder" in capsys.readouterr().err


def lost(document: Any, again: Any, path: str = "") -> Iterator[str]:
    """Places of a document that its copy lacks, or has another value at."""
    if isinstance(document, dict) and isinstance(again, dict):
        for key, value in document.items():
            if key in again:
                yield from lost(value, again[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"
    elif isinstance(document, list) and isinstance(again, list) and len(document) == len(again):
        for index, (one, other) in enumerate(zip(document, again, strict=True)):
            yield from lost(one, other, f"{path}[{index}]")
    elif document != again:
        yield f"{path}: {document!r} != {again!r}"


def with_one_key_renamed(document: Any) -> Iterator[tuple[str, Any]]:
    """Copies of a document that each have one key spelled wrong, and where."""
    if isinstance(document, dict):
        for key, value in document.items():
            yield key, {(f"{name}_" if name == key else name): held for name, held in document.items()}
            for where, changed in with_one_key_renamed(value):
                yield f"{key}.{where}", document | {key: changed}
    elif isinstance(document, list):
        for index, value in enumerate(document):
            for where, changed in with_one_key_renamed(value):
                yield f"[{index}].{where}", [*document[:index], changed, *document[index + 1 :]]


def number_of_keys(document: Any) -> int:
    if isinstance(document, dict):
        return len(document) + sum(map(number_of_keys, document.values()))
    return sum(map(number_of_keys, document)) if isinstance(document, list) else 0


@pytest.mark.requires("grafana-sdk")
@pytest.mark.parametrize("name", DASHBOARDS)
def test_grafanas_models_know_every_key(again: Again, name: str) -> None:
    document = DASHBOARDS[name]
    assert list(lost(document, again(document))) == []


@pytest.mark.requires("grafana-sdk")
@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_key_spelled_wrong_would_be_noticed_wherever_it_is(again: Again, name: str) -> None:
    document = DASHBOARDS[name]
    # A panel at a time: the dashboard around it is the same for all.
    parts = [document | {"panels": []}, *({"panels": [panel]} for panel in document["panels"])]
    unnoticed, tried = [], 0
    for part in parts:
        for where, changed in with_one_key_renamed(part):
            tried += 1
            try:
                noticed = any(lost(changed, again(changed)))
            except (KeyError, TypeError, AttributeError):
                noticed = True
            if not noticed:
                unnoticed.append(where)
    assert tried >= number_of_keys(document)
    assert unnoticed == []


@pytest.mark.requires("grafana-sdk")
@pytest.mark.parametrize("name", DASHBOARDS)
def test_units_are_grafanas(name: str) -> None:
    from grafana_foundation_sdk.models import units

    known = {value for key, value in vars(units).items() if key[0].isupper() and isinstance(value, str)}
    used = {panel["fieldConfig"]["defaults"]["unit"] for panel in panels_of(DASHBOARDS[name])}
    assert {unit for unit in used if not unit.startswith("suffix:")} <= known
