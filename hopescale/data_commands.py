"""`hopescale data …`: key=value settings onto the functions of `data_pipeline`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.encode import encode
from data_pipeline.errors import nearest
from data_pipeline.shard import shard
from data_pipeline.simulate import SimulationSpec, simulate
from hopescale.errors import ConfigError, Problem


def _folder(out: Path) -> Path:
    if out.exists() and not out.is_dir():
        raise ConfigError(Problem("out", out, "is a file", "name a new or empty folder"))
    return out


Bar = Callable[[str], Callable[[int, int], None]]


def simulate_pixels(out: Path, settings: Sequence[str], bar: Bar) -> dict[str, Any]:
    """Simulate clips into `out`.

    Raises:
        UserError: unknown settings, or what `simulate` refuses.
    """
    valid = {f.name: f.default for f in fields(SimulationSpec)}
    spec = SimulationSpec(**_parse(settings, valid))
    document = simulate(spec, _folder(out), bar("simulate"))
    return {"out": str(out), "clips": len(document["clips"]), "digest": document["digest"]}


def encode_pixels(pixels: Path, out: Path, settings: Sequence[str], bar: Bar) -> dict[str, Any]:
    """Encode a pixels folder into `out`.

    Raises:
        UserError: unknown settings, or what `encode` refuses.
    """
    document = encode(pixels, _folder(out), **_parse(settings, _keywords(encode)), progress=bar("encode"))
    return {"out": str(out), "clips": len(document["clips"]), "digest": document["digest"]}


def shard_features(features: Path, out: Path, settings: Sequence[str], bar: Bar) -> dict[str, Any]:
    """Shard a features folder into `out`.

    Raises:
        UserError: unknown settings, or what `shard` refuses.
    """
    manifest = shard(features, _folder(out), **_parse(settings, _keywords(shard)), progress=bar("shard"))
    clips = sum(s.num_clips for s in manifest.shards)
    shards = [asdict(s) for s in manifest.shards]
    return {"out": str(out), "clips": clips, "shards": shards, "fingerprint": manifest.fingerprint}


def _keywords(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not None}


def _parse(settings: Sequence[str], valid: dict[str, Any]) -> dict[str, Any]:
    """Values by name, each of the type of its default."""
    values, problems = {}, []
    for text in settings:
        name, equals, raw = text.partition("=")
        if not equals or name not in valid:
            problems.append(Problem(name, raw or "nothing", "is not a setting of this command", nearest(name, valid)))
            continue
        value = yaml.safe_load(raw)
        value = tuple(value) if isinstance(value, list) else value
        if type(value) is not type(valid[name]):
            kind = type(valid[name]).__name__
            problems.append(Problem(name, raw, f"must be of type {kind}", f"write it like {name}={valid[name]}"))
        values[name] = value
    if problems:
        raise ConfigError(problems)
    return values
