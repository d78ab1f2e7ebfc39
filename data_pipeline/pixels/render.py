"""Drawing of the table world with Pillow: no display, no GPU, the same bytes for the same scene."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.errors import missing_extra

if TYPE_CHECKING:
    from PIL import ImageDraw

SUPERSAMPLING = 4
"""Scenes are drawn this many times larger and averaged down, so that edges move by fractions of a pixel."""

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Palette:
    """Colours of one partition, as RGB bytes."""

    table: Colour
    line: Colour
    wall: Colour
    block: Colour
    edge: Colour
    mark: Colour


WOOD = Palette((196, 168, 132), (182, 152, 115), (74, 63, 56), (47, 111, 178), (24, 62, 106), (250, 225, 120))
ICE = Palette((205, 226, 238), (188, 213, 229), (70, 96, 118), (47, 111, 178), (24, 62, 106), (250, 225, 120))
NIGHT = Palette((62, 70, 84), (54, 61, 74), (205, 196, 180), (222, 96, 62), (140, 48, 28), (246, 244, 238))


@dataclass(frozen=True)
class Wall:
    """Straight bar between two points, in world units (the view is 128 units wide)."""

    start: tuple[float, float]
    end: tuple[float, float]
    thickness: float


@dataclass(frozen=True)
class Scene:
    """What does not change during a clip: block side in world units, colours and walls."""

    side: float
    palette: Palette
    walls: tuple[Wall, ...]


# The mark breaks every symmetry of the square: a bar along one edge and a dot in one corner, in block sides.
_BAR = ((-0.36, -0.36), (0.36, -0.36), (0.36, -0.14), (-0.36, -0.14))
_DOT_CENTRE = (-0.2, 0.2)
_DOT_RADIUS = 0.16
_OUTLINE = 0.06
_PLANK = 16.0


def render_frames(scene: Scene, poses: np.ndarray, size: int, view: float) -> np.ndarray:
    """Draw one image for each pose.

    Args:
        scene: Block, colours and walls.
        poses: f64 `[F, 3]`: x, y in world units, angle in radians; y points down as in images.
        size: Image side in pixels.
        view: Width of the view in world units.

    Returns:
        uint8 `[F, size, size, 3]`.

    Raises:
        MissingExtra: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise missing_extra("pillow", "demo", "drawing simulated clips") from error

    large = size * SUPERSAMPLING
    scale = large / view
    background = Image.new("RGB", (large, large), scene.palette.table)
    draw = ImageDraw.Draw(background)
    _draw_planks(draw, scene.palette, scale, view)
    for wall in scene.walls:
        draw.polygon(_wall_corners(wall, scale), fill=scene.palette.wall)

    frames = np.empty((len(poses), size, size, 3), np.uint8)
    for frame, (x, y, angle) in zip(frames, poses, strict=True):
        image = background.copy()
        _draw_block(ImageDraw.Draw(image), scene, float(x), float(y), float(angle), scale)
        frame[:] = np.asarray(image.reduce(SUPERSAMPLING))
    return frames


def _draw_planks(draw: ImageDraw.ImageDraw, palette: Palette, scale: float, view: float) -> None:
    width = max(1, round(scale))
    row = 0
    y = 0.0
    while y < view:
        draw.line([(0, y * scale), (view * scale, y * scale)], fill=palette.line, width=width)
        joint = (24.0 if row % 2 else 80.0) * scale
        draw.line([(joint, y * scale), (joint, (y + _PLANK) * scale)], fill=palette.line, width=width)
        y += _PLANK
        row += 1


def _draw_block(draw: ImageDraw.ImageDraw, scene: Scene, x: float, y: float, angle: float, scale: float) -> None:
    cosine, sine = math.cos(angle), math.sin(angle)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        u, v = point[0] * scene.side, point[1] * scene.side
        return ((x + cosine * u - sine * v) * scale, (y + sine * u + cosine * v) * scale)

    def square(half: float) -> list[tuple[float, float]]:
        return [place(corner) for corner in ((-half, -half), (half, -half), (half, half), (-half, half))]

    draw.polygon(square(0.5), fill=scene.palette.edge)
    draw.polygon(square(0.5 - _OUTLINE), fill=scene.palette.block)
    draw.polygon([place(corner) for corner in _BAR], fill=scene.palette.mark)
    dot_x, dot_y = place(_DOT_CENTRE)
    radius = _DOT_RADIUS * scene.side * scale
    draw.ellipse([dot_x - radius, dot_y - radius, dot_x + radius, dot_y + radius], fill=scene.palette.mark)


def _wall_corners(wall: Wall, scale: float) -> list[tuple[float, float]]:
    (x0, y0), (x1, y1) = wall.start, wall.end
    length = math.hypot(x1 - x0, y1 - y0)
    across_x, across_y = -(y1 - y0) / length * wall.thickness / 2, (x1 - x0) / length * wall.thickness / 2
    corners = (
        (x0 + across_x, y0 + across_y),
        (x1 + across_x, y1 + across_y),
        (x1 - across_x, y1 - across_y),
        (x0 - across_x, y0 - across_y),
    )
    return [(x * scale, y * scale) for x, y in corners]
