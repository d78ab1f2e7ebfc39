from __future__ import annotations

import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import MissingExtra
from hopescale.report import style


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.01, 0.3))
def test_spread_labels_keep_their_order_stay_inside_and_do_not_overlap(wanted: list[float], gap: float) -> None:
    placed = style.spread(wanted, gap, 0.0, 1.0)
    room = min(gap, 1 / max(len(wanted) - 1, 1))
    in_order = [placed[index] for index in sorted(range(len(wanted)), key=lambda index: (wanted[index], index))]
    assert all(-1e-9 <= value <= 1 + 1e-9 for value in placed)
    assert all(after - before >= room - 1e-9 for before, after in pairwise(in_order))


def test_spread_leaves_labels_with_enough_room_where_they_are() -> None:
    assert style.spread([0.8, 0.1, 0.5], 0.1, 0.0, 1.0) == [0.8, 0.1, 0.5]


def test_shown_names_are_one_short_printable_line() -> None:
    assert style.shown("a\nb\x1bc") == "a b c"
    assert len(style.shown("x" * 200)) == 26


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"hopescale\[demo\]"):
        style.styled()
