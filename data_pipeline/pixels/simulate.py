"""A small table world: one block, one push, six partitions that change the physics one idea at a time, and one probe.

World units: the view is 128 units wide whatever the image size; time is counted in stored frames.
Friction is Coulomb friction (`mu * mass * GRAVITY`), so a block slows down evenly and then stops.

The probe, `hidden`, is for memories. Its blocks look alike, but each has a mass and a friction of its own from a wide
range. Each is pushed out from the middle of the table, back again, and after a pause to and fro, filmed so slowly that
it rests in every frame. So frame 1 shows how far a push carries this block; frames 2 and 3 show it in the middle, like
any other, and the frames after them can be foretold by whoever remembers frame 1, and by nobody else.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.cache import write_json
from data_pipeline.errors import DataError, Problem, missing_extra, nearest
from data_pipeline.pixels.render import ICE, NIGHT, WOOD, Palette, Scene, Wall, render_frames

if TYPE_CHECKING:
    import pymunk

Vector = tuple[float, float]
Uniform = Callable[[float, float], float]

PARTITIONS = ("base", "scaling", "dissipation", "discretization", "kinematics", "compositional")
SIMULATOR_VERSION = 2
PROBES = ("hidden",)
"""Partitions that are simulated only when asked for."""
PIXELS_FILE = "pixels.json"
TRUTH_COLUMNS = ("x", "y", "angle", "velocity_x", "velocity_y", "angular_velocity", "mass", "friction", "side")

VIEW = 128.0
GRAVITY = 5.2
"""World units per frame squared: at friction 0.35 a block loses 1.8 units per frame, every frame."""
BLOCK_SIDE = 25.0
BLOCK_MASS = 1.0
FULL_IMPULSE = 28.0
"""Impulse, in mass times world units per frame, that is stored as an action of length 1."""
TABLE_FRICTION = 0.35
ICE_FRICTION = 0.05
HIDDEN_VARIATION = 0.3
_SUBSTEPS = 24
_MAX_DRAWS = 500

HIDDEN_MASS = (1.2, 4.8)
HIDDEN_FRICTION = (0.2, 0.5)
HIDDEN_REACH = (25.0, 37.0)
"""World units that a push of `hidden` carries the block of least mass and friction; others go less far, to 1/40."""
_HIDDEN_PACE = 9
"""A frame of `hidden` lasts as long as this many of the other partitions: by then any push has spent itself."""
_HIDDEN_MARGIN = 26.0
_CENTRE = (VIEW / 2, VIEW / 2)
_WALL_RESTITUTION = 0.7
_WALL_THICKNESS = 7.0
_RIM = 3.5


@dataclass(frozen=True)
class SimulationSpec:
    """What to simulate.

    Attributes:
        partitions: Names out of `PARTITIONS` and `PROBES`.
        num_train: Training clips of each partition.
        num_heldout: Held-out clips of each partition, from seeds no training clip uses.
        frames: Stored frames of a clip; the push acts between the first two, in `hidden` between any two but 2 and 3.
        size: Image side in pixels.
        seed: Every clip is a function of this number, its partition, split and index.
    """

    partitions: tuple[str, ...] = PARTITIONS
    num_train: int = 75
    num_heldout: int = 16
    frames: int = 8
    size: int = 128
    seed: int = 0


@dataclass(frozen=True)
class _Physics:
    """How a partition differs from the others.

    Attributes:
        sides: Factors on the block's side to choose from; the mass gets the same factor.
        friction: Nominal friction coefficients to choose from.
        distance: Range of the nominal sliding distance in world units.
        walls: Whether an inner wall stands in the block's way; the table's rim is a wall everywhere, but only here
            is it likely to be met.
        off_centre: Range of the push's lever arm, in block sides.
    """

    sides: tuple[float, ...] = (1.0,)
    friction: tuple[float, ...] = (TABLE_FRICTION,)
    distance: tuple[float, float] = (36.0, 62.0)
    walls: bool = False
    off_centre: tuple[float, float] = (0.0, 0.0)
    palette: Palette = WOOD


_PHYSICS: dict[str, _Physics] = {
    "base": _Physics(),
    "scaling": _Physics(sides=(0.5, 2.0), distance=(34.0, 54.0)),
    "dissipation": _Physics(friction=(ICE_FRICTION,), palette=ICE),
    "discretization": _Physics(distance=(56.0, 84.0), walls=True),
    "kinematics": _Physics(off_centre=(0.14, 0.34)),
    "compositional": _Physics(
        sides=(0.7, 1.4),
        friction=(ICE_FRICTION, TABLE_FRICTION),
        distance=(56.0, 84.0),
        walls=True,
        off_centre=(0.1, 0.3),
        palette=NIGHT,
    ),
}


@dataclass(frozen=True)
class _Setup:
    """One drawn clip before physics: visible choices and the hidden mass and friction."""

    side: float
    mass: float
    friction: float
    start: Vector
    angle: float
    pushes: tuple[Vector, ...]
    lever: float
    walls: tuple[Wall, ...]
    palette: Palette
    pace: int = 1


def simulate(spec: SimulationSpec, out: Path, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Simulate and draw all clips of `spec` into the folder `out`.

    Writes `PARTITION/KEY.npz` with frames uint8 `[F, H, W, 3]`, actions f32 `[F - 1, 2]` (row t is the push between
    frames t and t + 1; outside `hidden` only row 0 is not zero) and truth f32 `[F, 9]` (`TRUTH_COLUMNS`), then
    `pixels.json`, whose presence means the folder is complete.

    Args:
        spec: What to simulate.
        out: New or empty folder.
        progress: Called with (clips done, clips in all) after each clip.

    Returns:
        The content of `pixels.json`.

    Raises:
        DataError: A field of `spec` is out of range, or `out` holds something.
        MissingExtra: pymunk or Pillow is not installed.
    """
    _check_spec(spec)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise DataError(Problem("out", out, "the folder must be new or empty", "name another one"))
    plan = [
        (partition, split, index)
        for partition in spec.partitions
        for split, count in (("train", spec.num_train), ("heldout", spec.num_heldout))
        for index in range(count)
    ]
    clips: list[dict[str, Any]] = []
    digest = hashlib.sha256()
    for done, (partition, split, index) in enumerate(plan, start=1):
        arrays = simulate_clip(spec, partition, split, index)
        key = f"{partition}-{split}-{index:05d}"
        path = out / partition / f"{key}.npz"
        path.parent.mkdir(exist_ok=True)
        content = npz_bytes(arrays)
        path.write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        digest.update(f"{key} {sha256}\n".encode())
        clips.append({"key": key, "partition": partition, "split": split, "length": spec.frames, "sha256": sha256})
        if progress is not None:
            progress(done, len(plan))
    document = {
        "format": 1,
        "source": "simulation",
        "simulator_version": SIMULATOR_VERSION,
        "spec": asdict(spec),
        "truth_columns": list(TRUTH_COLUMNS),
        "digest": digest.hexdigest(),
        "clips": clips,
    }
    write_json(out / PIXELS_FILE, document)
    return document


