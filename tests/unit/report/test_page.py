from __future__ import annotations

import base64
import struct
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UserError
from hopescale.report.page import write_report

HOSTILE = ('<script>alert("1")</script>', "'><img src=http://example.com/x.png onerror=alert(1)>", "a&b")


class Page(HTMLParser):
    """Collects what a browser would load, run or read aloud."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.alternatives: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "img":
            self.alternatives.append(dict(attrs).get("alt") or "")

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def references(self) -> list[str]:
        return [value or "" for name, value in self.attributes if name in ("src", "href", "srcset", "data", "action")]


def png_size(content: bytes) -> tuple[int, int]:
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


@pytest.fixture(scope="module")
def page_path(finished_run: Path) -> Path:
    return write_report(finished_run)


def test_every_figure_is_a_file_and_is_embedded_in_the_page(page_path: Path) -> None:
    page = page_path
    pictures = {path.stem: path.read_bytes() for path in page.parent.glob("*.png")}
    expected = {"overview", "losses", "horizons", "one_step", "filmstrip", "surprise", "cms"}
    assert set(pictures) == expected | {f"clip-{index}" for index in range(4)}
    assert png_size(pictures["overview"]) == (1600, 700)
    assert all(width >= 1000 and height >= 300 for width, height in map(png_size, pictures.values()))
    embedded = Page(page.read_text()).references
    assert {base64.b64decode(reference.split(",", 1)[1]) for reference in embedded} == set(pictures.values())
    assert not list(page.parent.glob(".*"))


def test_the_page_loads_and_runs_nothing(page_path: Path) -> None:
    text = page_path.read_text()
    page = Page(text)
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert not any(name.startswith("on") or name == "style" for name, _ in page.attributes)
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme" in text
    assert all(len(alternative) > 30 for alternative in page.alternatives)


def test_hostile_partition_names_are_text(make_run: Callable[..., Path]) -> None:
    run = make_run(partitions=HOSTILE, samples=2)
    (run / "config.yaml").write_text("run: {name: '</title><script>x</script>'}\n")
    page = Page(write_report(run).read_text())
    assert "script" not in page.tags
    assert page.tags.count("img") == 9
    assert not any(name == "onerror" for name, _ in page.attributes)
    assert set(HOSTILE) <= set(page.words)


def test_without_pixels_or_memories_the_page_says_what_it_leaves_out(make_run: Callable[..., Path]) -> None:
    empty = {"surprise": np.zeros((0, 7)), "surprise_blocks": np.zeros(0, int), "cms_active": np.zeros((0, 0, 7), bool)}
    run = make_run(partitions=("base",), pixels=False, samples=1, **empty, cms_periods=np.zeros(0, int))
    page = write_report(run)
    assert not {"filmstrip.png", "surprise.png", "cms.png"} & {path.name for path in page.parent.iterdir()}
    text = page.read_text()
    assert "No video rows" in text
    assert "no memory blocks" in text
    assert "no Continuum Memory System" in text


def test_levels_that_act_at_every_frame_are_told_in_words(make_run: Callable[..., Path]) -> None:
    page = write_report(make_run(cms_active=np.ones((2, 3, 7), dtype=bool)))
    assert "every level of the Continuum Memory System acts at every frame" in page.read_text()
    assert not (page.parent / "cms.png").exists()


def test_numbers_command_and_config_are_on_the_page(page_path: Path) -> None:
    words = " ".join(Page(page_path.read_text()).words)
    assert "hopescale demo" in words
    assert "THTHTH" in words
    assert "171.9" in words
    assert "compositional" in words


def test_writing_twice_gives_the_same_bytes_and_removes_clips_that_are_gone(page_path: Path) -> None:
    first = page_path.read_bytes()
    (page_path.parent / "clip-9.png").write_bytes(b"old")
    assert write_report(page_path.parents[1]).read_bytes() == first
    assert not (page_path.parent / "clip-9.png").exists()


def test_a_run_without_evaluation_names_the_command(make_run: Callable[..., Path]) -> None:
    run = make_run()
    (run / "report" / "evaluation.npz").unlink()
    with pytest.raises(UserError, match="hopescale eval"):
        write_report(run)
    assert not (run / "report" / "index.html").exists()
