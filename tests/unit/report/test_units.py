from __future__ import annotations

import pytest

from hopescale.dashboards.compose import compose
from hopescale.report.units import scale_of, shown


@pytest.mark.parametrize(
    ("value", "unit", "decimals", "text"),
    [
        (0.0, "short", None, "0"),
        (0.01234, "short", None, "0.0123"),
        (12.345, "short", None, "12.3"),
        (1234.5, "short", None, "1.23 K"),
        (-2_500_000, "short", None, "-2.50 Mil"),
        (1_234_567, "locale", 0, "1,234,567"),
        (0.4567, "percentunit", 1, "45.7%"),
        (12.3, "suffix:clips/s", None, "12.3 clips/s"),
        (0.0, "s", 0, "0 s"),
        (2e-9, "s", None, "2 ns"),
        (0.25, "s", None, "250 ms"),
        (59.0, "s", None, "59 s"),
        (90.0, "s", 1, "1.5 mins"),
        (7200.0, "s", None, "2 hours"),
        (1e9, "s", 0, "1653 weeks"),
        (1536, "bytes", None, "1.50 KiB"),
        (1023, "bytes", None, "1023 B"),
        (2.0**60, "bytes", None, "1024 PiB"),
        (2 * 2.0**20, "binBps", None, "2 MiB/s"),
        (3.2e12, "flops", None, "3.20 TFLOPS"),
        (float("inf"), "s", None, "inf"),
    ],
)
def test_numbers_are_written_as_grafana_does(value: float, unit: str, decimals: int | None, text: str) -> None:
    assert shown(value, unit, decimals) == text


def test_every_unit_of_a_dashboard_can_be_written() -> None:
    for layout in compose():
        for placed in layout.panels:
            assert scale_of(placed.panel.unit, 1.0).divisor > 0


def test_another_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="the unit 'furlongs' cannot be written"):
        shown(1.0, "furlongs")