def simulate_clip(spec: SimulationSpec, partition: str, split: str, index: int) -> dict[str, np.ndarray]:
    """Return the arrays of one clip, a pure function of the arguments.

    Returns:
        frames uint8 `[F, H, W, 3]`, actions f32 `[F - 1, 2]`, truth f32 `[F, 9]`.
    """
    words = [spec.seed, (*PARTITIONS, *PROBES).index(partition), ("train", "heldout").index(split), index]
    random = np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))
    if partition == "hidden":
        setup = _draw_hidden(random, spec.frames)
        truth = _run_physics(setup, spec.frames)
    else:
        setup, truth = _draw_free_slide(_PHYSICS[partition], random, spec.frames)
    scene = Scene(setup.side, setup.palette, setup.walls)
    return {
        "frames": render_frames(scene, truth[:, :3], spec.size, VIEW),
        "actions": (np.asarray(setup.pushes) / FULL_IMPULSE).astype(np.float32),
        "truth": truth.astype(np.float32),
    }


def npz_bytes(arrays: dict[str, np.ndarray], *, compress: bool = True) -> bytes:
    """Return the bytes of a .npz; members carry no time stamp, so equal arrays give equal bytes."""
    buffer = io.BytesIO()
    save = np.savez_compressed if compress else np.savez
    save(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    return buffer.getvalue()


def _check_spec(spec: SimulationSpec) -> None:
    known = (*PARTITIONS, *PROBES)
    problems = [
        Problem("partitions", name, "not a partition of the simulator", nearest(name, known))
        for name in spec.partitions
        if name not in known
    ]
    if not spec.partitions or len(set(spec.partitions)) != len(spec.partitions):
        problems.append(Problem("partitions", spec.partitions, "must name each partition once", "remove repeats"))
    for field, least in (("num_train", 0), ("num_heldout", 0), ("frames", 2), ("seed", 0)):
        if getattr(spec, field) < least:
            problems.append(Problem(field, getattr(spec, field), f"must be at least {least}", f"use {least} or more"))
    if spec.size < 32 or spec.size % 16:
        problems.append(Problem("size", spec.size, "must be a multiple of 16, at least 32", "use 128"))
    if problems:
        raise DataError(problems)


def _uniform(random: np.random.Generator) -> Uniform:
    # Only `random()` is used: plain doubles of PCG64 are the part of numpy's streams least likely to change.
    return lambda low, high: low + (high - low) * float(random.random())


def _draw_free_slide(physics: _Physics, random: np.random.Generator, frames: int) -> tuple[_Setup, np.ndarray]:
    """Return a draw and its poses f64 `[F, 9]`.

    Without inner walls the block should slide freely: a draw that reaches the rim is thrown away (the corners of the
    largest blocks may touch it, or hardly any room would be left). Between walls it is enough to stay in the arena.
    """
    for _ in range(_MAX_DRAWS):
        setup = _draw_setup(physics, random, frames)
        truth = _run_physics(setup, frames)
        margin = _WALL_THICKNESS + (0.0 if physics.walls else min(0.9 * setup.side, 22.5))
        if bool(((truth[:, :2] > margin) & (truth[:, :2] < VIEW - margin)).all()):
            return setup, truth
    raise AssertionError(f"no usable draw in {_MAX_DRAWS}")


def _draw_setup(physics: _Physics, random: np.random.Generator, frames: int) -> _Setup:
    uniform = _uniform(random)

    def choose(options: tuple[float, ...]) -> float:
        return options[int(random.random() * len(options))]

    factor = choose(physics.sides)
    side, nominal_mass = BLOCK_SIDE * factor, BLOCK_MASS * factor
    nominal_friction = choose(physics.friction)
    mass = nominal_mass * uniform(1 - HIDDEN_VARIATION, 1 + HIDDEN_VARIATION)
    friction = nominal_friction * uniform(1 - HIDDEN_VARIATION, 1 + HIDDEN_VARIATION)
    distance = uniform(*physics.distance)
    speed = _speed_for(distance, nominal_friction * GRAVITY, frames - 1)

    direction = uniform(0, 2 * math.pi)
    if physics.walls:
        # Near an axis, so that the wall across the path is met frontally enough to throw the block back.
        direction = round(direction / (math.pi / 2)) * (math.pi / 2) + uniform(-0.45, 0.45)
    ahead = (math.cos(direction), math.sin(direction))
    # The nominal path is centred in the view; the hidden factors do not enter, so the start tells nothing about them.
    start = tuple(VIEW / 2 - distance / 2 * part + uniform(-10, 10) for part in ahead)
    lever = uniform(*physics.off_centre) * side * (1 if random.random() < 0.5 else -1)
    return _Setup(
        side=side,
        mass=mass,
        friction=friction,
        start=(start[0], start[1]),
        angle=uniform(0, 2 * math.pi),
        pushes=((nominal_mass * speed * ahead[0], nominal_mass * speed * ahead[1]), *[(0.0, 0.0)] * (frames - 2)),
        lever=lever,
        walls=(*rim(), _draw_wall(start, ahead, side, distance, uniform)) if physics.walls else rim(),
        palette=physics.palette,
    )


def _draw_hidden(random: np.random.Generator, frames: int) -> _Setup:
    uniform = _uniform(random)
    # Even in 1 / mass and 1 / friction: a push carries the block in proportion to 1 / (mass^2 friction).
    mass, friction = (1 / uniform(1 / high, 1 / low) for low, high in (HIDDEN_MASS, HIDDEN_FRICTION))
    return _Setup(
        side=BLOCK_SIDE,
        mass=mass,
        friction=friction,
        start=_CENTRE,
        angle=uniform(0, 2 * math.pi),
        pushes=_draw_pushes(uniform, frames),
        lever=0.0,
        walls=rim(),
        palette=WOOD,
        pace=_HIDDEN_PACE,
    )


def _draw_pushes(uniform: Uniform, frames: int) -> tuple[Vector, ...]:
    """Return the pushes of a `hidden` clip: out, back, none, then any that carry no block of its range into the rim.

    Other masses and frictions shrink the path towards the centre, so the longest path decides.
    """
    _, out = _draw_push(uniform, _CENTRE)
    place, pushes = _CENTRE, [out, (-out[0], -out[1]), (0.0, 0.0)]
    while len(pushes) < frames - 1:
        place, push = _draw_push(uniform, place)
        pushes.append(push)
    return tuple(pushes[: frames - 1])


def _draw_push(uniform: Uniform, place: Vector) -> tuple[Vector, Vector]:
    """Return where a push carries the block of least mass and friction from `place`, and its impulse."""
    low, high = _HIDDEN_MARGIN, VIEW - _HIDDEN_MARGIN
    for _ in range(_MAX_DRAWS):
        reach, direction = uniform(*HIDDEN_REACH), uniform(0, 2 * math.pi)
        ahead = (math.cos(direction), math.sin(direction))
        moved = (place[0] + reach * ahead[0], place[1] + reach * ahead[1])
        if all(low < part < high for part in moved):
            impulse = HIDDEN_MASS[0] * math.sqrt(2 * HIDDEN_FRICTION[0] * GRAVITY * reach)
            return moved, (impulse * ahead[0], impulse * ahead[1])
    raise AssertionError(f"no usable draw in {_MAX_DRAWS}")


def _speed_for(distance: float, deceleration: float, duration: float) -> float:
    """Return the speed that covers `distance` within `duration` frames, or before if friction stops the block."""
    stopping = math.sqrt(2 * deceleration * distance)
    if stopping / deceleration <= duration:
        return stopping
    return distance / duration + deceleration * duration / 2


def rim() -> tuple[Wall, ...]:
    """Return the walls around every table."""
    low, high = _RIM, VIEW - _RIM
    return (
        Wall((0, low), (VIEW, low), _WALL_THICKNESS),
        Wall((0, high), (VIEW, high), _WALL_THICKNESS),
        Wall((low, 0), (low, VIEW), _WALL_THICKNESS),
        Wall((high, 0), (high, VIEW), _WALL_THICKNESS),
    )


def _draw_wall(
    start: tuple[float, ...],
    ahead: tuple[float, float],
    side: float,
    distance: float,
    uniform: Uniform,
) -> Wall:
    axis = 0 if abs(ahead[0]) > abs(ahead[1]) else 1
    clearance = 0.72 * side + _WALL_THICKNESS / 2
    position = start[axis] + math.copysign(clearance + uniform(0.3, 0.6) * distance, ahead[axis])
    # The wall spans half of the arena around where the path crosses it.
    crossing = start[1 - axis] + ahead[1 - axis] * distance / 2
    ends = (max(_RIM, crossing - 32), min(VIEW - _RIM, crossing + 32))
    points = [(position, end) if axis == 0 else (end, position) for end in ends]
    return Wall(points[0], points[1], _WALL_THICKNESS)


def _run_physics(setup: _Setup, frames: int) -> np.ndarray:
    """Return f64 `[F, 9]`: the pose before the push, then after each frame interval (`TRUTH_COLUMNS`)."""
    try:
        import pymunk
    except ImportError as error:
        raise missing_extra("pymunk", "demo", "simulating clips") from error

    space = pymunk.Space()
    space.gravity = (0, 0)
    space.iterations = 20
    body = pymunk.Body(setup.mass, pymunk.moment_for_box(setup.mass, (setup.side, setup.side)))
    body.position, body.angle = setup.start, setup.angle
    shape = pymunk.Poly.create_box(body, (setup.side, setup.side))
    shape.elasticity, shape.friction = _WALL_RESTITUTION, 0.3
    space.add(body, shape)
    for wall in setup.walls:
        segment = pymunk.Segment(space.static_body, wall.start, wall.end, wall.thickness / 2)
        segment.elasticity, segment.friction = 1.0, 0.3
        space.add(segment)
    # A pivot and a gear that may only push back with limited force, and never correct position, are table friction.
    slide = pymunk.PivotJoint(space.static_body, body, (0, 0), (0, 0))
    slide.max_bias, slide.max_force = 0, setup.friction * setup.mass * GRAVITY
    turn = pymunk.GearJoint(space.static_body, body, 0, 1)
    # Mean distance of a unit square's points from its centre is 0.3826.
    turn.max_bias, turn.max_force = 0, 0.3826 * setup.side * slide.max_force
    space.add(slide, turn)

    rows = []
    for frame in range(frames):
        if frame:
            _push(body, setup.pushes[frame - 1], setup.lever)
            for _ in range(_SUBSTEPS * setup.pace):
                space.step(1 / _SUBSTEPS)
        rows.append(
            [*body.position, body.angle, *body.velocity, body.angular_velocity, setup.mass, setup.friction, setup.side]
        )
    return np.asarray(rows)


def _push(body: pymunk.Body, impulse: Vector, lever: float) -> None:
    length = math.hypot(*impulse)
    if length:
        across = (-impulse[1] / length * lever, impulse[0] / length * lever)
        point = (body.position.x + across[0], body.position.y + across[1])
        body.apply_impulse_at_world_point(impulse, point)
