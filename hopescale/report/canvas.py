"""A figure that is drawn on in inches from its top left corner, as a page is laid out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hopescale.report import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Canvas:
    """An empty figure of one colour; sizes and places are in inches, type sizes in points.

    Args:
        width: of the figure.
        height: of the figure.
        colour: of its background.

    Raises:
        MissingExtra: matplotlib is not installed.
    """

    def __init__(self, width: float, height: float, colour: str) -> None:
        self.width, self.height = width, height
        self.figure = style.new_figure(width, height)
        self.figure.set_facecolor(colour)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float,
        colour: str,
        weight: str = "normal",
        across: str = "left",
        down: str = "center",
    ) -> None:
        """Write one line; `across` and `down` say which part of it lies at the place."""
        place = (x / self.width, 1 - y / self.height)
        self.figure.text(*place, text, fontsize=size, color=colour, fontweight=weight, ha=across, va=down)

    def text_width(self, text: str, size: float, weight: str = "normal") -> float:
        """How wide a line of text is."""
        from matplotlib.backends.backend_agg import RendererAgg
        from matplotlib.font_manager import FontProperties

        renderer = RendererAgg(1, 1, self.figure.dpi)
        font = FontProperties(size=size, weight=weight)
        return renderer.get_text_width_height_descent(text, font, ismath=False)[0] / self.figure.dpi

    def fitting(self, text: str, width: float, size: float, weight: str = "normal") -> str:
        """The text, cut short where it is wider than there is room."""
        text = style.shown(text, 200)
        while len(text) > 1 and self.text_width(text, size, weight) > width:
            text = style.shown(text, len(text) - 1)
        return text

    def box(
        self, x: float, y: float, width: float, height: float, *, fill: str, edge: str = "none", radius: float = 0.0
    ) -> None:
        """A filled box with its top left corner at a place."""
        from matplotlib.patches import FancyBboxPatch

        corner = (x + radius, self.height - y - height + radius)
        rounded = f"round,pad={radius}" if radius else "square,pad=0"
        box = FancyBboxPatch(
            corner,
            width - 2 * radius,
            height - 2 * radius,
            boxstyle=rounded,
            transform=self.figure.dpi_scale_trans,
            facecolor=fill,
            edgecolor=edge,
            linewidth=0.7,
            # Below everything that axes draw; figures draw their own patches last otherwise.
            zorder=-1,
        )
        self.figure.add_artist(box)

    def line(self, x: float, y: float, width: float, colour: str, thickness: float) -> None:
        """A level line from a place to the right."""
        from matplotlib.lines import Line2D

        ends, level = [x, x + width], [self.height - y] * 2
        self.figure.add_artist(
            Line2D(ends, level, color=colour, linewidth=thickness, transform=self.figure.dpi_scale_trans)
        )

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes with their top left corner at a place, tick labels outside."""
        left, bottom = x / self.width, 1 - (y + height) / self.height
        return self.figure.add_axes((left, bottom, width / self.width, height / self.height))
