"""Numbers as Grafana writes them, for the units that our dashboards use."""

from __future__ import annotations

import math
from dataclasses import dataclass

_THOUSANDS = ("", " K", " Mil", " Bil", " Tri")
_SI = ("", "k", "M", "G", "T", "P", "E")
_BINARY = ("", "Ki", "Mi", "Gi", "Ti", "Pi")
_TIMES = (
    (1e-9, " ns"),
    (1e-6, " µs"),
    (1e-3, " ms"),
    (1.0, " s"),
    (60.0, " mins"),
    (3600.0, " hours"),
    (86400.0, " days"),
    (604800.0, " weeks"),
)


@dataclass(frozen=True)
class Scale:
    """What numbers of one size are divided by, and what is then written behind them."""

    divisor: float
    suffix: str


def scale_of(unit: str, size: float) -> Scale:
    """The scale of numbers up to `size`.

    Args:
        unit: a Grafana unit id.
        size: the largest absolute number that is to be written in it.

    Raises:
        ValueError: no dashboard has such a unit.
    """
    if unit.startswith("suffix:"):
        return Scale(1.0, " " + unit.removeprefix("suffix:"))
    match unit:
        case "locale":
            return Scale(1.0, "")
        case "percentunit":
            return Scale(0.01, "%")
        case "short":
            return _powers(1000.0, size, _THOUSANDS)
        case "flops":
            return _powers(1000.0, size, [f" {prefix}FLOPS" for prefix in _SI])
        case "bytes":
            return _powers(1024.0, size, [f" {prefix}B" for prefix in _BINARY])
        case "binBps":
            return _powers(1024.0, size, [f" {prefix}B/s" for prefix in _BINARY])
        case "s":
            return Scale(*max((step for step in _TIMES if step[0] <= size), default=(1.0, " s")))
    raise ValueError(f"the unit {unit!r} cannot be written")


def shown(value: float, unit: str, decimals: int | None = None) -> str:
    """A number with its unit; three digits where it does not say how many decimals."""
    if not math.isfinite(value):
        return str(value)
    scale = scale_of(unit, abs(value))
    scaled = value / scale.divisor
    return written(scaled, _decimals(scaled) if decimals is None else decimals, unit) + scale.suffix


def written(scaled: float, decimals: int, unit: str) -> str:
    """A number that its scale was applied to, without the suffix."""
    return f"{scaled:,.{decimals}f}" if unit == "locale" else f"{scaled:.{decimals}f}"


def _powers(base: float, size: float, suffixes: tuple[str, ...] | list[str]) -> Scale:
    power = 0
    while size >= base ** (power + 1) and power + 1 < len(suffixes):
        power += 1
    return Scale(base**power, suffixes[power])


def _decimals(scaled: float) -> int:
    if scaled == int(scaled):
        return 0
    return max(0, 2 - math.floor(math.log10(abs(scaled))))
