"""`hopescale data …`: key=value settings onto the functions of `data_pipeline`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from data_pipeline.encode.run import encode
from data_pipeline.errors import nearest
from data_pipeline.parts import parse_part
from data_pipeline.pixels.simulate import SimulationSpec, simulate
from hopescale.errors import ConfigError, Problem
from hopescale.parallel.process_group import Launch, read_launch


def _folder(out: Path) -> Path:
    try:
        is_file = out.exists() and not out.is_dir()
    except OSError as error:
        raise ConfigError(Problem("out", _shown(out), f"cannot be used ({error.strerror})", "name another")) from error
    if is_file:
        raise ConfigError(Problem("out", out, "is a file", "name a new or empty folder"))
    return out


def readable_folder(folder: Path, field: str) -> Path:
    """Return the path of something that is there.

    Raises:
        ConfigError: the path cannot be looked at: it is too long, or a folder on its way is closed.
    """
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        # Whoever needs it says what it should be.
        return folder
    except (OSError, ValueError) as error:
        rule = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise ConfigError(Problem(field, _shown(folder), rule, "correct the path")) from error
    return folder


def _shown(path: Path) -> str:
    text = str(path)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


_MOST_SHOWN = 200
Bar = Callable[[str], Callable[[int, int], None]]
_EXAMPLES = {bool: "true", float: "0.5", int: "16", str: "text", tuple: "[a,b]"}


def simulate_pixels(out: Path, settings: Sequence[str], bar: Bar) -> dict[str, Any]:
    """Simulate clips into `out`.

    Raises:
        UserError: unknown settings, or what `simulate` refuses.
    """
    valid = {f.name: f.default for f in fields(SimulationSpec)}
    spec = SimulationSpec(**parse_settings(settings, valid))
    document = simulate(spec, _folder(out), bar("simulate"))
    return {"out": str(out), "clips": len(document["clips"]), "digest": document["digest"]}


def encode_pixels(pixels: Path, out: Path, settings: Sequence[str], bar: Bar) -> dict[str, Any]:
    """Encode a folder of pixels or videos into `out`: all of it, or under torchrun the part of this rank.

    Returns:
        What was made; the digest is None while other parts are at work.

    Raises:
        UserError: unknown settings, or what `encode` refuses.
    """
    launch = read_launch()
    values = parse_settings(settings, {**_keywords(encode), "part": "0/1"})
    if "part" in values:
        values["part"] = parse_part(values["part"], "processes")
    if launch.launched:
        values = _share(values, launch)
    document = encode(
        readable_folder(pixels, "pixels"), _folder(out), **values, progress=bar("encode") if launch.is_first else None
    )
    return {
        "out": str(out),
        "clips": len(document["clips"]),
        "digest": document.get("digest"),
        "part": list(values.get("part", (0, 1))),
        "skipped": [f"{clip['key']}: {clip['reason']}" for clip in document["skipped"]],
    }


def _share(values: dict[str, Any], launch: Launch) -> dict[str, Any]:
    if "part" in values:
        rule = f"the launcher has started {launch.world_size} ranks, and each takes a part of its own"
        raise ConfigError(Problem("part", "given", rule, "leave part out, or start without torchrun"))
    values = {**values, "part": (launch.rank, launch.world_size)}
    device = values.get("device", "")
    if device.startswith("cuda:"):
        rule = f"the launcher has started {launch.world_size} ranks, and each takes a GPU of its own"
        raise ConfigError(Problem("device", device, rule, "write device=cuda, or start without torchrun"))
    if device == "cuda":
        values["device"] = f"cuda:{launch.local_rank}"
    return values


def _keywords(function: Callable[..., Any]) -> dict[str, Any]:
    """The settings of a function: each with its default, or with its type where the default is None."""
    hints = get_type_hints(function)
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    found = {p.name: _plain_type(hints[p.name]) if p.default is None else p.default for p in parameters}
    return {name: default for name, default in found.items() if default is not None}


def _plain_type(hint: Any) -> type | None:
    """The type that `hint | None` stands for, if a value of it can be written on a command line."""
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    if len(kinds) != 1:
        return None
    kind = type(get_args(kinds[0])[0]) if get_origin(kinds[0]) is Literal else get_origin(kinds[0]) or kinds[0]
    return kind if kind in (bool, float, int, str, tuple) else None


def parse_settings(settings: Sequence[str], valid: dict[str, Any]) -> dict[str, Any]:
    """Values by name, each of the type of its default, or of the type that stands in its place.

    Raises:
        ConfigError: unknown settings, values of another type, or settings given twice; all at once.
    """
    values, problems = {}, []
    for text in settings:
        name, equals, raw = text.partition("=")
        if not equals or name not in valid:
            problems.append(Problem(name, raw or "nothing", "is not a setting of this command", nearest(name, valid)))
            continue
        if name in values:
            problems.append(Problem(name, raw, f"is given twice, also as {values[name]}", "give it once"))
            continue
        kind = valid[name] if isinstance(valid[name], type) else type(valid[name])
        try:
            value = yaml.safe_load(raw)
        except (yaml.YAMLError, ValueError, RecursionError):
            # A key may begin with @, which YAML keeps for itself.
            value = None
        value = tuple(value) if isinstance(value, list) else value
        if kind is float and type(value) is int:
            value = float(value)
        if kind is str and type(value) is not str:
            # A folder may be called 2024.
            value = raw
        if type(value) is not kind:
            example = _EXAMPLES[kind] if isinstance(valid[name], type) else valid[name]
            problems.append(Problem(name, raw, f"must be of type {kind.__name__}", f"write it like {name}={example}"))
        values[name] = value
    if problems:
        raise ConfigError(problems)
    return values


def with_rules(settings: Sequence[str]) -> list[str]:
    """Return settings in which a single rule for partitions has the brackets that several need."""
    parts = [(text, *text.partition("=")) for text in settings]
    return [
        f"partitions=[{raw}]" if name == "partitions" and not raw.startswith("[") else text
        for text, name, _, raw in parts
    ]


def byte_text(count: float) -> str:
    """Return a number of bytes to three digits, with its decimal unit."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} bytes"
