"""Composes YAML files and overrides with Hydra, then hands over to the typed schema; OmegaConf ends here.

Overrides are Hydra's: `experiment=demo optimizer=adamw optimizer.lr=3e-4`. A key without a dot that names a folder
of `configs/` picks a file; everything else sets a value. All mistakes are reported at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from hopescale.errors import ConfigError, Problem

from .checks import cross_section_problems
from .schema import Config

PACKAGE = Path(__file__).resolve().parent.parent


def configs_folder() -> Path:
    """The YAML files: inside the installed package, or beside it in a checkout."""
    installed = PACKAGE / "_configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def load_config(overrides: Sequence[str]) -> Config:
    """Compose and validate.

    Args:
        overrides: `group=file` and `section.field=value`, as typed.

    Raises:
        ConfigError: every override that cannot be parsed, or every field that breaks its rule.
    """
    parsed, problems = _parse(overrides)
    groups = _groups()
    picks, unknown = _check_picks([o for o in parsed if o.key_or_group in groups], groups)
    values = [o for o in parsed if o.key_or_group not in groups]
    problems += unknown
    with initialize_config_dir(str(configs_folder()), version_base="1.3"):
        try:
            composed = compose("config", [str(o.input_line) for o in picks])
        except HydraException as error:
            raise ConfigError(
                Problem(
                    "configs", configs_folder(), f"could not be composed ({error})", "repair the YAML file it names"
                )
            ) from error
    try:
        config = validate(_with_values(composed, values))
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return config


def validate(tree: Any) -> Config:
    """Check a plain tree against the schema, turning every violation into a `Problem`.

    Raises:
        ConfigError: all violations.
    """
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError([problem for e in error.errors() for problem in _problems(tree, dict(e))]) from None
    problems = list(cross_section_problems(config))
    if problems:
        raise ConfigError(problems)
    return config


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """The same configuration with some values set anew.

    Raises:
        ConfigError: an override that cannot be parsed or names a file, or a field that breaks its rule.
    """
    parsed, problems = _parse(overrides)
    problems += [
        Problem(o.key_or_group, o.value(), "a finished configuration takes values only", "write section.field=value")
        for o in parsed
        if o.key_or_group in _groups()
    ]
    if problems:
        raise ConfigError(problems)
    return validate(_with_values(OmegaConf.create(to_tree(config)), parsed))


def to_tree(config: Config) -> dict[str, Any]:
    """The configuration as plain YAML and JSON values."""
    return config.model_dump(mode="json")


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML; `validate` takes it back."""
    return yaml.safe_dump(to_tree(config), sort_keys=False)


def _parse(overrides: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    parser, parsed, problems = OverridesParser.create(), [], []
    for text in overrides:
        try:
            override = parser.parse_override(text)
            if override.type is None or override.is_delete() or override.is_sweep_override():
                raise ValueError("deletions and sweeps are not supported")
            parsed.append(override)
        except (HydraException, ValueError) as error:
            reason = str(error).splitlines()[0]
            problems.append(Problem("override", text, f"must be key=value ({reason})", "write section.field=value"))
    return parsed, problems


def _with_values(tree: DictConfig, values: Sequence[Override]) -> Any:
    """Set the values and leave OmegaConf; a value that refers to something must find it."""
    OmegaConf.set_struct(tree, False)
    try:
        for override in values:
            OmegaConf.update(tree, override.key_or_group, override.value(), merge=True, force_add=True)
        return OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        field = getattr(error, "full_key", None) or "configuration"
        rule = f"refers to something that is not there ({str(error).splitlines()[0]})"
        raise ConfigError(Problem(field, "${...}", rule, f"write the value of {field} itself")) from None


def _groups() -> dict[str, list[str]]:
    return {p.name: sorted(f.stem for f in p.glob("*.yaml")) for p in configs_folder().iterdir() if p.is_dir()}


def _check_picks(picks: Sequence[Override], groups: dict[str, list[str]]) -> tuple[list[Override], list[Problem]]:
    """Picks of files that exist, and a problem for each of the others."""
    problems = [
        Problem(
            o.key_or_group,
            o.value(),
            f"must be one of {', '.join(groups[o.key_or_group])}",
            _nearest_fix(str(o.value()), groups[o.key_or_group]),
        )
        for o in picks
        if o.value() not in groups[o.key_or_group]
    ]
    return [o for o in picks if o.value() in groups[o.key_or_group]], problems


def _problems(tree: Any, error: dict[str, Any]) -> list[Problem]:
    """One pydantic error in our four parts; rules between the fields of a section come as a list."""
    path = [str(part) for part in error["loc"]]
    field = ".".join(path) or "configuration"
    if error["type"] == "rules":
        rules = error["ctx"]["problems"]
        return [Problem(f"{field}.{name}", value, rule, fix) for name, value, rule, fix in rules]
    if error["type"] == "extra_forbidden":
        known = list(_fields_at(path[:-1]))
        everywhere = [".".join(p) for p in _all_fields(Config)]
        near = [".".join([*path[:-1], name]) for name in difflib.get_close_matches(path[-1], known, n=1)]
        # Elsewhere, but not the sections the field is in.
        near += [name for name in difflib.get_close_matches(field, everywhere, n=1) if not field.startswith(name)]
        fix = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}" if known else "remove it"
        return [Problem(field, error["input"], "is not a field of the configuration", fix)]
    rule = error["msg"].removeprefix("Value error, ")
    section = isinstance(error["input"], dict | list | BaseModel)
    value = _value_at(tree, path) if section else error["input"]
    between_fields = section and error["type"] == "value_error"
    fix = "change one of the fields it names" if between_fields else f"set {field} to a value that fits"
    return [Problem(field, value, _sentence(rule), fix)]


def _sentence(rule: str) -> str:
    return rule[0].lower() + rule[1:] if rule else rule


def _value_at(tree: Any, path: list[str]) -> Any:
    for part in path:
        tree = tree.get(part) if isinstance(tree, dict) else tree
    return "the section" if isinstance(tree, dict) else tree


def _fields_at(path: list[str]) -> Iterator[str]:
    model: Any = Config
    for part in path:
        if part.isdigit():
            model = next(iter(get_args(model)), None)
        else:
            info = getattr(model, "model_fields", {}).get(part)
            model = info.annotation if info is not None else None
            if isinstance(model, UnionType):  # an optional section
                model = next((kind for kind in get_args(model) if hasattr(kind, "model_fields")), None)
    yield from getattr(model, "model_fields", {})


def _all_fields(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, info in model.model_fields.items():
        yield (*prefix, name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _all_fields(info.annotation, (*prefix, name))


def _nearest_fix(given: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, valid, n=1)
    return f"did you mean {close[0]}?" if close else f"choose one of {', '.join(valid)}"
