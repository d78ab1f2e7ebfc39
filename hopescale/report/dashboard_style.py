"""Colours of the picture of a dashboard: those of Grafana's dark theme and its classic palette."""

from __future__ import annotations

from hopescale.dashboards.panel import Colour

BACKGROUND = "#111217"
PANEL = "#181b1f"
EDGE = "#2a2d33"
GRID = "#2b2e35"
TEXT = "#d8d9e2"
DIM = "#9a9ba8"

SERIES = (
    "#73bf69",
    "#f2cc0c",
    "#8ab8ff",
    "#ff780a",
    "#f2495c",
    "#5794f2",
    "#b877d9",
    "#96d98d",
    "#c4162a",
    "#ffee52",
    "#3274d9",
    "#ca95e5",
)
NUMBER_COLOURS: dict[Colour, str] = {"green": "#73bf69", "orange": "#ff9830", "red": "#f2495c"}
MARK_COLOURS = {"blue": "#5794f2", "orange": "#ff9830"}
