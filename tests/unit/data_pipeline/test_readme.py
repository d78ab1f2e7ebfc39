from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

import data_pipeline
from data_pipeline.alignment import ALIGNMENTS
from data_pipeline.dataset.manifest import parse_manifest
from data_pipeline.reader.batches import GlobalBatches
from data_pipeline.reader.clips import ClipReader
from data_pipeline.schema import DataConfig
from data_pipeline.shard.plan import ShardSettings
from data_pipeline.shard.run import RunSettings
from data_pipeline.sources.open import KINDS
from tests.small_dataset import write_dataset

FOLDER = Path(str(data_pipeline.__file__)).parent
PAGES = sorted(FOLDER.rglob("README.md"))


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_manifest_on_the_page_is_one_that_is_read() -> None:
    meta, manifest = _blocks(FOLDER / "README.md", "json")
    parsed = parse_manifest(manifest.encode(), FOLDER / "README.md")
    assert parsed.num_clips == 3
    assert json.loads(meta)["key"] == "base-train-00000"
    assert set(json.loads(meta)["dtypes"]) == set(parsed.dtypes)


def test_the_readers_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "DATASET", clips=40)
    monkeypatch.chdir(tmp_path)
    (example,) = _blocks(FOLDER / "reader" / "README.md", "python")
    names = {"ClipReader": ClipReader, "DataConfig": DataConfig, "GlobalBatches": GlobalBatches}
    exec(example, names)
    assert names["step"].num_clips == 64  # pyright: ignore[reportAttributeAccessIssue]
    names["batches"].close()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_every_data_setting_that_is_named_exists(page: Path) -> None:
    for dotted in re.findall(r"\bdata\.([a-z_]+(?:\.[a-z_]+)*)", page.read_text()):
        section: type[BaseModel] = DataConfig
        for part in dotted.split("."):
            assert part in section.model_fields, f"data.{dotted}"
            kinds = [section.model_fields[part].annotation, *get_args(section.model_fields[part].annotation)]
            section = next(
                (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), BaseModel
            )


def test_every_kind_alignment_and_setting_of_the_sharder_is_told() -> None:
    sources, shard = (FOLDER / name / "README.md" for name in ("sources", "shard"))
    assert all(f"| `{kind}` |" in sources.read_text() for kind in KINDS)
    assert all(f"| `{alignment}` |" in sources.read_text() for alignment in ALIGNMENTS)
    for settings in (ShardSettings, RunSettings):
        assert all(f"`{name}" in shard.read_text() for name in settings.__dataclass_fields__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target
