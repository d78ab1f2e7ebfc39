"""What a rank has: names, files, and rates fitted to measured steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hopescale.errors import ConfigError, Problem
from hopescale.plan.hardware import PRESETS, Hardware, Work, fit, hardware_of

TOLD_APART = (
    Work(1e12, 1e9, 1e3, 0, 0),
    Work(1e11, 5e9, 2e3, 0, 0),
    Work(5e11, 2e9, 1e3, 1e8, 10),
    Work(2e11, 1e9, 3e3, 4e8, 5),
    Work(8e11, 3e9, 1e3, 2e7, 80),
    Work(1e11, 1e9, 9e4, 2e7, 8),
)
"""Steps in which no figure stands for another."""
NO_TIME = 1e25
"""A rate at which nothing takes time."""


def problem_of(given: str, device: str = "auto") -> Problem:
    with pytest.raises(ConfigError) as caught:
        hardware_of(given, device)
    (problem,) = caught.value.problems
    assert (problem.field, problem.value) == ("cluster.hardware", given)
    return problem


def written(path: Path, figures: object) -> str:
    path.write_text(figures if isinstance(figures, str) else json.dumps(figures))
    return str(path)


def rates(hardware: Hardware) -> tuple[float, float, float, float, float]:
    each, latency = hardware.operator_latency, hardware.link_latency
    return hardware.rate("fp32"), hardware.memory_bandwidth, each, hardware.link_bandwidth, latency


def timed(
    works: Sequence[Work], flops: float, memory: float, each: float, link: float, latency: float
) -> list[tuple[Work, float]]:
    """Steps as they take on a machine of these rates, one part after the other."""
    return [
        (w, w.flops / flops + w.moved / memory + w.operators * each + w.sent / link + w.messages * latency)
        for w in works
    ]


def test_presets_go_by_their_names_and_have_positive_figures() -> None:
    assert set(PRESETS) >= {"a100", "h100", "h200", "b200", "l40s", "cpu"}
    for name, hardware in PRESETS.items():
        figures = asdict(hardware)
        assert figures.pop("name") == name
        assert figures.pop("queues") is (name != "cpu")
        assert all(value > 0 for key, value in figures.items() if value is not None and key != "overlap")
        assert 0 <= hardware.overlap < 1
        assert hardware.fitted_ranks is None
        assert hardware.rate("fp32") < hardware.rate("bf16")
        assert hardware.link_bandwidth >= hardware.network_bandwidth


def test_a_preset_has_the_figures_of_its_data_sheet() -> None:
    h100 = PRESETS["h100"]
    assert (h100.memory_bytes, h100.flops_bf16, h100.flops_fp32) == (80e9, 989e12, 67e12)
    assert (h100.memory_bandwidth, h100.link_bandwidth, h100.network_bandwidth) == (3.35e12, 450e9, 50e9)
    assert h100.rate("bf16") == pytest.approx(395.6e12)
    assert h100.rate("fp32") == pytest.approx(26.8e12)


@pytest.mark.parametrize(("devices", "ranks", "share"), [(None, 64, 1.0), (8, 8, 1.0), (8, 2, 1.0), (2, 8, 0.25)])
def test_ranks_share_the_devices_of_a_node_where_they_are_more(devices: int | None, ranks: int, share: float) -> None:
    assert replace(PRESETS["cpu"], devices=devices).share(ranks) == share


@pytest.mark.parametrize(
    ("given", "device", "name"),
    [(None, "auto", "h100"), (None, "cuda", "h100"), (None, "cpu", "cpu"), ("a100", "cpu", "a100")],
)
def test_without_a_name_the_device_decides(given: str | None, device: str, name: str) -> None:
    assert hardware_of(given, device) is PRESETS[name]


def test_an_unknown_name_is_an_error_that_lists_the_known_ones() -> None:
    problem = problem_of("h10")
    assert problem.rule.endswith("there is none of this name: a100, h100, h200, b200, l40s, cpu")
    assert "did you mean h100?" in problem.fix
    assert ".json" in problem.fix


def test_a_file_of_figures_is_read_as_it_was_written(tmp_path: Path) -> None:
    lab = Hardware("lab", 1e10, 1e12, 2e12, 0.5, 1e11, 1e10, 0, 1e9, 1, 0, True, 0, devices=4, fitted_ranks=2)
    assert hardware_of(written(tmp_path / "lab.json", asdict(lab)), "auto") == lab


def test_figures_that_are_optional_may_be_left_out_of_a_file(tmp_path: Path) -> None:
    figures = {name: value for name, value in asdict(PRESETS["a100"]).items() if value is not None}
    assert not figures.keys() & {"devices", "fitted_ranks"}
    assert hardware_of(written(tmp_path / "few.json", figures), "auto") == PRESETS["a100"]


@pytest.mark.parametrize(
    ("left_out", "added", "odd"),
    [
        ("overlap", {}, "overlap"),
        ("name", {"nmae": "x"}, "name, nmae"),
        (None, {"tflops": 3.0}, "tflops"),
    ],
)
def test_a_file_of_other_figures_names_those_that_are_odd(
    tmp_path: Path, left_out: str | None, added: dict[str, Any], odd: str
) -> None:
    figures = {name: value for name, value in asdict(PRESETS["cpu"]).items() if name != left_out} | added
    problem = problem_of(written(tmp_path / "odd.json", figures))
    assert problem.rule.endswith(f"missing or unknown: {odd}")
    assert "hopescale/plan/README.md" in problem.fix


@pytest.mark.parametrize("figures", [[1, 2], "3", "null"])
def test_a_file_without_an_object_is_refused(tmp_path: Path, figures: object) -> None:
    problem = problem_of(written(tmp_path / "list.json", figures))
    assert "must be an object of" in problem.rule
    assert "memory_bytes" in problem.rule


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory_bytes", 0),
        ("flops_fp32", -1e12),
        ("link_latency", -1e-6),
        ("overlap", -0.1),
        ("efficiency", "half"),
        ("network_bandwidth", None),
        ("memory_bandwidth", float("inf")),
        ("flops_bf16", float("nan")),
        ("devices", 0),
        ("fitted_ranks", -2),
        ("fitted_ranks", 2.5),
        ("efficiency", 7),
        ("memory_bytes", True),
        ("name", 5),
        ("queues", 1),
        ("operator_latency", -1e-6),
    ],
)
def test_a_figure_out_of_range_is_named_with_its_value(tmp_path: Path, name: str, value: object) -> None:
    problem = problem_of(written(tmp_path / "wrong.json", asdict(PRESETS["cpu"]) | {name: value}))
    assert problem.rule.startswith(f"{name}={value!r} must be ")
    assert problem.fix


@pytest.mark.parametrize("text", [None, "{", b"\xff\xfe{}"])
def test_a_file_that_cannot_be_read_says_how_to_get_one(tmp_path: Path, text: str | bytes | None) -> None:
    path = tmp_path / "some.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    problem = problem_of(str(path))
    assert problem.rule.startswith("cannot be read: ")
    assert "hopescale/plan/README.md" in problem.fix
    assert "h100" in problem.fix


@settings(deadline=None)
@given(st.tuples(*[st.floats(0.1, 10)] * 5))
def test_rates_are_found_again_from_the_steps_they_make(factors: tuple[float, ...]) -> None:
    true = [f * rate for f, rate in zip(factors, (1e12, 1e10, 1e-5, 1e9, 1e-3), strict=True)]
    found = fit(PRESETS["cpu"], timed(TOLD_APART, *true), 4)
    assert rates(found) == pytest.approx(tuple(true), rel=1e-6)


def test_a_fit_keeps_what_no_step_tells() -> None:
    base = PRESETS["h100"]
    found = fit(base, timed(TOLD_APART, 1e12, 1e10, 1e-5, 1e9, 1e-3), 4)
    assert (found.name, found.fitted_ranks, found.efficiency) == ("fitted", 4, 1.0)
    kept = ("memory_bytes", "network_bandwidth", "network_latency", "overlap", "devices")
    assert [getattr(found, name) for name in kept] == [getattr(base, name) for name in kept]
    assert found.rate("bf16") == pytest.approx(989 / 67 * 1e12)


AMOUNTS = st.builds(
    Work,
    st.floats(1e6, 1e15),
    st.floats(1e3, 1e12),
    st.floats(0, 1e6),
    st.floats(0, 1e10),
    st.integers(0, 1000).map(float),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(AMOUNTS, st.floats(1e-4, 1e3)), min_size=1, max_size=8))
def test_no_rate_is_negative_whatever_was_measured(steps: list[tuple[Work, float]]) -> None:
    flops, memory, each, link, latency = rates(fit(PRESETS["cpu"], steps, 2))
    assert min(flops, memory, link) > 0
    assert 0 <= latency < float("inf")
    assert 0 <= each < float("inf")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(AMOUNTS, st.floats(1e-4, 1e3)), min_size=2, max_size=8))
def test_a_fit_is_as_near_as_the_best_single_rate(steps: list[tuple[Work, float]]) -> None:
    found = fit(PRESETS["cpu"], steps, 2)
    fitted = timed([work for work, _ in steps], *rates(found))
    error = sum((predicted / seconds - 1) ** 2 for (_, predicted), (_, seconds) in zip(fitted, steps, strict=True))
    for name in ("flops", "moved"):
        ratios = [getattr(work, name) / seconds for work, seconds in steps]
        scale = sum(ratios) / sum(ratio**2 for ratio in ratios)
        assert error <= sum((scale * ratio - 1) ** 2 for ratio in ratios) + 1e-6


def test_a_figure_that_no_step_has_takes_no_time() -> None:
    alone = [work._replace(sent=0.0, messages=0.0) for work in TOLD_APART]
    flops, memory, each, link, latency = rates(fit(PRESETS["cpu"], timed(alone, 2e12, 3e10, 1e-5, 1.0, 1.0), 1))
    assert (flops, memory, each) == pytest.approx((2e12, 3e10, 1e-5))
    assert link > NO_TIME
    assert latency == 0


def test_a_figure_that_tells_nothing_of_the_seconds_takes_no_time() -> None:
    steps = [(work, work.moved / 1e10) for work in TOLD_APART]
    found = fit(PRESETS["cpu"], steps, 2)
    assert found.memory_bandwidth == pytest.approx(1e10)
    for work, seconds in steps:
        assert work.flops / found.rate("fp32") + work.sent / found.link_bandwidth < 1e-6 * seconds
        assert work.messages * found.link_latency < 1e-6 * seconds


def test_a_figure_of_which_more_was_faster_takes_no_time() -> None:
    works = [Work(1e12 * n, 0, 0, 1e9 * m, 0) for n, m in ((1, 0), (1, 1), (2, 1), (2, 3), (3, 0))]
    steps = [(work, work.flops / 1e12 - 0.1 * work.sent / 1e9) for work in works]
    found = fit(PRESETS["cpu"], steps, 2)
    assert found.link_bandwidth > NO_TIME
    assert found.rate("fp32") == pytest.approx(1.1e12, rel=0.05)


def test_what_is_fitted_can_be_read_again_also_where_products_took_no_time(tmp_path: Path) -> None:
    steps = [(Work(1e9 * a, 1e9 * b, 0, 0, 0), b * 0.1) for a, b in ((1, 2), (2, 1), (3, 5))]
    fitted = fit(PRESETS["cpu"], steps, 2)
    assert hardware_of(written(tmp_path / "fitted.json", asdict(fitted)), "auto") == fitted
